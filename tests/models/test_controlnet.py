"""C2RControlNet: clones, zero residuals, a complete config, and the sizes that the README states."""

import json
from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from c2r import InputError
from c2r.models.controlnet import C2RControlNet, injection_layers
from c2r.models.controlnet_files import load_controlnet
from c2r.models.transformer import C2RTransformer
from tests.helpers.tiny import FEATURE_DIM, tiny_transformer

WAN = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}


@pytest.mark.parametrize(
    ("control_layers", "control_stride", "expected"),
    [(15, 1, list(range(15))), (8, 3, [0, 3, 6, 9, 12, 15, 18, 21]), (1, 7, [0]), (10, 3, list(range(0, 30, 3)))],
)
def test_injection_layers_follow_stride_and_number(control_layers, control_stride, expected):
    assert injection_layers(control_layers, control_stride, 30) == expected


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_injection_layers_are_ascending_and_fit_or_are_refused(control_layers, control_stride, num_layers):
    if (control_layers - 1) * control_stride >= num_layers:
        with pytest.raises(InputError, match=r"--control_layers .* --control_stride .*blocks 0 to"):
            injection_layers(control_layers, control_stride, num_layers)
    else:
        layers = injection_layers(control_layers, control_stride, num_layers)
        assert len(layers) == control_layers
        assert layers[0] == 0
        assert layers[-1] < num_layers
        assert all(b - a == control_stride for a, b in pairwise(layers))


@pytest.mark.parametrize(("control_layers", "control_stride"), [(0, 1), (1, 0), (-1, 1)])
def test_a_number_or_stride_of_blocks_below_one_is_refused(control_layers, control_stride):
    with pytest.raises(InputError, match="at least 1"):
        injection_layers(control_layers, control_stride, 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_transformer_clones_the_first_blocks_in_fp32(dtype):
    transformer = tiny_transformer().to(dtype)
    controlnet = C2RControlNet.from_transformer(transformer, control_layers=2, control_stride=2, feature_dim=8)
    for control_block, block in zip(controlnet.control_blocks, transformer.blocks):
        clone, original = control_block.block.state_dict(), block.state_dict()
        assert clone.keys() == original.keys()
        assert all(torch.equal(clone[name], original[name].float()) for name in clone)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in controlnet.parameters())
    # No value is left uninitialised.
    assert all(p.isfinite().all() for p in controlnet.parameters())
    # The clones share no memory with the backbone.
    before = controlnet.control_blocks[0].block.ffn.net[2].weight.clone()
    torch.nn.init.zeros_(transformer.blocks[0].ffn.net[2].weight)
    assert torch.equal(controlnet.control_blocks[0].block.ffn.net[2].weight, before)


def test_a_fresh_projector_gives_zero_from_a_nonzero_first_layer():
    controlnet = C2RControlNet.from_transformer(tiny_transformer(), 2, 1, FEATURE_DIM)
    for block in controlnet.control_blocks:
        states = torch.randn(2, 3, 24)
        assert block.projector(states).count_nonzero() == 0
        assert block.projector[0](states).count_nonzero() == states.numel()


def test_the_seed_determines_the_fresh_weights():
    def fresh(seed):
        torch.manual_seed(seed)
        return C2RControlNet.from_transformer(transformer, 1, 1, FEATURE_DIM).state_dict()

    transformer = tiny_transformer()
    first, again, other = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["control_adapter.proj.weight"], other["control_adapter.proj.weight"])


def test_a_saved_folder_loads_with_no_more_than_its_config(tmp_path):
    transformer = tiny_transformer(num_layers=6)
    controlnet = C2RControlNet.from_transformer(transformer, 2, 4, FEATURE_DIM, temporal_stride=2)
    controlnet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["injection_layers"] == [0, 4]
    loaded = C2RControlNet.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= {k: v for k, v in controlnet.config.items() if k[0] != "_"}.items()
    assert all(torch.equal(a, b) for a, b in zip(controlnet.parameters(), loaded.parameters(), strict=True))
    C2RTransformer(transformer, loaded)


