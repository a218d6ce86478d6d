"""LoRA files in the public layouts, added to a backbone: W + scale · alpha / rank · B·A, and what is refused."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import load_file, save_file

from c2r import InputError
from c2r.models.lora import TARGETS, LoraWeights, save_lora
from c2r.models.lora_file import WEIGHTS, LoraFile
from tests.helpers.tiny import tiny_inputs, tiny_transformer, tiny_vae

RANK, ALPHA, SCALE = 3, 2.0, 0.7
#: Layers of the tiny backbone by Wan's original names and Diffusers' names, written out.
LAYERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.1.cross_attn.v": "blocks.1.attn2.to_v",
    "blocks.3.ffn.0": "blocks.3.ffn.net.0.proj",
    "blocks.3.ffn.2": "blocks.3.ffn.net.2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


@pytest.fixture(scope="module")
def weights():
    return {name: tensor.detach() for name, tensor in tiny_transformer().state_dict().items()}


@pytest.fixture
def matrices(weights):
    """Return {Diffusers' name: (B, A)} for every layer in LAYERS."""
    draw = torch.Generator().manual_seed(5)

    def pair(shape):
        return torch.randn(shape[0], RANK, generator=draw), torch.randn(RANK, shape[1], generator=draw)

    return {name: pair(weights[f"{name}.weight"].shape) for name in LAYERS.values()}


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def added(path, weights, scale=SCALE):
    lora = LoraFile(path, scale).match(shapes(weights))
    return {name: lora.add_to(name, tensor) for name, tensor in weights.items()}


def keys_of(layout, original, diffusers):
    """Return the keys of A, B and alpha of a layer in a layout."""
    module = {"diffusers": f"transformer.{diffusers}", "peft": f"base_model.model.{diffusers}"}.get(layout)
    if layout in ("comfyui", "comfyui up"):
        module = f"diffusion_model.{original}"
    elif layout == "comfyui whole":
        module = f"model.diffusion_model.{original}"
    elif layout == "diffsynth":
        module = original
    elif layout == "musubi":
        module = f"lora_unet_{original.replace('.', '_')}"
    if layout in ("comfyui up", "musubi"):
        return f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha"
    infix = ".default" if layout == "diffsynth" else ""
    return f"{module}.lora_A{infix}.weight", f"{module}.lora_B{infix}.weight", None


@pytest.mark.parametrize(
    "layout", ["diffusers", "peft", "comfyui", "comfyui up", "comfyui whole", "diffsynth", "musubi"]
)
def test_adds_every_layout_by_the_formula(layout, weights, matrices, tmp_path):
    tensors, factor = {}, SCALE
    for original, name in LAYERS.items():
        up, down = matrices[name]
        a, b, alpha = keys_of(layout, original, name)
        tensors |= {a: down, b: up}
        if alpha is not None:
            tensors[alpha] = torch.tensor(ALPHA)
            factor = SCALE * ALPHA / RANK
    save_file(tensors, tmp_path / "lora.safetensors")
    changed = added(tmp_path / "lora.safetensors", weights)
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if layer in matrices:
            up, down = (matrix.double() for matrix in matrices[layer])
            expected = (tensor.double() + factor * up @ down).float()
            torch.testing.assert_close(changed[name], expected, rtol=0, atol=1e-6)
        else:
            assert changed[name] is tensor


def test_metadata_gives_alpha(weights, tmp_path):
    name = "blocks.0.attn1.to_q"
    up, down = torch.randn(24, RANK), torch.randn(RANK, 24)
    tensors = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}

    def save(**entries):
        text = json.dumps({f"transformer.{key}": value for key, value in entries.items()})
        save_file(tensors, tmp_path / "lora.safetensors", {LORA_ADAPTER_METADATA_KEY: text})

    save(r=RANK, lora_alpha=6)
    changed = added(tmp_path / "lora.safetensors", weights, scale=1)[f"{name}.weight"]
    torch.testing.assert_close(changed, weights[f"{name}.weight"] + 2 * up @ down)
    save(r=RANK, lora_alpha=6, alpha_pattern={"to_q": 1})
    with pytest.raises(InputError, match="not supported"):
        LoraFile(tmp_path / "lora.safetensors")
    for text in ("[" * 200_000, '{"r": 1' + "0" * 400 + ', "lora_alpha": 1}', "[]"):
        save_file(tensors, tmp_path / "lora.safetensors", {LORA_ADAPTER_METADATA_KEY: text})
        with pytest.raises(InputError, match="not supported") as error:
            LoraFile(tmp_path / "lora.safetensors")
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("alpha", [torch.tensor(6), torch.tensor([6.0]), torch.tensor(6, dtype=torch.uint8)])
def test_alpha_scales_the_bias_of_lora_b_too(alpha, weights, tmp_path):
    name = "blocks.0.attn1.to_q"
    up, down, bias = torch.randn(24, RANK), torch.randn(RANK, 24), torch.randn(24)
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias, "alpha": alpha}
    save_file({f"transformer.{name}.{key}": t for key, t in tensors.items()}, tmp_path / "lora.safetensors")
    changed = added(tmp_path / "lora.safetensors", weights)
    factor = SCALE * 6 / RANK
    torch.testing.assert_close(changed[f"{name}.bias"], weights[f"{name}.bias"] + factor * bias)
    torch.testing.assert_close(changed[f"{name}.weight"], weights[f"{name}.weight"] + factor * up @ down)


