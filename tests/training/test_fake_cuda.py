"""The training step of both phases at the real width, on fake CUDA tensors: devices, dtypes, sizes of its results."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from c2r.data.buckets import Bucket
from c2r.estimation.configs import read_configs
from c2r.estimation.report import estimate_run
from c2r.estimation.stages import STEP
from tests.helpers.estimates import training_options
from tests.helpers.fake_cuda import CONTROL_LAYERS, NUM_LAYERS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    # A CUDA build has its own device guard, which needs a real GPU.
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU-only torch"),
]

BLOCK, ADAPTER, CLASSIFIER = 46_440_704, 1_189_632, 182_049
BACKBONE = 1_418_996_800 - (30 - NUM_LAYERS) * BLOCK
CONTROL_BLOCK = BLOCK + 2 * (1536 * 1536 + 1536)


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
def test_a_step_stays_on_the_gpu_and_takes_the_estimated_memory():
    command = [sys.executable, "-m", "tests.helpers.fake_cuda", "phase1", "phase2"]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    phase1, phase2 = map(json.loads, process.stdout.splitlines())
    control = ADAPTER + CONTROL_LAYERS * CONTROL_BLOCK
    peaks = [phase1.pop("peak"), phase2.pop("peak")]
    assert phase1 == expected(BACKBONE, BACKBONE)
    assert phase2 == expected(BACKBONE + control + CLASSIFIER, control + CLASSIFIER)
    # The estimate finds this peak without fake CUDA tensors, and so without a compiler.
    configs = read_configs("1.3b", None)
    configs = replace(configs, transformer=configs.transformer | {"num_layers": NUM_LAYERS})
    for phase, peak in enumerate(peaks, 1):
        options = {"train_batch_size": 2, "control_layers": CONTROL_LAYERS, "adversarial_weight": 0.1}
        args = training_options(phase, **options if phase == 2 else {"train_batch_size": 2})
        step = estimate_run(args, configs, Bucket(81, 480, 832), step_only=True)
        assert step.total(STEP) == pytest.approx(peak, rel=0.01)
