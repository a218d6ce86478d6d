"""Offloaded inputs and stored blocks: equal losses and gradients, and nothing on the device between the uses."""

import json

import pytest
import torch

from c2r import InputError
from c2r.models.checkpointing import set_checkpointing
from c2r.models.chunking import chunk_feed_forward
from c2r.models.offloading import RunningOrder, StoredBlock, quantise_rows, store_blocks
from tests.helpers.commands import succeed
from tests.helpers.forks import fork
from tests.helpers.options import options, phase2_options
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs, tiny_transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def on_device():
    """Return the numbers that `tests.helpers.memory_on_device` prints."""
    done = succeed("tests/helpers/on_simulated_device.py", "tests/helpers/memory_on_device.py", by=fork)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("mode", "plain"),
    [
        ("block", "none"),
        ("offloaded inputs", "none"),
        ("offloaded backbone", "none"),
        ("everything offloaded", "none"),
        ("everything offloaded, chunks", "chunks"),
        ("offloaded float8, chunks", "float8, chunks"),
    ],
)
def test_loss_and_gradients_are_equal_wherever_tensors_are_kept(on_device, mode, plain):
    assert on_device[mode]["loss"] == on_device[plain]["loss"]
    assert on_device[mode]["gradients"] == on_device[plain]["gradients"]


def test_no_block_input_stays_on_the_device(on_device):
    blocks, one_input = 6, 2 * 12 * 24 * 2  # three backbone blocks and three control blocks; (2, 12, 24) in bf16
    assert on_device["block"]["kept"] - on_device["offloaded inputs"]["kept"] == blocks * one_input
    assert on_device["block"]["kept"] < on_device["none"]["kept"] / 10


def test_no_weight_of_the_backbones_blocks_stays_on_the_device(on_device):
    """Except those of the block that has run last, with which the backward pass begins."""
    on_the_cpu = {mode for mode, measured in on_device.items() if measured["backbone"] == 0}
    assert on_the_cpu == {
        "offloaded backbone",
        "everything offloaded",
        "everything offloaded, chunks",
        "offloaded float8, chunks",
    }
    one_block = on_device["block"]["backbone"] / 4
    assert on_device["offloaded backbone"]["kept"] - on_device["block"]["kept"] == one_block > 0


def test_the_block_that_runs_next_is_predicted():
    """In every step but the first of a direction, also where the first blocks are not part of the backward pass."""
    model = tiny_c2r_transformer(2, trained=True)
    blocks = model.transformer.blocks
    store_blocks(blocks, CPU, offload=True)
    set_checkpointing(model, "block")
    ran, predicted = [], []

    class Recorded(RunningOrder):
        def following(self, block):
            ran.append(self.blocks.index(block))
            following = super().following(block)
            predicted.append(None if following is None else self.blocks.index(following))
            return following

    order = Recorded()
    order.blocks = list(blocks)
    for block in blocks:
        block.order = order
    for _ in range(2):
        with torch.no_grad():
            model(*tiny_inputs())
        model(*tiny_inputs()).sample.square().mean().backward()
    assert ran == 2 * [0, 1, 2, 3, 0, 1, 2, 3, 3, 2, 1]
    assert predicted == 2 * [1, 2, 3, None, 1, 2, 3, None, 2, 1, 0]


def test_rows_are_rounded_to_the_nearest_float8():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    weight[3] = 0
    rounded, scale = quantise_rows(weight)
    assert rounded.dtype == torch.float8_e4m3fn
    error = (rounded.float() * scale - weight).abs()
    # Three bits after the leading one; below a 2^-15th of the row's largest entry the spacing is constant.
    assert (error <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) * 2.0**-17).all()
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    assert rounded[3].float().eq(0).all()


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_stored_block_has_the_gradients_of_the_rounded_weights(chunks):
    """Float8 changes the weights and nothing else: a model with the rounded weights has the same gradients."""
    inputs = tiny_inputs()
    grads = []
    for stored in (True, False):
        model = tiny_c2r_transformer(3, trained=True)
        if stored:
            store_blocks(model.transformer.blocks, CPU, float8=True)
        else:
            for parameter in model.transformer.blocks.parameters():
                if parameter.ndim == 2:
                    rounded, scale = quantise_rows(parameter.data)
                    parameter.data = rounded.float() * scale
        set_checkpointing(model, "block")
        chunk_feed_forward(model, chunks)
        model(*inputs).sample.square().mean().backward()
        grads.append([parameter.grad for parameter in model.trainable_parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads))


def test_nothing_is_offloaded_without_checkpointing():
    with pytest.raises(InputError, match=r"--offload_activations: .* give --gradient_checkpointing block"):
        options(["--offload_activations", "--gradient_checkpointing=none"])
    for option in ("--offload_backbone", "--fp8_backbone"):
        with pytest.raises(InputError, match=f"{option}: .* give --gradient_checkpointing block"):
            phase2_options([option, "--gradient_checkpointing=none"])


def test_a_trained_block_cannot_be_stored():
    with pytest.raises(ValueError, match="only frozen weights can be stored"):
        StoredBlock(tiny_transformer().blocks[0], RunningOrder(), CPU, offload=True, float8=False)
