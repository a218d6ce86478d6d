"""Checkpointing modes: equal losses and gradients, less kept memory, and attention that is not computed again."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from c2r.models.checkpointing import ATTENTION_KERNELS, set_checkpointing
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs, tiny_transformer

MODES = ("none", "block", "selective")


def model_of_phase(phase):
    """Return a model to train and its inputs: 12 tokens, 7 of the prompt."""
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()
    if phase == 1:
        return tiny_transformer().train(), (noisy_latents, timesteps, prompt_embeds)
    return tiny_c2r_transformer(3, trained=True).train(), (noisy_latents, timesteps, prompt_embeds, control_features)


class CountAttention(TorchDispatchMode):
    """Counts the forward calls of attention kernels."""

    def __init__(self):
        super().__init__()
        self.to_itself = self.to_the_prompt = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in ATTENTION_KERNELS and args[0].shape[-2] == args[1].shape[-2]:
            self.to_itself += 1
        elif operator in ATTENTION_KERNELS:
            self.to_the_prompt += 1
        return operator(*args, **kwargs or {})


@cache
def step(phase, mode, dtype=torch.float32):
    """Run forward and backward pass; return loss, gradients, attention calls, and bytes that are kept in between."""
    model, inputs = model_of_phase(phase)
    set_checkpointing(model, mode)
    forward, backward = CountAttention(), CountAttention()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        forward,
    ):
        loss = model(*inputs).sample.float().square().mean()
    with backward:
        loss.backward()
    return SimpleNamespace(
        loss=loss.detach(),
        grads={name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        forward=forward,
        backward=backward,
        kept=sum(event.self_cpu_memory_usage for event in profile.events()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("mode", MODES[1:])
def test_loss_and_gradients_do_not_depend_on_the_mode(phase, mode, dtype):
    plain, ours = step(phase, "none", dtype), step(phase, mode, dtype)
    assert torch.equal(ours.loss, plain.loss)
    assert ours.grads.keys() == plain.grads.keys()
    assert all(torch.equal(ours.grads[name], grad) for name, grad in plain.grads.items())


# Of four backbone blocks the first has no graph in phase 2; each of three control blocks has one.
@pytest.mark.parametrize(("phase", "blocks", "with_graph"), [(1, 4, 4), (2, 7, 6)])
def test_selective_computes_no_self_attention_again(phase, blocks, with_graph):
    for mode, again in (("none", 0), ("block", with_graph), ("selective", 0)):
        done = step(phase, mode)
        assert (done.forward.to_itself, done.forward.to_the_prompt) == (blocks, blocks)
        assert done.backward.to_itself == again, mode
    assert step(phase, "selective").backward.to_the_prompt == with_graph


@pytest.mark.parametrize("phase", [1, 2])
def test_each_mode_keeps_as_much_as_it_says(phase):
    none, block, selective = (step(phase, mode).kept for mode in MODES)
    assert 0 < block < selective < none / 2
    tokens, width, batch_size, heads = 12, 24, 2, 2
    # Outputs, and the logarithm of each row's sum of exponentials.
    attention = 4 * batch_size * tokens * (width + heads)
    with_graph = 4 if phase == 1 else 6
    assert selective - block == with_graph * attention
