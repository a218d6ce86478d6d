"""Feed-forward layers in parts of the sequence: equal results in float64, and less memory within a block."""

import pytest
import torch

from c2r.models.checkpointing import set_checkpointing
from c2r.models.chunking import chunk_feed_forward
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs, tiny_transformer


def model_of_phase(phase):
    if phase == 1:
        return tiny_transformer().train(), tiny_inputs()[:3]
    return tiny_c2r_transformer(3, trained=True).train(), tiny_inputs()


def step(phase, mode, chunks, dtype=torch.float64):
    """Return output and gradients."""
    model, inputs = model_of_phase(phase)
    model.to(dtype)
    set_checkpointing(model, mode)
    chunk_feed_forward(model, chunks)
    names = {*model.state_dict()}
    assert names == {*model_of_phase(phase)[0].state_dict()}
    sample = model(*(tensor.to(dtype) for tensor in inputs)).sample
    sample.square().mean().backward()
    return sample.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("chunks", [2, 5, 100])  # 12 tokens
def test_parts_of_the_sequence_change_no_gradient(phase, mode, chunks):
    (output, grads), (expected, expected_grads) = step(phase, mode, chunks), step(phase, mode, 1)
    # The blocks compute norms in fp32, which may amplify a rounding error of float64 to one of fp32.
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-8)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item(), msg=name)


def saved_bytes(run):
    """Return the bytes that autograd keeps of a run, each memory counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


@pytest.mark.parametrize("part", ["ffn", "projector"])
def test_a_part_keeps_its_input_alone(part):
    model = tiny_c2r_transformer(trained=True)
    block = model.controlnet.control_blocks[0]
    module = block.block.ffn if part == "ffn" else block.projector
    hidden_states = torch.randn(2, 12, 24, requires_grad=True)
    plain = saved_bytes(lambda: module(hidden_states))
    chunk_feed_forward(model, 3)
    chunked = saved_bytes(lambda: module(hidden_states))
    assert chunked == hidden_states.numel() * 4 < plain / 2
