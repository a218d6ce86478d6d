"""The training step of both phases at the real size, on fake CUDA tensors: devices, dtypes, sizes of its results."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    # A CUDA build has its own device guard, which needs a real GPU.
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU-only torch"),
]

BACKBONE, CONTROL_BLOCK, ADAPTER = 1_418_996_800, 46_440_704 + 2 * (1536 * 1536 + 1536), 1_189_632
CLASSIFIER = 182_049


def expected(parameters, trainable):
    return {
        "loss": ["cuda:0", "torch.float32", []],
        "parameters": parameters,
        "trainable": trainable,
        "with_gradient": trainable,  # in phase 2 without the bf16 backbone
        "gradients": ["cuda:0 torch.float32"],
        "optimizer": ["cuda:0 torch.float32"],
        "model": ["cuda:0"],
    }


@pytest.mark.slow
def test_a_step_of_the_whole_model_stays_on_the_gpu():
    command = [sys.executable, "-m", "tests.helpers.fake_cuda", "phase1", "phase2"]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    phase1, phase2 = map(json.loads, process.stdout.splitlines())
    control = ADAPTER + 15 * CONTROL_BLOCK
    assert phase1 == expected(BACKBONE, BACKBONE)
    assert phase2 == expected(BACKBONE + control + CLASSIFIER, control + CLASSIFIER)
