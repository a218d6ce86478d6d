"""The precision of a model that is set up for training."""

import pytest
import torch
from torch.nn import functional as F

import train_phase1
import train_phase2
from c2r import InputError
from c2r.models.transformer import C2RTransformer
from c2r.options import PHASE1, PHASE2
from c2r.training.setup import build_train_state
from tests.helpers.attention import recorded_backends
from tests.helpers.commands import phase1, phase2
from tests.helpers.options import options
from tests.helpers.runs import run_of
from tests.helpers.scripts import run_script
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


@pytest.mark.parametrize("phase", [1, 2])
def test_the_attention_backend_of_the_options_computes(phase):
    model, backbone, trainable = parts_of_phase(phase)
    run = run_of(options(["--mixed_precision=no", "--attention_backend=_native_math"]))
    state = build_train_state(run, model, backbone, trainable)
    with recorded_backends() as calls:
        state.model(*tiny_inputs()[: phase + 2])
    assert calls == ["_native_math"] * 2 * (4 if phase == 1 else 4 + 2)  # self and cross attention of each block


@pytest.mark.parametrize("phase", [1, 2])
def test_an_attention_backend_that_is_missing_is_refused_before_a_dataset_is_read(phase, tiny_models, tmp_path):
    backend = "--attention_backend=flash"
    if phase == 1:
        script, command, argv = train_phase1, PHASE1, phase1(tiny_models, tmp_path, tmp_path / "out", backend)
    else:
        backbone = tiny_models / "pipeline/transformer"
        script, command = train_phase2, PHASE2
        argv = phase2(tiny_models, tmp_path, backbone, tmp_path / "out", backend)
    argv = argv[argv.index(f"train_phase{phase}.py") + 1 :]
    with pytest.raises(InputError, match="--attention_backend flash: does not work on cpu in float32 with 12"):
        run_script(script, command, argv)
