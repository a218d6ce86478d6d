"""The precision of a model that is set up for training."""

import pytest
import torch
from torch.nn import functional as F

from c2r.models.transformer import C2RTransformer
from c2r.training.setup import build_train_state
from tests.helpers.options import options
from tests.helpers.runs import run_of
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs, tiny_transformer


def parts_of_phase(phase):
    """Return (model, backbone, trainable part)."""
    if phase == 1:
        transformer = tiny_transformer()
        return transformer, transformer, transformer
    model = tiny_c2r_transformer(trained=True)
    return model, model.transformer, model.controlnet


@pytest.mark.parametrize("phase", [1, 2])
def test_under_bf16_the_time_embedder_alone_runs_in_full_precision(phase):
    model, backbone, trainable = parts_of_phase(phase)
    run = run_of(options(["--mixed_precision=bf16", "--gradient_checkpointing=block"]))
    state = build_train_state(run, model, backbone, trainable)
    embedder, block = backbone.condition_embedder.time_embedder, backbone.blocks[0]
    seen = {}
    for name, module in (("time", embedder), ("queries", block.attn1.to_q), ("latents", backbone.patch_embedding)):

        def look(module, args, output, name=name):
            seen.setdefault(name, (args[0], output))

        module.register_forward_hook(look)
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()
    inputs = (noisy_latents, timesteps, prompt_embeds)
    velocity_pred = state.model(*inputs, *([control_features] if isinstance(model, C2RTransformer) else [])).sample

    frequencies, embedding = seen["time"]
    expected = embedder.linear_2(F.silu(embedder.linear_1(frequencies)))
    assert torch.equal(embedding, expected)
    assert embedding.dtype == frequencies.dtype == torch.float32
    assert seen["latents"][0].dtype == torch.float32
    assert seen["queries"][1].dtype == torch.bfloat16
    velocity_pred.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in trainable.parameters()} == {torch.float32}
