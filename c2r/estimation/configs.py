"""Configurations of the models that an estimate is about: Wan 2.1's two sizes, or those in a folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import DINOv3ViTConfig, DINOv3ViTModel, UMT5Config, UMT5EncoderModel

from c2r.models.backbone import read_transformer_config
from c2r.models.controlnet import C2RControlNet
from c2r.models.diffusers_layout import with_stored_dtypes
from c2r.models.dinov3 import DINOv3FeatureExtractor, read_dinov3_config
from c2r.models.gguf_weights import quantise_modules
from c2r.models.parts import freeze, read_text_encoder_config, read_vae_config
from c2r.models.transformer import C2RTransformer

_WAN = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}

#: Entries of the transformers' configs that differ from diffusers' defaults or that the estimate reads.
WAN_SIZES: dict[str, dict[str, Any]] = {
    "1.3b": _WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "patch_size": [1, 2, 2]},
    "14b": _WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "patch_size": [1, 2, 2]},
}
#: UMT5-XXL, Wan 2.1's text encoder.
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
#: The released DINOv3 ViT-B.
DINOV3_VITB = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_register_tokens": 4,
    "patch_size": 16,
}
#: Numbers of the images that a ViT reads; they change no shape.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfigs:
    """Entries of the models' config.json; those that a training step alone does not need may be empty."""

    transformer: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    dinov3: dict[str, Any] = field(default_factory=dict)
    #: {name of a weight of the frozen backbone: its type in a .gguf file}
    quantised: dict[str, str] = field(default_factory=dict)


def read_configs(model: str, dinov3: str | None) -> ModelConfigs:
    """Return the configs of a model.

    Args:
        model: "1.3b", "14b", or a Wan pipeline folder.
        dinov3: folder of a DINOv3; None: ViT-B.

    Raises:
        InputError: there is no such folder, or it holds another architecture.
    """
    vit = dict(read_dinov3_config(Path(dinov3))) if dinov3 else DINOV3_VITB
    if model in WAN_SIZES:
        return ModelConfigs(WAN_SIZES[model], {}, UMT5_XXL, vit)
    folder = Path(model)
    transformer = read_transformer_config(folder)
    return ModelConfigs(
        transformer,
        dict(read_vae_config(folder / "vae")),
        dict(read_text_encoder_config(folder / "text_encoder")),
        vit,
    )


# ------------------------------------------------------ models on the meta device, without data, or on the CPU


def build_backbone(config: dict[str, Any], dtype: torch.dtype, device: str = "meta") -> WanTransformer3DModel:
    """Return the backbone as `load_transformer` loads it, on the CPU with random weights."""
    with torch.device(device):
        return with_stored_dtypes(WanTransformer3DModel.from_config(config).eval(), dtype)


def build_joined(
    configs: ModelConfigs,
    dtype: torch.dtype,
    *,
    control_layers: int,
    control_stride: int,
    injection: str = "blocks",
    device: str = "meta",
) -> C2RTransformer:
    """Return phase 2's model: the backbone frozen in `dtype`, the control branch in fp32.

    Args:
        configs: of the models.
        dtype: of the frozen weights.
        control_layers, control_stride: see `injection_layers`.
        injection: "blocks" or "latent".
        device: "meta" or "cpu".

    Raises:
        InputError: the backbone has too few blocks.
    """
    backbone = build_backbone(configs.transformer, dtype, device)
    quantise_modules(backbone, configs.quantised, dtype)
    controlnet = C2RControlNet.from_transformer(
        *(backbone, control_layers, control_stride, configs.dinov3["hidden_size"]),
        empty=device == "meta",
        injection=injection,
    )
    return C2RTransformer(backbone, controlnet)


def build_dinov3(config: dict[str, Any], dtype: torch.dtype, device: str = "meta") -> DINOv3FeatureExtractor:
    """Return the frozen DINOv3 as `DINOv3FeatureExtractor.from_pretrained` loads it."""
    with torch.device(device):
        model = with_stored_dtypes(DINOv3ViTModel(DINOv3ViTConfig(**config)), dtype)
        return DINOv3FeatureExtractor(model, _MEAN, _STD)


def build_vae(config: dict[str, Any]) -> AutoencoderKLWan:
    """Return the frozen VAE, which is always in fp32."""
    with torch.device("meta"):
        return freeze(AutoencoderKLWan.from_config(config))


def build_text_encoder(config: dict[str, Any], dtype: torch.dtype) -> UMT5EncoderModel:
    """Return the frozen text encoder."""
    with torch.device("meta"):
        return freeze(UMT5EncoderModel(UMT5Config(**config)).to(dtype))
