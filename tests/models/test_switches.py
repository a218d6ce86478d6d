"""Diffusers' switches on the joined model with control on: results equal the plain ones, or a line refuses the switch.

A cache is compared with what it stands for, computed on a model without a cache: hidden states that are kept by hand.
"""

import warnings
from contextlib import ExitStack

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig, apply_first_block_cache
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig

from c2r.models.attention import use_lean_attention
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from tests.helpers.tiny import FEATURE_DIM, tiny_c2r_transformer, tiny_inputs, tiny_transformer

CPU = torch.device("cpu")
STEPS = 4

ALWAYS_SKIP = 1e9  # threshold of a cache: it skips as soon as it may


@pytest.fixture
def model():
    """Residuals follow blocks 0 and 2 of 4."""
    return tiny_c2r_transformer(2, 2, trained=True).eval()


@pytest.fixture
def latent_model():
    """The control is added once, to the patch-embedded latents."""
    backbone = tiny_transformer()
    controlnet = C2RControlNet.from_transformer(backbone, feature_dim=FEATURE_DIM, injection="latent")
    controlnet.control_adapter.gate.data.fill_(1.0)
    return C2RTransformer(backbone, controlnet).eval()


@pytest.fixture(scope="module")
def expected():
    return predict(tiny_c2r_transformer(2, 2, trained=True))


@torch.no_grad()
def predict(model, *inputs, **options):
    return model(*(inputs or tiny_inputs()), **options).sample


# -------------------------------------------------------------------------------------------------------- offloading


