"""The training step of both phases at the real size, on fake CUDA tensors: devices, dtypes, sizes of its results."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from c2r.data.buckets import Bucket
from c2r.estimation.configs import read_configs
from c2r.estimation.report import estimate_run
from c2r.estimation.stages import STEP
from tests.helpers.estimates import training_options

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
    peaks = [phase1.pop("peak"), phase2.pop("peak")]
    assert phase1 == expected(BACKBONE, BACKBONE)
    assert phase2 == expected(BACKBONE + control + CLASSIFIER, control + CLASSIFIER)
    # The estimate finds this peak without fake CUDA tensors, and so without a compiler.
    for phase, peak in enumerate(peaks, 1):
        options = {"train_batch_size": 2, "control_layers": 15, "adversarial_weight": 0.1}
        args = training_options(phase, **options if phase == 2 else {"train_batch_size": 2})
        step = estimate_run(args, read_configs("1.3b", None), Bucket(81, 480, 832), step_only=True)
        assert step.total(STEP) == pytest.approx(peak, rel=0.01)
