"""Diffusers' expectations of a model, on the control branch and the joined model: files, dtypes, repeated calls.

What the switches do is in test_switches.py.
"""

import json

import pytest
import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.models.cache_utils import CacheMixin
from safetensors import safe_open

from c2r.models.adversary import DomainClassifier, WithAdversary
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from tests.helpers.checks import equal_weights
from tests.helpers.tiny import LATENT_CHANNELS, tiny_c2r_transformer, tiny_inputs


@pytest.fixture
def model():
    return tiny_c2r_transformer(2, 2, trained=True).eval()


@torch.no_grad()
def predict(model, inputs=None, **options):
    return model(*(inputs or tiny_inputs()), **options).sample


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_joined_model_is_a_model_of_diffusers(model):
    assert isinstance(model, ModelMixin)
    assert isinstance(model, CacheMixin)
    assert model.config is model.transformer.config
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters(only_trainable=True) == model.controlnet.num_parameters()


def test_the_joined_model_is_saved_as_two_stock_folders(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = "diffusion_pytorch_model.safetensors"
    assert files_of(tmp_path) == {
        *(f"{part}/{name}" for part in ("transformer", "controlnet") for name in ("config.json", weights))
    }
    assert json.loads((tmp_path / "transformer/config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    # The names of the stock model: joining must not add any, nor rename one.
    with safe_open(tmp_path / "transformer" / weights, "pt") as file:
        assert set(file.keys()) == set(WanTransformer3DModel.from_config(model.config).state_dict())
    assert equal_weights(WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer"), model.transformer)
    assert equal_weights(C2RControlNet.from_pretrained(tmp_path, subfolder="controlnet"), model.controlnet)

    loaded = C2RTransformer.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(predict(loaded), predict(model))
    inner = C2RTransformer.from_pretrained(tmp_path.parent, subfolder=tmp_path.name)
    assert equal_weights(inner, model)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_variants_and_shards_are_read_back(model, tmp_path, options):
    model.half().save_pretrained(tmp_path, **options)
    written = files_of(tmp_path)
    assert any("fp16" in name for name in written) == ("variant" in options)
    assert any("00001-of" in name for name in written) == ("max_shard_size" in options)
    reading = {name: value for name, value in options.items() if name == "variant"}
    loaded = C2RTransformer.from_pretrained(tmp_path, torch_dtype=torch.float16, **reading)
    assert loaded.dtype == torch.float16
    for name, parameter in loaded.state_dict().items():
        assert torch.equal(parameter.half(), model.state_dict()[name])  # some stay in fp32
    if "variant" in options:
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            C2RTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_of_loading_leaves_what_the_parts_keep_in_fp32(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = C2RTransformer.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype
    kept = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    assert "transformer.scale_shift_table" in kept
    assert "controlnet.control_blocks.0.block.scale_shift_table" in kept
    assert all(any(part in name for part in C2RTransformer._keep_in_fp32_modules) for name in kept)
    assert loaded.controlnet.control_blocks[0].projector[0].weight.dtype == dtype
    inputs = tiny_inputs()
    cast = tuple(tensor if tensor.ndim == 1 else tensor.to(dtype) for tensor in inputs)
    half = predict(loaded, cast)
    assert half.dtype == dtype
    error = (half.float() - predict(model, inputs)).norm() / predict(model, inputs).norm()
    assert error < 8 * torch.finfo(dtype).eps


def test_moving_to_a_dtype_moves_both_parts(model):
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert predict(model, tiny_inputs(dtype=torch.bfloat16)).isfinite().all()
    assert {parameter.dtype for parameter in model.float().parameters()} == {torch.float32}


def test_calls_repeat_and_are_given_as_tuples_too(model):
    first = predict(model)
    assert torch.equal(predict(model), first)
    with torch.no_grad():
        (as_tuple,) = model(*tiny_inputs(), return_dict=False)
    assert torch.equal(as_tuple, first)


def test_a_batch_equals_its_samples_one_by_one(model):
    inputs = tiny_inputs(batch_size=3)
    batch = predict(model, inputs)
    for index in range(3):
        single = predict(model, tuple(tensor[index : index + 1] for tensor in inputs))
        torch.testing.assert_close(batch[index : index + 1], single, atol=1e-5, rtol=1e-5)


def test_the_backbone_keeps_working_by_itself(model):
    """Also after a joined forward that ended in an error."""
    noisy_latents, timesteps, prompt_embeds, control_features = tiny_inputs()
    blocks = model.transformer.blocks
    kind = type(blocks)
    with torch.no_grad():
        alone = model.transformer(noisy_latents, timesteps, prompt_embeds).sample
        with pytest.raises(RuntimeError):
            model(noisy_latents, timesteps, prompt_embeds[..., 1:], control_features)
        assert type(blocks) is kind
        assert torch.equal(model.transformer(noisy_latents, timesteps, prompt_embeds).sample, alone)
    assert torch.equal(predict(model, (noisy_latents, timesteps, prompt_embeds)), alone)


def test_another_backbone_can_take_the_place_of_the_first(model):
    expected = predict(model)
    state = model.transformer.state_dict()
    model.transformer = WanTransformer3DModel.from_config(model.config).eval()
    model.transformer.load_state_dict(state)
    assert torch.equal(predict(model), expected)


def test_the_control_branch_loads_alone(model, tmp_path):
    controlnet = model.controlnet
    controlnet.half().save_pretrained(tmp_path, variant="fp16")
    assert files_of(tmp_path) == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    loaded = C2RControlNet.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.config.injection_layers == [0, 2]
    assert loaded.dtype == torch.float16
    kept = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    assert all(any(part in name for part in C2RControlNet._keep_in_fp32_modules) for name in kept)
    assert kept
    for name, parameter in loaded.state_dict().items():
        assert torch.equal(parameter.half(), controlnet.state_dict()[name])


def test_the_model_with_an_adversary_has_cache_contexts(model):
    joined = WithAdversary(model, DomainClassifier(LATENT_CHANNELS))
    expected = predict(model)
    with joined.cache_context("cond", step_index=0):
        assert torch.equal(predict(joined), expected)