@pytest.mark.parametrize("causal", [False, True])
def test_a_saved_folder_keeps_which_frames_its_adapter_sees(causal, tmp_path):
    transformer = tiny_transformer()
    controlnet = C2RControlNet.from_transformer(transformer, 1, 1, FEATURE_DIM, causal_control=causal)
    torch.nn.init.normal_(controlnet.control_adapter.temporal_downsample.conv.weight)
    controlnet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["causal_control"] is causal
    if not causal:  # folders of earlier versions do not have the entry
        del config["causal_control"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    features = torch.randn(1, 9, 2, 2, FEATURE_DIM)
    tokens = controlnet.control_adapter(features, (3, 2, 2))
    assert torch.equal(load_controlnet(tmp_path).control_adapter(features, (3, 2, 2)), tokens)


def test_bf16_loading_keeps_norms_and_modulation_in_fp32(tmp_path):
    controlnet = C2RControlNet.from_transformer(tiny_transformer(), 1, 1, FEATURE_DIM)
    controlnet.save_pretrained(tmp_path)
    loaded = C2RControlNet.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {name for name, p in loaded.named_parameters() if p.dtype == torch.float32} == {
        "control_adapter.norm.weight",
        "control_adapter.norm.bias",
        "control_blocks.0.block.norm2.weight",
        "control_blocks.0.block.norm2.bias",
        "control_blocks.0.block.scale_shift_table",
    }


@pytest.mark.parametrize("layers", [[1, 0], [0, 0], [4], [-1]])
def test_a_config_with_bad_injection_layers_is_refused(layers):
    config = dict(C2RControlNet.from_transformer(tiny_transformer(), 2, 1, FEATURE_DIM).config)
    with pytest.raises(ValueError, match="injection_layers"):
        C2RControlNet.from_config(config | {"injection_layers": layers})


def parameter_table(size, **controlnet_options):
    """Return {part: (trainable, frozen) parameters} of phase 2 with DINOv3 ViT-B, built on the meta device."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**WAN[size])
        dinov3 = DINOv3ViTModel(
            DINOv3ViTConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
                num_register_tokens=4,
            )
        ).requires_grad_(False)
    model = C2RTransformer(transformer, C2RControlNet.from_transformer(transformer, **controlnet_options))
    parts = {
        "backbone": [model.transformer],
        "control adapter": [model.controlnet.control_adapter],
        "control blocks": [block.block for block in model.controlnet.control_blocks],
        "projectors": [block.projector for block in model.controlnet.control_blocks],
        "C2RTransformer": [model],
        "DINOv3 ViT-B": [dinov3],
    }
    return {
        part: tuple(
            sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad == trainable)
            for trainable in (True, False)
        )
        for part, modules in parts.items()
    }


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (
            "1.3B",
            {
                "backbone": (0, 1_418_996_800),
                "control adapter": (1_189_632, 0),
                "control blocks": (696_610_560, 0),
                "projectors": (70_824_960, 0),
                "C2RTransformer": (768_625_152, 1_418_996_800),
                "DINOv3 ViT-B": (0, 85_660_416),
            },
        ),
        (
            "14B",
            {
                "backbone": (0, 14_288_491_584),
                "control adapter": (3_945_728, 0),
                "control blocks": (5_270_914_560, 0),
                "projectors": (786_585_600, 0),
                "C2RTransformer": (6_061_445_888, 14_288_491_584),
                "DINOv3 ViT-B": (0, 85_660_416),
            },
        ),
    ],
)
def test_parameter_counts_are_those_of_the_readme(size, expected):
    table = parameter_table(size)
    assert table == expected
    # By hand: convolution 9·Dd, LayerNorm 2·Dd, Linear Dd·D + D; projector 2·(D² + D)
    dim = WAN[size]["num_attention_heads"] * 128
    assert table["control adapter"][0] == 9 * 768 + 2 * 768 + 768 * dim + dim
    assert table["projectors"][0] == 15 * 2 * (dim * dim + dim)


def test_six_blocks_with_stride_four_fit_14b():
    assert parameter_table("14B", control_layers=6, control_stride=4)["control blocks"] == (6 * 351_394_304, 0)
