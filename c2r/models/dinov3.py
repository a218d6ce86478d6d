"""Frozen DINOv3: control frames to patch features."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from einops import rearrange
from pydantic import Field, FiniteFloat
from torch import nn
from transformers import DINOv3ViTModel
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import read_json
from c2r.models.hub import Count, Layers, Width, read_config, require_complete, resolve_model_folder
from c2r.models.parts import check_transformers_weights, freeze, load_transformers_model


class DINOv3Config(TypedDict):
    """The checked entries of config.json."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Count
    patch_size: Count
    num_register_tokens: NotRequired[Annotated[int, Field(ge=0, le=1000)]]
    num_channels: NotRequired[Annotated[int, Field(ge=3, le=3)]]
    image_size: NotRequired[Width]


class _Preprocessor(TypedDict):
    """The checked entries of preprocessor_config.json."""

    image_mean: Annotated[list[FiniteFloat], Field(min_length=3, max_length=3)]
    image_std: Annotated[list[Annotated[FiniteFloat, Field(gt=0)]], Field(min_length=3, max_length=3)]


def check_dinov3(name_or_path: str | Path, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Check a DINOv3 by its configs and its files' headers; the weights are not read.

    Args:
        name_or_path: see `DINOv3FeatureExtractor.from_pretrained`.
        sizes: (height, width) of the control frames, in pixels.

    Returns:
        the width Dd of a patch feature, the number of parameters.

    Raises:
        InputError: not found, no access, not a DINOv3 ViT, incomplete, or its patches do not fit the frames.
    """
    folder = resolve_model_folder(name_or_path)
    config, _, index = _check_folder(folder)
    for height, width in sizes:
        for option, pixels in (("height", height), ("width", width)):
            if pixels % config["patch_size"]:
                raise InputError(
                    f"--{option} {pixels}: must be divisible by the patch size {config['patch_size']} of {folder}; "
                    "give a multiple of it"
                )
    return config["hidden_size"], sum(math.prod(shape) for shape in index.shapes().values())


def read_dinov3_config(folder: Path) -> DINOv3Config:
    """Return the checked config.json of a DINOv3, see `read_config`."""
    return read_config(folder, "model_type", "dinov3_vit", DINOv3Config)


def _check_folder(folder):
    """Return config, preprocessor's config and `WeightIndex` of a DINOv3."""
    config = read_dinov3_config(folder)
    preprocessor = read_json(folder / "preprocessor_config.json", _Preprocessor, extra="allow")
    return config, preprocessor, check_transformers_weights(DINOv3ViTModel, folder, config)


class DINOv3FeatureExtractor(nn.Module):
    """A frozen DINOv3 ViT that turns control frames into patch features.

    It stays in eval mode after `train()` and runs without autograd and outside autocast, in its weights' dtype, so the
    features of a frame do not depend on the code around it.

    Args:
        model: the ViT. It is frozen here.
        image_mean, image_std: three numbers each, of RGB in [0, 1].
        chunk_size: frames per forward pass of the model; bounds the memory; it changes no more than rounding.

    Attributes:
        feature_dim: Dd, the width of a patch feature.
        patch_size: pixels along one side of a patch.
    """

    def __init__(
        self, model: DINOv3ViTModel, image_mean: Sequence[float], image_std: Sequence[float], chunk_size: int = 16
    ):
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1")
        if len(image_mean) != 3 or len(image_std) != 3:
            raise ValueError(f"image_mean {image_mean} and image_std {image_std} must have three numbers each")
        self.model = freeze(model)
        # Plain numbers: as buffers they would be rounded by `.to(torch.bfloat16)`.
        self.image_mean = tuple(float(mean) for mean in image_mean)
        self.image_std = tuple(float(std) for std in image_std)
        self.chunk_size = chunk_size
        self.feature_dim = model.config.hidden_size
        self.patch_size = model.config.patch_size
        # One class token and the registers stand before the patches (4 in the released weights, 0 by default).
        self.num_prefix_tokens = 1 + model.config.num_register_tokens

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, torch_dtype: torch.dtype | None = None, chunk_size: int = 16
    ) -> "DINOv3FeatureExtractor":
        """Load from a folder or hub name with config.json, preprocessor_config.json and safetensors weights.

        Args:
            name_or_path: for instance `facebook/dinov3-vitb16-pretrain-lvd1689m`, whose access is restricted.
            torch_dtype: dtype of the weights and the features; None is fp32. Give it here: `.to(dtype)` later would
                round the frequencies of the position embedding too.
            chunk_size: see the class.

        Raises:
            InputError: not found, no access, not a DINOv3 ViT, or incomplete.
        """
        folder = resolve_model_folder(name_or_path)
        _, preprocessor, _ = _check_folder(folder)
        model, info = load_transformers_model(DINOv3ViTModel, folder, torch_dtype)
        require_complete(folder, info["missing_keys"], info["mismatched_keys"])
        return cls(model, preprocessor["image_mean"], preprocessor["image_std"], chunk_size)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a folder that `from_pretrained` loads; the options are those of transformers' models."""
        self.model.save_pretrained(folder, **options)
        preprocessor = {"image_mean": self.image_mean, "image_std": self.image_std}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(preprocessor) + "\n", encoding="utf-8")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and the features."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def train(self, mode: bool = True):
        """Stay in eval mode: in training mode DINOv3 jitters its position embedding."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, control_frames: torch.Tensor) -> torch.Tensor:
        """Compute the patch features of every frame.

        Args:
            control_frames: (B, F, 3, H, W) floats in [0, 1], RGB; H and W multiples of `patch_size`.

        Returns:
            (B, F, h, w, Dd) in the weights' dtype, h = H / patch_size, w = W / patch_size.

        Raises:
            ValueError: if shape or dtype are wrong.
        """
        if control_frames.ndim != 5 or control_frames.shape[2] != 3 or not control_frames.is_floating_point():
            raise ValueError(
                f"control frames are {tuple(control_frames.shape)} {control_frames.dtype}: "
                "expected (B, F, 3, H, W) floats in [0, 1]"
            )
        batch_size, *_, height, width = control_frames.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"control frames are {height}x{width}: height and width must be multiples of "
                f"DINOv3's patch size {self.patch_size}"
            )
        chunks = rearrange(control_frames, "b f c h w -> (b f) c h w").split(self.chunk_size)
        with torch.autocast(control_frames.device.type, enabled=False):
            control_features = torch.cat([self._patches(chunk) for chunk in chunks])  # (B·F, h·w, Dd)
        return rearrange(control_features, "(b f) (h w) d -> b f h w d", b=batch_size, h=height // self.patch_size)

    def _patches(self, frames):
        """Return the patch features (n, h·w, Dd) of frames (n, 3, H, W) in [0, 1]."""
        # Normalised here, because the image processor of transformers would need torchvision.
        channels = zip(frames.float().unbind(1), self.image_mean, self.image_std)
        pixel_values = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        tokens = self.model(pixel_values.to(self.dtype)).last_hidden_state  # (n, 1 + registers + h·w, Dd)
        return tokens[:, self.num_prefix_tokens :]
