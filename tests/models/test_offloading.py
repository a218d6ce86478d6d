"""Offloaded inputs of blocks: equal losses and gradients, and nothing on the device between the uses."""

import json

import pytest

from c2r import InputError
from tests.helpers.commands import succeed
from tests.helpers.forks import fork
from tests.helpers.options import options


@pytest.fixture(scope="module")
def on_device():
    """What `tests.helpers.memory_on_device` measures."""
    done = succeed("tests/helpers/on_simulated_device.py", "tests/helpers/memory_on_device.py", by=fork)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["block", "offloaded inputs"])
def test_loss_and_gradients_are_equal_wherever_tensors_are_kept(on_device, mode):
    assert on_device[mode]["loss"] == on_device["none"]["loss"]
    assert on_device[mode]["gradients"] == on_device["none"]["gradients"]


def test_no_block_input_stays_on_the_device(on_device):
    blocks, one_input = 6, 2 * 12 * 24 * 2  # three backbone blocks and three control blocks; (2, 12, 24) in bf16
    assert on_device["block"]["kept"] - on_device["offloaded inputs"]["kept"] == blocks * one_input
    assert on_device["block"]["kept"] < on_device["none"]["kept"] / 10


def test_inputs_of_blocks_without_checkpointing_cannot_be_offloaded():
    with pytest.raises(InputError, match=r"--offload_activations: .* give --gradient_checkpointing block"):
        options(["--offload_activations", "--gradient_checkpointing=none"])