@pytest.fixture
def undefined_memory_is_nan():
    """Give `torch.empty` NaNs, so that reading a weight that was offloaded shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_sequential_offload_reaches_every_parameter(model, expected):
    cpu_offload(model, CPU, offload_buffers=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(predict(model), expected)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.usefixtures("undefined_memory_is_nan")
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("lean", [False, True])
def test_group_offload_to_disk_changes_nothing(model, expected, tmp_path, offload_type, lean):
    if lean:
        use_lean_attention(model)
        expected = predict(model)
    model.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=tmp_path)
    away = [name for name, parameter in model.named_parameters() if parameter.isnan().all()]
    assert len(away) == len(list(model.parameters()))
    for _ in range(2):
        # Weights from the disk lie at other addresses, at which kernels may sum in another order.
        torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=1e-5)
    assert model.device == CPU


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload_in_memory_changes_nothing(model, expected, offload_type):
    model.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1)
    assert torch.equal(predict(model), expected)
    noisy_latents, timesteps, prompt_embeds, _ = tiny_inputs()
    predict(model, noisy_latents, timesteps, prompt_embeds)  # without control, as outside its part of the steps
    assert torch.equal(predict(model), expected)


def test_block_level_offload_holds_one_block_at_a_time(model):
    """Diffusers would load the whole backbone at once if the joined model did not name its blocks."""
    model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    groups = {
        name: module._diffusers_hook.get_hook("group_offloading").group
        for name, module in model.named_modules()
        if hasattr(module, "_diffusers_hook")
    }
    sizes = {name: len(group.modules) for name, group in groups.items()}
    blocks = {f"transformer.blocks.{i}" for i in range(4)} | {f"controlnet.control_blocks.{i}" for i in range(2)}
    assert set(sizes) == blocks | {"transformer", "controlnet.control_adapter"}
    assert {sizes[name] for name in blocks} == {1}
    grouped = {parameter for group in groups.values() for parameter in group.parameters}
    grouped |= {parameter for group in groups.values() for part in group.modules for parameter in part.parameters()}
    assert grouped == set(model.parameters())


def test_streams_are_refused_on_a_device_without_them(model):
    with pytest.raises(ValueError, match="requires an onload device whose backend implements streams"):
        model.enable_group_offload(CPU, offload_type="leaf_level", use_stream=True)


# ----------------------------------------------------------------------------------- dtypes, attention, compilation


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_rounds_weights_and_nothing_else(model, storage):
    rounded = tiny_c2r_transformer(2, 2, trained=True)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            layer = name.rpartition(".")[0]
            if isinstance(rounded.get_submodule(layer), torch.nn.Linear) and not any(
                kept in layer for kept in ("condition_embedder", "control_adapter")
            ):
                parameter.copy_(parameter.to(storage).float())
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert model.controlnet.control_blocks[0].projector[2].weight.dtype == storage
    assert model.transformer.scale_shift_table.dtype == torch.float32
    assert model.dtype == torch.float32
    assert torch.equal(predict(model), predict(rounded))


@pytest.mark.parametrize("lean", [False, True])
def test_attention_backends_reach_both_branches(model, expected, lean):
    if lean:
        use_lean_attention(model)
    active = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        model.set_attention_backend("_native_math")
        backends = {processor._attention_backend for processor in model.attn_processors.values()}
        assert backends == {AttentionBackendName._NATIVE_MATH}
        assert len(model.attn_processors) == 2 * (4 + 2)
        torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=1e-5)
    finally:
        model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("lean", [False, True])
def test_fused_projections_change_nothing(model, expected, lean):
    if lean:
        use_lean_attention(model)
    model.fuse_qkv_projections()
    assert all(block.block.attn1.fused_projections for block in model.controlnet.control_blocks)
    with torch.no_grad():  # the fused layers compute, not the single ones
        for module in model.modules():
            if getattr(module, "fused_projections", False):
                single = (module.to_k, module.to_v)
                kept = [layer.weight.clone() for layer in single]
                for layer in single:
                    layer.weight.fill_(torch.nan)
    torch.testing.assert_close(predict(model), expected, atol=1e-5, rtol=1e-5)
    assert kept


def test_gradient_checkpointing_has_model_mixins_switch(model):
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert not model.transformer.gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_switches_of_the_backbone_that_would_leave_control_out_are_refused(model):
    model.transformer.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing was enabled on the backbone"):
        predict(model)
    model.transformer.disable_gradient_checkpointing()
    apply_first_block_cache(model.transformer, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="a cache was enabled on the backbone"):
        predict(model)


# ------------------------------------------------------------------------------------------------------------ caches

CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=ALWAYS_SKIP),
    "magnitude": lambda: MagCacheConfig(
        threshold=ALWAYS_SKIP, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "spectral": lambda: SeaCacheConfig(threshold=ALWAYS_SKIP, residual_order=0, cache_end_steps=0),
    "taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=0,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1"],
    ),
    "broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


def inputs_of(step, prompt=0):
    """Inputs of a denoising step: latents and timestep are its own, prompt and control features are not."""
    noisy_latents, timesteps, _, _ = tiny_inputs(seed=10 + step)
    _, _, prompt_embeds, control_features = tiny_inputs(seed=prompt)
    return noisy_latents, timesteps, prompt_embeds, control_features


def predict_in(model, name, step, **inputs):
    with model.cache_context(name, step_index=step, sigma=1 - step / STEPS, num_inference_steps=STEPS):
        return predict(model, *inputs_of(step, **inputs))


def keep(model, step, part):
    """Return an output of a part of the model at a step; "blocks" is what enters and leaves the list of blocks."""
    kept = {}
    backbone = model.transformer
    hooks = [
        backbone.blocks[0].register_forward_pre_hook(lambda _, args: kept.update(enters=args[0])),
        backbone.blocks[1].register_forward_pre_hook(lambda _, args: kept.update(after_first=args[0])),
        backbone.norm_out.register_forward_pre_hook(lambda _, args: kept.update(leaves=args[0])),
    ]
    for name, module in backbone.named_modules():
        if name.endswith("attn1"):
            hooks.append(module.register_forward_hook(lambda *call, name=name: kept.update({name: call[-1]})))
    predict(model, *inputs_of(step))
    for hook in hooks:
        hook.remove()
    return kept if part is None else kept[part]


def predicted_by_hand(model, cache):
    """Return the prediction at step 1 from what a cache keeps of step 0, on a model without a cache."""
    before, now = keep(model, 0, None), keep(model, 1, None)
    backbone = model.transformer
    with ExitStack() as stack:
        if cache in ("taylor", "broadcast"):
            for name, module in backbone.named_modules():
                if name.endswith("attn1"):
                    replace = module.register_forward_hook(lambda *_, name=name: before[name])
                    stack.callback(replace.remove)
        else:
            start = "after_first" if cache == "first block" else "enters"
            skipped = now[start] + (before["leaves"] - before[start])
            stack.callback(backbone.norm_out.register_forward_pre_hook(lambda *_: skipped).remove)
        return predict(model, *inputs_of(1))


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_keeps_what_it_stands_for_with_control(model, cache):
    first, second = predict(model, *inputs_of(0)), predict(model, *inputs_of(1))
    by_hand = predicted_by_hand(model, cache)
    with model.cache_context("cond"):  # a list of hooks from before the cache must not stay
        pass
    model.enable_cache(CACHES[cache]())
    assert model.is_cache_enabled

    assert torch.equal(predict_in(model, "cond", 0), first)
    cached = predict_in(model, "cond", 1)
    torch.testing.assert_close(cached, by_hand, atol=2e-5, rtol=2e-5)
    assert (cached - second).norm() > 0.01 * second.norm()  # so something was skipped

    model.disable_cache()
    assert not model.is_cache_enabled
    assert torch.equal(predict(model, *inputs_of(1)), second)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_keeps_what_it_stands_for_with_control_in_the_latents(latent_model, cache):
    model = latent_model
    first = predict(model, *inputs_of(0))
    by_hand = predicted_by_hand(model, cache)
    model.enable_cache(CACHES[cache]())
    assert torch.equal(predict_in(model, "cond", 0), first)
    torch.testing.assert_close(predict_in(model, "cond", 1), by_hand, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("undefined_memory_is_nan")
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_offloading_with_control_in_the_latents(latent_model, tmp_path, offload_type):
    expected = predict(latent_model)
    noisy_latents, timesteps, prompt_embeds, _ = tiny_inputs()
    assert not torch.allclose(predict(latent_model, noisy_latents, timesteps, prompt_embeds), expected, atol=1e-2)
    latent_model.compile_repeated_blocks(backend="eager")  # there are blocks of one branch only
    latent_model.enable_group_offload(
        CPU, offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=tmp_path
    )
    torch.testing.assert_close(predict(latent_model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_passes_of_guidance_do_not_mix(model, cache):
    model.enable_cache(CACHES[cache]())
    alone = {}
    for name, prompt in (("cond", 0), ("uncond", 1), ("control", 2)):
        alone[name] = [predict_in(model, name, step, prompt=prompt) for step in range(STEPS)]
        model._reset_stateful_cache()  # as a pipeline does at the end of a call
    for step in range(STEPS):
        for name, prompt in (("cond", 0), ("uncond", 1), ("control", 2)):
            assert torch.equal(predict_in(model, name, step, prompt=prompt), alone[name][step])


def test_lite_taylor_cache_skips_control_blocks_too(model):
    model.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, use_lite_mode=True))
    runs = []
    for block in model.controlnet.control_blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    for step in range(2):
        assert predict_in(model, "cond", step).isfinite().all()
    assert len(runs) == 2  # both control blocks in the first step, none in the second


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FasterCacheConfig(current_timestep_callback=lambda: 500), "FasterCacheConfig: .* one batch"),
        (TextKVCacheConfig(), "TextKVCacheConfig: it finds no layer of Wan to act on"),
        (TaylorSeerCacheConfig(), "TaylorSeerCacheConfig: it finds no layer of Wan to act on"),
        (PyramidAttentionBroadcastConfig(), "current_timestep_callback"),
        ("first block", "not supported"),
    ],
)
def test_other_caches_are_refused_and_leave_the_model_as_it_was(model, expected, config, message):
    with pytest.raises(ValueError, match=message):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    assert torch.equal(predict(model), expected)


def test_a_second_cache_is_refused_and_leaves_the_first(model):
    model.enable_cache(CACHES["first block"]())
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(CACHES["magnitude"]())
    assert model.is_cache_enabled


# ---------------------------------------------------------------------------------------------------- PEFT adapters


def test_adapters_are_the_backbones_and_work_with_control(model, expected, tmp_path):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(config)
    assert model.peft_config == model.transformer.peft_config
    assert not any("lora" in name for name, _ in model.controlnet.named_parameters())
    adapted = predict(model)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    assert torch.equal(predict(model, attention_kwargs={"scale": 0.0}), expected)
    half = predict(model, attention_kwargs={"scale": 0.5})
    model.disable_adapters()
    assert torch.equal(predict(model), expected)
    model.enable_adapters()
    model.set_adapters("default", 0.5)
    torch.testing.assert_close(predict(model), half)
    model.set_adapters("default", 1.0)
    model.save_lora_adapter(tmp_path)

    other = tiny_c2r_transformer(2, 2, trained=True)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(predict(other), adapted)
    other.fuse_lora()
    other.unload_lora()
    assert not hasattr(other, "peft_config")
    torch.testing.assert_close(predict(other), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_the_backbone_train_beside_the_control(model, checkpointing):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    model(*tiny_inputs()).sample.square().mean().backward()
    lora = [parameter for name, parameter in model.named_parameters() if "lora" in name]
    assert lora
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in lora)
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())
    assert all(
        parameter.grad is None for name, parameter in model.transformer.named_parameters() if "lora" not in name
    )


def test_adapters_work_in_offloaded_and_cached_models(model, tmp_path):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = predict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=tmp_path)
    model.enable_cache(CACHES["first block"]())
    with model.cache_context("cond"):
        torch.testing.assert_close(predict(model), adapted, atol=1e-5, rtol=1e-5)
