"""The training step of both phases at the real size, on fake CUDA tensors: no tensor may stay on the CPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MISTAKES = (
    "phase1:velocity_target",
    "phase1:rope",
    "phase2:timesteps",
    "phase2:prompt_embeds",
    "phase2:dinov3",
)

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    # A CUDA build has its own device guard, which needs a real GPU.
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU-only torch"),
]


BLOCK, CONTROL_BLOCK, ADAPTER = 46_440_704, 46_440_704 + 2 * (1536 * 1536 + 1536), 1_189_632
BACKBONE = 1_418_996_800
CLASSIFIER = 182_049


def run(*cases, num_layers=30):
    """Return {case: outcome} from one process for all cases, since half of its time is imports."""
    command = [sys.executable, "-m", "tests.helpers.fake_cuda", *cases, "--num_layers", str(num_layers)]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return dict(zip(cases, map(json.loads, process.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def outcomes():
    """Outcomes at the real width and resolution with two blocks, where all of the mistakes show."""
    return run("phase1", "phase2", *MISTAKES, num_layers=2)


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


def test_a_step_of_two_blocks_stays_on_the_gpu(outcomes):
    backbone, control = BACKBONE - 28 * BLOCK, ADAPTER + 2 * CONTROL_BLOCK
    assert outcomes["phase1"] == expected(backbone, backbone)
    assert outcomes["phase2"] == expected(backbone + control + CLASSIFIER, control + CLASSIFIER)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_tensor_left_on_the_cpu_raises(outcomes, mistake):
    message = outcomes[mistake]["error"]
    assert "device" in message, message
    assert "cpu" in message
    assert "cuda:0" in message


@pytest.mark.slow
def test_a_step_of_the_whole_model_stays_on_the_gpu():
    outcomes = run("phase1", "phase2")
    control = ADAPTER + 15 * CONTROL_BLOCK
    assert outcomes["phase1"] == expected(BACKBONE, BACKBONE)
    assert outcomes["phase2"] == expected(BACKBONE + control + CLASSIFIER, control + CLASSIFIER)
