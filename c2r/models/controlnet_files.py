"""Check and load a control branch: of phase 2, of a pipeline folder, or released weights to start from."""

from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field, FiniteFloat

from c2r import InputError
from c2r.files import complete_folder
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet
from c2r.models.diffusers_layout import check_own_model, load_own_model, with_stored_dtypes
from c2r.models.hub import Count, Width, read_config
from c2r.models.injections import Injection
from c2r.models.released import load_released, read_released, released_config
from c2r.models.wan import BlockConfig


class _ControlNetConfig(BlockConfig):
    injection_layers: Annotated[list[int], Field(max_length=100)]
    feature_dim: Width
    temporal_stride: NotRequired[Count]
    injection: NotRequired[Injection]
    causal_control: NotRequired[bool]
    control_directions: NotRequired[Width | None]
    control_certificate: NotRequired[dict[str, FiniteFloat] | None]


def check_controlnet(folder: str | Path) -> None:
    """Check the control branch of a phase 2 or pipeline folder by its config and its files' headers.

    Raises:
        InputError: see `load_controlnet`.
    """
    check_own_model(_controlnet_folder(folder), C2RControlNet, _ControlNetConfig)


def load_controlnet(folder: str | Path, torch_dtype: torch.dtype | None = None, empty: bool = False) -> C2RControlNet:
    """Load the control branch of a phase 2 or pipeline folder, in eval mode, trainable; dtype None is fp32.

    Args:
        folder: of phase 2, or of a pipeline.
        torch_dtype: dtype of the weights.
        empty: see `load_transformer`; the branch is in fp32.

    Raises:
        InputError: the folder has no control branch, or its weights do not fit its config.
    """
    if empty:
        return _empty_controlnet(read_controlnet_config(folder))
    return load_own_model(_controlnet_folder(folder), C2RControlNet, _ControlNetConfig, torch_dtype)


def read_controlnet_config(folder: str | Path) -> dict[str, Any]:
    """Return the config of the control branch in a phase 2 or pipeline folder.

    Raises:
        InputError: the folder has none, or it is damaged.
    """
    return read_config(_controlnet_folder(folder), "_class_name", C2RControlNet.__name__, _ControlNetConfig)


def _empty_controlnet(config):
    with torch.device("meta"):
        controlnet = C2RControlNet.from_config(config)
    return controlnet.to_empty(device="cpu").eval()


def control_start_config(name_or_path: str | Path, backbone_config: dict) -> dict[str, Any]:
    """Return the config of weights that a control branch can start from: of phase 2, or released ones.

    Args:
        name_or_path: best/ or final/ of phase 2, a pipeline folder, or a file of the released C2R.
        backbone_config: config of the backbone.

    Raises:
        InputError: nothing there, damaged, or made for another backbone.
    """
    path = Path(name_or_path)
    if path.is_file():
        return released_config(path, read_released(path), backbone_config)
    folder = _controlnet_folder(path)
    if not folder.is_dir():
        raise InputError(
            f"{name_or_path}: no such folder or file; give best/ or final/ of phase 2, or a released file"
        )
    check_controlnet(folder)
    config = read_controlnet_config(folder)
    for name in SHARED_CONFIG:
        if config.get(name) != backbone_config[name]:
            raise InputError(
                f"{name_or_path}: made for a backbone with {name} {config.get(name)}, this one has "
                f"{backbone_config[name]}; give that backbone"
            )
    return config


def load_control_start(
    name_or_path: str | Path, backbone_config: dict, torch_dtype: torch.dtype | None = None, empty: bool = False
) -> C2RControlNet:
    """Load weights that a control branch can start from, see `control_start_config` and `load_controlnet`."""
    path = Path(name_or_path)
    if empty:
        return _empty_controlnet(control_start_config(path, backbone_config))
    if not path.is_file():
        return load_controlnet(path, torch_dtype)
    return with_stored_dtypes(load_released(path, backbone_config), torch_dtype or torch.float32)


def _controlnet_folder(folder):
    """Return the control branch's folder of a pipeline folder; a phase 2 folder unchanged."""
    folder = complete_folder(folder)
    return folder / "controlnet" if (folder / "controlnet").is_dir() else folder
