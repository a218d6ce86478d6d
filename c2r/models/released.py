"""The released C2R weights: a file with the six tensors of the control adapter, for injection "latent"."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from c2r import InputError
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet
from c2r.models.hub import SafetensorsFile

logger = logging.getLogger(__name__)

#: {name in the file: name in `C2RControlNet`}
NAMES = {
    "temporal_downsample.conv.weight": "control_adapter.temporal_downsample.conv.weight",
    "ln.weight": "control_adapter.norm.weight",
    "ln.bias": "control_adapter.norm.bias",
    "proj.weight": "control_adapter.proj.weight",
    "proj.bias": "control_adapter.proj.bias",
    "gate": "control_adapter.gate",
}


def read_released(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a released file, a .safetensors, or a pickle of which tensors alone are loaded.

    Of a .safetensors file, names and shapes are compared before a tensor is read.

    Returns:
        {name in `C2RControlNet`: tensor in fp32}.

    Raises:
        InputError: it cannot be read, or holds other tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        _require_adapter(path, {key: file.shape(key) for key in file.keys()})  # noqa: SIM118, it is no dict
        tensors = {name: file.tensor(name) for name in NAMES}
    else:
        tensors = _read_pickle(path)
    weights = {key: tensors[name].float() for name, key in NAMES.items()}
    gate = NAMES["gate"]
    weights[gate] = weights[gate].reshape(1)  # a scalar in the file
    return weights


def _read_pickle(path):
    """Return the checked tensors of a pickle."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises any
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: cannot be read as weights ({reason}); copy or download it again") from None
    logger.warning("%s: a pickle, of which tensors alone are loaded; a .safetensors file is safer", path)
    if not isinstance(content, dict):
        content = {type(content).__name__: None}
    _require_adapter(path, {str(name): getattr(tensor, "shape", None) for name, tensor in content.items()})
    for name, tensor in content.items():
        # Others, such as sparse ones, cannot be copied into a model's.
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not (plain and tensor.is_floating_point()):
            raise InputError(f"{path}: {name} is no tensor of plain floats; give the file of the released C2R")
    return content


def _require_adapter(path, found):
    """Check the names and shapes of a file's tensors."""
    if found.keys() != NAMES.keys() or None in found.values():
        names = sorted(found)
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise InputError(
            f"{path}: has {some}, but the released C2R adapter has {', '.join(NAMES)}; give its file, or best/ or "
            "final/ of phase 2"
        )
    shapes = {name: tuple(shape) for name, shape in found.items()}
    kernel, projection = shapes["temporal_downsample.conv.weight"], shapes["proj.weight"]
    feature_dim, dim = (projection[1], projection[0]) if len(projection) == 2 else (0, 0)
    size = kernel[2] if len(kernel) == 5 else 0
    expected = {
        "temporal_downsample.conv.weight": (feature_dim, 1, size, 1, 1),
        "ln.weight": (feature_dim,),
        "ln.bias": (feature_dim,),
        "proj.weight": (dim, feature_dim),
        "proj.bias": (dim,),
        "gate": shapes["gate"] if math.prod(shapes["gate"]) == 1 else (1,),
    }
    unfit = [f"{name} {shapes[name]}" for name, shape in expected.items() if shapes[name] != shape]
    if unfit or size % 2 == 0:
        names = ", ".join(unfit) or f"an even kernel, {kernel}"
        raise InputError(f"{path}: its shapes are not those of an adapter: {names}; give another copy")


def released_config(path: str | Path, weights: dict[str, torch.Tensor], backbone_config: dict) -> dict[str, Any]:
    """Return the config of the `C2RControlNet` of weights from `read_released` on a backbone.

    Raises:
        InputError: they are for another backbone.
    """
    dim, feature_dim = weights[NAMES["proj.weight"]].shape
    size = weights[NAMES["temporal_downsample.conv.weight"]].shape[2]
    width = backbone_config["num_attention_heads"] * backbone_config["attention_head_dim"]
    if dim != width:
        raise InputError(
            f"{path}: made for a backbone of width {dim}, this one has {width}; the released adapter needs Wan 2.1 14B"
        )
    return {name: backbone_config[name] for name in SHARED_CONFIG} | {
        "injection_layers": [],
        "injection": "latent",
        "feature_dim": feature_dim,
        "temporal_stride": size // 2,
    }


#: Format of the released C2R's videos, for its contract. Source: its inference code
FORMAT: dict[str, Any] = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "fps": 16.0,
    "flow_shift": 5.0,
    "conditioning_scale": 1.0,
}


def load_released(path: str | Path, backbone_config: dict) -> C2RControlNet:
    """Load a released file as the control branch of a backbone, in fp32, eval mode, trainable.

    Args:
        path: see `read_released`.
        backbone_config: of the Wan backbone.

    Raises:
        InputError: see `read_released` and `released_config`.
    """
    weights = read_released(path)
    controlnet = C2RControlNet(**released_config(path, weights, backbone_config))
    controlnet.load_state_dict(weights)
    return controlnet.eval()
