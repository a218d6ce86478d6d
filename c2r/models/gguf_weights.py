"""Weights in a GGUF file: its header, checked, and its tensors as Diffusers' GGUF quantisation takes them.

The header is read here and not by the package gguf, which believes every count in it: a file of a hundred bytes could
make it loop without end.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from c2r import InputError

#: Bytes of a header, far above those of any video model: names, shapes and types of some thousand tensors.
MAX_HEADER_BYTES = 16 * 2**20

#: Types of weights that are not quantised, and torch's names of them.
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Types of metadata: struct's codes of the numbers; text and lists are read by themselves.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


class GGUFFile:
    """The tensors of a GGUF file, by the names in it. Creating it reads the header alone.

    Raises:
        InputError: the file is damaged, the package gguf is missing, or a type of quantisation is not supported.
    """

    metadata: dict[str, str] = {}  # noqa: RUF012, as a safetensors file has it; none is needed

    def __init__(self, path: Path):
        try:
            import gguf
            from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
        except ImportError:
            raise InputError(f"{path}: needs the package gguf; pip install gguf==0.19.0") from None
        try:
            self._data = np.memmap(path, mode="c")  # copy on write: torch has no tensors that are read-only
            entries, start = _read_header(self._data)
            self._tensors: dict[str, tuple[Any, tuple[int, ...], int, int]] = {}  # type, shape, begin, end
            for name, (number, shape, offset) in entries.items():
                kind = gguf.GGMLQuantizationType(number)
                if kind.name not in PLAIN_TYPES and kind not in SUPPORTED_GGUF_QUANT_TYPES:
                    raise InputError(
                        f"{path}: its weights are in {kind.name}, which Diffusers does not read; give one of Q8_0, "
                        "Q6_K, Q5_K, Q4_K or another of its types"
                    )
                block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
                if math.prod(shape) > len(self._data) * block or not (shape and all(shape)) or shape[-1] % block:
                    raise ValueError(f"tensor {name[:80]} has the impossible shape {shape[:8]}")
                begin = start + offset
                end = begin + math.prod(shape) // block * num_bytes
                if end > len(self._data):
                    raise ValueError(f"tensor {name[:80]} ends after the file")
                self._tensors[name] = kind, shape, begin, end
        except (ValueError, OSError, struct.error) as error:
            raise InputError(f"{path}: cannot be read as GGUF ({error}); copy or download it again") from None

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor once it is dequantised."""
        return self._tensors[key][1]

    def dtype(self, key: str) -> str:
        """Return the type of a tensor, such as F32 or Q4_K."""
        return self._tensors[key][0].name

    def tensor(self, key: str) -> torch.Tensor:
        """Return a tensor: of a quantised one a `GGUFParameter` of Diffusers, whose memory is the file's."""
        kind, shape, begin, end = self._tensors[key]
        raw = torch.from_numpy(np.asarray(self._data[begin:end]))  # uint8
        if kind.name in PLAIN_TYPES:
            return raw.view(PLAIN_TYPES[kind.name]).view(shape)
        from diffusers.quantizers.gguf.utils import GGUFParameter

        return GGUFParameter(raw.view(*shape[:-1], -1), quant_type=kind)


def _read_header(data: np.ndarray) -> tuple[dict[str, tuple[int, tuple[int, ...], int]], int]:
    """Return {name: (type, shape, offset)} and the byte that offsets count from.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        ValueError: the header is damaged.
    """
    reader = _HeaderReader(data)
    if reader.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := reader.number("I")) not in (2, 3):
        raise ValueError(f"version {version}, not 2 or 3")
    num_tensors, num_values = reader.number("Q"), reader.number("Q")
    alignment = 32
    for _ in range(num_values):  # each takes bytes, so a wrong number ends at the end of the file
        name = reader.text()
        value = reader.value(reader.number("I"))
        if name == "general.alignment":
            alignment = value
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}")
    entries = {}
    for _ in range(num_tensors):
        name, num_dimensions = reader.text(), reader.number("I")
        if num_dimensions > 8 or name in entries:
            raise ValueError(f"tensor {name[:80]} is named twice, or has {num_dimensions} dimensions")
        shape = tuple(reversed([reader.number("Q") for _ in range(num_dimensions)]))  # fastest first in the file
        kind, offset = reader.number("I"), reader.number("Q")
        if offset % alignment:
            raise ValueError(f"tensor {name[:80]} is not aligned")
        entries[name] = kind, shape, offset
    return entries, -(-reader.at // alignment) * alignment


class _HeaderReader:
    """Reads one value after another, within the bytes of a file and MAX_HEADER_BYTES."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > min(len(self.data), MAX_HEADER_BYTES):
            raise ValueError("its header is longer than the file, or than any model's")
        taken = self.data[self.at : end].tobytes()
        self.at = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST or depth > 3:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        # The values of lists are not needed.
        if inner in _NUMBERS:
            self.take(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        else:
            for _ in range(count):
                self.value(inner, depth + 1)
        return None


def dequantised(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a `GGUFParameter` as floats, other tensors unchanged."""
    if not hasattr(tensor, "quant_type"):
        return tensor
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(tensor)


def whole_state_dict(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's state dict with dequantised weights, to be loaded into a module that is not quantised."""
    return {name: dequantised(tensor) for name, tensor in module.state_dict().items()}


def quantise_modules(model: torch.nn.Module, types: dict[str, str], compute_dtype: torch.dtype) -> None:
    """Replace matrices of a model without data by quantised ones, as Diffusers does when it loads a .gguf file.

    Args:
        model: on the device "meta", changed in place.
        types: {name of a weight: its type, such as Q4_K}.
        compute_dtype: dtype that the weights are dequantised to.
    """
    if not types:
        return  # the package gguf need not be installed
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for name, type_ in types.items():
        path, _, attribute = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        linear = getattr(parent, attribute)
        kind = gguf.GGMLQuantizationType[type_]
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        quantised = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype, "meta")
        raw = torch.empty(
            linear.out_features, linear.in_features // block * num_bytes, dtype=torch.uint8, device="meta"
        )
        quantised.weight = GGUFParameter(raw, quant_type=kind)
        quantised.bias = linear.bias
        setattr(parent, attribute, quantised.requires_grad_(False))