def test_step_distilled_files_change_norms_biases_and_modulations(weights, tmp_path):
    """The layout of CausVid's and lightx2v's files: matrices and whole differences."""
    draw = torch.Generator().manual_seed(6)
    changes = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.norm_k.diff": "blocks.1.attn1.norm_k.weight",
        "blocks.1.self_attn.k.diff_b": "blocks.1.attn1.to_k.bias",
        "blocks.2.diff_m": "blocks.2.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
    }
    weights = tiny_transformer(cross_attn_norm=True).state_dict()
    tensors = {
        f"diffusion_model.{key}": torch.randn(weights[name].shape, generator=draw) for key, name in changes.items()
    }
    down, up = torch.randn(RANK, 24, generator=draw), torch.randn(24, RANK, generator=draw)
    tensors |= {
        f"diffusion_model.blocks.1.self_attn.k.lora_{key}.weight": m for key, m in (("down", down), ("up", up))
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    changed = added(tmp_path / "lora.safetensors", weights)
    for key, name in changes.items():
        expected = weights[name] + SCALE * tensors[f"diffusion_model.{key}"]
        torch.testing.assert_close(changed[name], expected)
    torch.testing.assert_close(
        changed["blocks.1.attn1.to_k.weight"], weights["blocks.1.attn1.to_k.weight"] + SCALE * up @ down
    )
    assert sum(not torch.equal(changed[name], tensor) for name, tensor in weights.items()) == len(changes) + 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a backbone with a LoRA of random weights, and the LoRA's folder."""
    transformer = tiny_transformer()
    lora = LoraWeights.from_config(LoraWeights.config_of(transformer.config, RANK))
    before = transformer(*tiny_inputs()[:3]).sample
    lora.attach(transformer)
    assert torch.equal(transformer(*tiny_inputs()[:3]).sample, before)  # B is zero
    torch.manual_seed(7)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("lora")
    lora.save_pretrained(folder)
    return transformer, folder


def test_trains_all_linear_layers_of_the_blocks_and_nothing_else(trained):
    trainable = {name for name, parameter in trained[0].named_parameters() if parameter.requires_grad}
    layers = {f"blocks.{block}.{target}" for block in range(4) for target in TARGETS}
    assert trainable == {f"{layer}.lora_{matrix}.default.weight" for layer in layers for matrix in "AB"}
    linear = {
        name for name, module in tiny_transformer().blocks.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert layers == {f"blocks.{name}" for name in linear}


def test_loads_what_it_has_saved(trained):
    lora = LoraWeights.load(trained[1])
    assert lora.config.rank == RANK
    named = dict(trained[0].named_parameters())
    for name, tensor in lora.state_dict().items():
        assert torch.equal(tensor, named[name.replace(".weight", ".default.weight")])


def stock_pipeline():
    """Return a WanPipeline as Diffusers has it, on the tiny backbone."""
    return WanPipeline(None, None, tiny_vae(), FlowMatchEulerDiscreteScheduler(), tiny_transformer())


@pytest.mark.parametrize("layout", ["folder", "comfyui"])
def test_diffusers_pipeline_loads_the_trained_lora(trained, layout, tmp_path):
    transformer, folder = trained
    pipeline = stock_pipeline()
    if layout == "comfyui":
        save_lora(tmp_path / "lora.safetensors", LoraWeights.load(folder), comfyui=True)
        assert "diffusion_model.blocks.0.self_attn.q.lora_down.weight" in load_file(tmp_path / "lora.safetensors")
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors", use_safetensors=True)
    else:
        pipeline.load_lora_weights(folder)
    inputs = tiny_inputs()[:3]
    expected = transformer(*inputs).sample
    torch.testing.assert_close(pipeline.transformer(*inputs).sample, expected, rtol=0, atol=1e-5)
    # Added to the weights while they are loaded it gives the same output.
    file = folder if layout == "folder" else tmp_path / "lora.safetensors"
    weights = tiny_transformer().state_dict()
    summed = tiny_transformer()
    summed.load_state_dict(added(file, weights, scale=1))
    torch.testing.assert_close(summed(*inputs).sample, expected, rtol=0, atol=1e-5)


def test_two_loras_add_up(trained, weights):
    one, two = (LoraFile(trained[1], scale).match(shapes(weights)) for scale in (0.25, 0.5))
    both = LoraFile(trained[1], 0.75).match(shapes(weights))
    for name, tensor in weights.items():
        torch.testing.assert_close(two.add_to(name, one.add_to(name, tensor)), both.add_to(name, tensor))


def test_refuses_what_does_not_belong_to_the_backbone(weights, trained, tmp_path):
    good = load_file(trained[1] / WEIGHTS)
    key = "transformer.blocks.0.attn1.to_q.lora_A.weight"
    path = tmp_path / "lora.safetensors"

    def refusal(change):
        save_file({name: tensor for name, tensor in (good | change).items() if tensor is not None}, path)
        with pytest.raises(InputError) as error:
            added(path, weights)
        return str(error.value)

    assert "no such layers: transformer.blocks.9.attn1.to_q" in refusal(
        {key.replace("blocks.0", "blocks.9"): torch.zeros(RANK, 24)}
    )
    image = "transformer.blocks.0.attn2.add_k_proj.lora_A.weight"
    assert image in refusal({image: torch.zeros(RANK, 24)})  # of an image-to-video model
    assert "dora_scale" in refusal({key.replace("lora_A.weight", "dora_scale"): torch.zeros(24)})
    assert "to_q.lora_B.weight alone" in refusal({key: None})
    assert "tensors do not fit" in refusal({key: torch.zeros(RANK, 25)})
    assert "tensors do not fit" in refusal({key: torch.zeros(RANK + 1, 24)})
    assert "tensors do not fit" in refusal({key: torch.zeros(RANK, 24, 1)})
    up = key.replace("lora_A", "lora_B")
    assert "of rank 25" in refusal({key: torch.zeros(25, 24), up: torch.zeros(24, 25)})
    assert "twice" in refusal({key.replace("lora_A", "lora_down"): torch.zeros(RANK, 24)})
    assert "is not finite" in refusal({key: torch.full((RANK, 24), torch.inf)})
    assert "has tensors in I8" in refusal({key: torch.zeros(RANK, 24, dtype=torch.int8)})
    alone = {up.replace("weight", "bias"): torch.zeros(24), up: None, key: None}
    assert "lora_B.bias without matrices" in refusal(alone)
    assert "alpha (2,)" in refusal({key.replace("lora_A.weight", "alpha"): torch.zeros(2)})


def test_refuses_files_of_other_kinds(trained, tmp_path):
    with pytest.raises(InputError, match="no LoRA here"):
        LoraFile(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        LoraFile(tmp_path / "lora.bin")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="has no tensors"):
        LoraFile(tmp_path / "empty.safetensors").match({"proj_out.weight": (1, 1)})
    (tmp_path / "config.json").write_bytes((trained[1] / "config.json").read_bytes())
    tensors = load_file(trained[1] / WEIGHTS)
    tensors.popitem()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="weights are missing"):
        LoraWeights.load(tmp_path)
