"""Wan's original layout of the transformer's weights, as ComfyUI and DiffSynth read it: one file, other names."""

import json
import math
import os
import uuid
from pathlib import Path

import torch

from c2r import InputError, __version__
from c2r.files import require_room, sync_file
from c2r.models.float8 import FLOATS
from c2r.models.hub import WeightIndex

#: Original names of a text-to-video model's modules with a weight and a bias, and of its single tensors.
_MODULES = (
    *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("time_projection.1", "head.head"),
)
_TENSORS = ("head.modulation",)
_BLOCK_MODULES = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    *("norm3", "ffn.0", "ffn.2"),
)
_BLOCK_TENSORS = (
    *(f"{attention}.norm_{part}.weight" for attention in ("self_attn", "cross_attn") for part in "qk"),
    "modulation",
)

_TYPES = {dtype: name for name, dtype in FLOATS.items()}


def original_names(names: list[str]) -> dict[str, str]:
    """Return {Diffusers' name: Wan's original name}: the inverse of Diffusers' converter.

    The converter is applied to all names that a model of so many blocks can have in the original layout.

    Args:
        names: Diffusers' names of a text-to-video transformer's weights.

    Raises:
        ValueError: a name has no original one, or two have the same.
    """
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    num_blocks = 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)
    modules, tensors = [*_MODULES], [*_TENSORS]
    for block in range(num_blocks):
        modules += [f"blocks.{block}.{module}" for module in _BLOCK_MODULES]
        tensors += [f"blocks.{block}.{tensor}" for tensor in _BLOCK_TENSORS]
    originals = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")] + tensors
    converted = convert_wan_transformer_to_diffusers({name: name for name in originals})
    if len(converted) < len(originals):
        raise ValueError("Diffusers' converter gives two original names the same name")
    if unknown := set(names) - converted.keys():
        raise ValueError(f"{', '.join(sorted(unknown)[:3])}: no such weights in Wan's original layout")
    return {name: converted[name] for name in names}


def save_original(index: WeightIndex, path: Path, dtype: torch.dtype | None = None) -> int:
    """Write a transformer's weights as one safetensors file in Wan's original layout, one tensor in memory at a time.

    The file is complete or absent, whenever the process dies.

    Args:
        index: of the weights.
        path: file to write; an older one is replaced.
        dtype: of the weights; None: as they are stored, bit for bit.

    Returns:
        the number of bytes written.

    Raises:
        InputError: the disk has no room, or a weight is beyond the range of `dtype`.
        ValueError: see `original_names`.
    """
    shapes = index.shapes()
    names = original_names(list(shapes))
    dtypes = {name: dtype or stored for name, stored in index.dtypes().items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "c2r": __version__}}
    end = 0
    for name in sorted(shapes):  # the order of `tensors`
        begin, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[names[name]] = {
            "dtype": _TYPES[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    num_bytes = 8 + len(text) + end
    require_room(path, num_bytes)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in index.tensors():
                file.write(_bytes(tensor, dtypes[name], f"{index.path}: {name}"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return num_bytes


def _bytes(tensor, dtype, where):
    cast = tensor.to(dtype).contiguous()
    if cast.dtype != tensor.dtype and not cast.isfinite().all():
        raise InputError(f"{where} has entries beyond the range of {str(dtype).removeprefix('torch.')}; give bf16")
    return cast.reshape(-1).view(torch.uint8).numpy().data
