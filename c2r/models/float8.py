"""Weights stored in 8 bit by ComfyUI and others: float8 with a scale per layer, or without.

Two layouts have scales. In the older, a marker `scaled_fp8` stands in the file, and a layer has `scale_weight` and
sometimes `scale_input` beside its `weight`. In the newer, it has `weight_scale`, sometimes `input_scale`, and
`comfy_quant` with JSON as bytes, or the file's metadata has that JSON as `_quantization_metadata`. In both the weight
is float8 times scale. The scales of inputs serve arithmetic in float8, which is not done here.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import parse_json

#: Names of torch's types by those in a safetensors header.
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
#: Other types that a weight may have.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MARKER = "scaled_fp8"
_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale")
_DESCRIPTION = ".comfy_quant"
#: Buffers of models of transformers that are whole numbers, not weights.
_WHOLE_NUMBERS = ("num_batches_tracked", "position_ids")
#: Entries of a description that do not change what the weight is.
_HARMLESS = ("format", "full_precision_matrix_mult")
_MAX_DESCRIPTION_BYTES = 10_000

#: Root mean square of a weight's entries above which it cannot be a model's: those of Wan 2.1 are below 1, and a
#: weight whose scale is lost reaches float8's maximum, 448.
IMPOSSIBLE_WEIGHT = 4.0
#: Entries of a weight that its rounding is computed from.
_SAMPLE = 1_000_000


class _Layers(TypedDict):
    """The file's metadata `_quantization_metadata`."""

    layers: dict[str, dict]


def split_scales(
    where: Path,
    keys: Iterable[str],
    dtype_of: Callable[[str], str],
    read: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> tuple[list[str], dict[str, str]]:
    """Separate the weights of a file from what describes their quantisation.

    Args:
        where: for messages.
        keys: names of all tensors.
        dtype_of: type of a tensor, as safetensors names it.
        read: reads a tensor; it is called for small ones alone.
        metadata: of the file.

    Returns:
        names of the weights, {name of a weight: name of its scale}.

    Raises:
        InputError: weights are quantised in a way that is not supported.
    """
    keys = list(keys)
    known = set(keys)
    described: dict[str, dict] = {}
    if text := metadata.get("_quantization_metadata"):
        described |= parse_json(text, _Layers, where, extra="allow")["layers"]
    weights, scales = [], {}
    for key in keys:
        layer, _, _ = key.rpartition(".")
        suffix = key[len(layer) :]
        is_described = f"{layer}.weight" in known
        if key.rpartition(".")[2] == _MARKER or (suffix in _UNUSED and is_described):
            continue
        if suffix == _DESCRIPTION and is_described:
            content = read(key) if dtype_of(key) == "U8" else None
            if content is None or content.numel() > _MAX_DESCRIPTION_BYTES:
                raise InputError(f"{where}: {key} is no description of a quantisation; give an undamaged copy")
            described[layer] = parse_json(content.numpy().tobytes(), dict, f"{where}: {key}")
        elif suffix in _SCALES and is_described:
            scales[f"{layer}.weight"] = key
        else:
            weights.append(key)
    for layer, entries in described.items():
        kind = entries.get("format")
        if kind not in ("float8_e4m3fn", "float8_e5m2") or not set(entries) <= set(_HARMLESS):
            raise InputError(
                f"{where}: {layer} is quantised as {kind if isinstance(kind, str) else 'unknown'}"
                f"{' with more steps' if set(entries) - set(_HARMLESS) else ''}, which is not supported; give the "
                "bf16, fp16 or fp8_scaled file of this model"
            )
    for key in weights:
        if dtype_of(key) == "I64" and key.endswith(_WHOLE_NUMBERS):
            continue
        if dtype_of(key) not in (*FLOATS, *FLOAT8):
            raise InputError(
                f"{where}: {key} is stored as {dtype_of(key)}, which is not supported; give the bf16, fp16 or "
                "fp8_scaled file of this model"
            )
    for weight, scale in scales.items():
        if dtype_of(weight) not in FLOAT8 or dtype_of(scale) not in FLOATS:
            raise InputError(
                f"{where}: {weight} is {dtype_of(weight)} with a scale in {dtype_of(scale)}, which is not supported; "
                "give the bf16, fp16 or fp8_scaled file of this model"
            )
    return weights, scales


def dequantise(where: Path, key: str, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return weight · scale in fp32.

    Args:
        where, key: for messages.
        weight: float8, of any shape.
        scale: one number, or one per row; None: the weight was rounded without one.

    Raises:
        InputError: the scale does not fit, or is lost.
    """
    values = weight.float()
    if scale is not None:
        if scale.numel() not in (1, weight.shape[0] if weight.ndim else 1):
            raise InputError(
                f"{where}: {key} has a scale of shape {tuple(scale.shape)}, but is {tuple(weight.shape)}; only one "
                "scale, or one per row, is supported; give the bf16 or fp16 file of this model"
            )
        return values * scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    if values.numel() and values.flatten()[:_SAMPLE].square().mean().sqrt() > IMPOSSIBLE_WEIGHT:
        raise InputError(
            f"{where}: {key} is stored in float8 and its scale is missing: its entries are too large for a model's; "
            "give the file with its scales, or the bf16 or fp16 file"
        )
    return values


class Rounding:
    """Sums up by how much rounding to float8 has changed weights: computed from what they were rounded to."""

    def __init__(self) -> None:
        self.count, self._relative = 0, 0.0

    def add(self, weight: torch.Tensor) -> None:
        """Add a float8 weight.

        The rounding error of an entry is evenly spread over the distance to its neighbours, so its mean square is
        distance² / 12. A scale cancels.
        """
        values = weight.flatten()[:_SAMPLE].float()
        info = torch.finfo(weight.dtype)
        mantissa = -math.log2(info.eps)  # bits
        exponents = values.abs().clamp(min=info.smallest_normal).log2().floor()
        distances = torch.exp2(exponents - mantissa)
        squares = float(values.square().sum())
        self._relative += float(distances.square().sum() / 12) / squares if squares else 0.0
        self.count += 1

    def percent(self) -> float:
        """Return the root mean square of the errors in percent of that of the weights, over all that were added."""
        return 100 * math.sqrt(self._relative / max(self.count, 1))
