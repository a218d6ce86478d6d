"""Files of LoRAs: low-rank changes of layers, W' = W + scale · alpha / rank · B·A, by Hu et al. 2021, section 4.1.

`LoraFile` reads what train_phase1.py --lora_rank has written, or a file of another project in any of the public
layouts, and adds it to a backbone's weights while they are loaded.

A file is added to weights in fp32, and the sum is then cast: a cast to bf16 rounds once, by as much as it rounds W
alone. A change smaller than W's last bit in bf16 survives on average, because fp32 weights lie anywhere between two
bf16 numbers. Added to weights that are bf16 already, it would be lost.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from c2r import InputError
from c2r.files import complete_folder, fingerprint
from c2r.models.float8 import FLOATS
from c2r.models.hub import SafetensorsFile, WeightIndex
from c2r.models.original_layout import original_names

#: The file of a LoRA's folder, by Diffusers' name: `load_lora_weights` of a pipeline takes the folder.
WEIGHTS = "pytorch_lora_weights.safetensors"

_PREFIXES = ("transformer.", "model.diffusion_model.", "diffusion_model.", "base_model.model.", "lora_unet_")
_SUFFIXES = re.compile(
    r"(?P<module>.+?)\.(?:(?P<matrix>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.(?P<part>weight|bias)"
    r"|(?P<other>alpha|diff|diff_b|diff_m))"
)
_MATRICES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
#: Where a difference is added: to weight, bias, or the table of modulations.
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "scale_shift_table"}


#: Types of an alpha, besides FLOATS.
_INTEGERS = {"I8", "U8", "I16", "I32", "I64"}


@dataclass
class _Change:
    """The keys of a file that change one parameter."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    difference: str | None = None
    bias: str | None = None  #: the bias of lora_B, which is scaled as the matrices are


class LoraFile:
    """A LoRA in one .safetensors file, in any of these layouts; creating it reads only the header.

    - Diffusers' and PEFT's: `transformer.blocks.0.attn1.to_q.lora_A.weight`, alpha in the metadata.
    - Wan's original names, as ComfyUI and DiffSynth use them: `diffusion_model.blocks.0.self_attn.q.lora_down.weight`
      or `lora_A`, also with the prefix `model.diffusion_model.` or none, with or without `.alpha`; and `.diff`,
      `.diff_b` and `.diff_m`, by which step-distilled LoRAs change norms, biases and modulations.
    - musubi-tuner's and kohya's: `lora_unet_blocks_0_self_attn_q.lora_down.weight`.

    Args:
        path: the file, or a folder with a file WEIGHTS.
        scale: factor of the whole LoRA.

    Raises:
        InputError: no such file, or no safetensors.
    """

    def __init__(self, path: str | Path, scale: float = 1.0):
        path = Path(path)
        self.path = complete_folder(path) / WEIGHTS if complete_folder(path).is_dir() else path
        self.scale = scale
        if not self.path.is_file():
            raise InputError(f"{path}: no LoRA here; give a .safetensors file, or a folder with {WEIGHTS}")
        self._file = SafetensorsFile(self.path)
        keys = self._file.keys()
        self._shapes = {key: self._file.shape(key) for key in keys}
        # In other types a tensor might need a scale that is not known here.
        other = {self._file.dtype(key) for key in keys if not key.endswith(".alpha")} - FLOATS.keys()
        other |= {self._file.dtype(key) for key in keys} - FLOATS.keys() - _INTEGERS
        if other:
            raise InputError(
                f"{self.path}: has tensors in {', '.join(sorted(other))}; give a LoRA in bf16, fp16 or fp32"
            )
        self._changes: dict[str, _Change] = {}
        self._alpha = self._metadata_alpha()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the file's tensors by their own names."""
        return {key: self._file.tensor(key) for key in self._shapes}

    def sha256(self) -> str:
        """Return the `fingerprint` of the file's tensors."""
        return fingerprint(self.tensors())

    def match(self, shapes: Mapping[str, tuple[int, ...]]) -> "LoraFile":
        """Assign the file's tensors to the parameters of a backbone; return the file.

        Args:
            shapes: {parameter by Diffusers' name: shape}.

        Raises:
            InputError: a tensor has no parameter, or does not fit it. It names some.
        """
        found: dict[str, _Change] = defaultdict(_Change)
        unknown, unfit = [], []
        modules = self._modules(shapes)
        for key, shape in self._shapes.items():
            parsed = _SUFFIXES.fullmatch(_without_prefix(key))
            name = modules.get(parsed["module"]) if parsed else None
            if parsed is None or name is None:
                unknown.append(key)
                continue
            part = "weight" if parsed["part"] or parsed["other"] == "alpha" else _DIFFERENCES[parsed["other"]]
            role = parsed["other"] or _MATRICES[parsed["matrix"]]
            if role == "up" and parsed["part"] == "bias":
                part, role = "bias", "bias"
            elif parsed["part"] == "bias":
                unknown.append(key)
                continue
            role = "difference" if role in _DIFFERENCES else role
            target = f"{name}.{part}" if name else part
            if target not in shapes:
                unknown.append(key)
            elif getattr(found[target], role) is not None:
                unfit.append(f"{key} twice")
            else:
                setattr(found[target], role, key)
                if role in ("difference", "bias") and shape != shapes[target]:
                    unfit.append(f"{key} {shape}")
        for target, change in found.items():
            unfit += self._misfits(change, shapes[target])
            if change.bias is not None and found.get(_weight_of(target), _Change()).down is None:
                unfit.append(f"{change.bias} without matrices")
        for names, problem in ((unknown, "the backbone has no such layers"), (unfit, "tensors do not fit")):
            if names:
                some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise InputError(f"{self.path}: {problem}: {some}; give a LoRA of Wan 2.1 text to video of this size")
        if not found:
            raise InputError(f"{self.path}: has no tensors; give a LoRA")
        self._changes = dict(found)
        return self

    def _modules(self, shapes):
        """Return {module as the file names it: Diffusers' name}; "" is the transformer itself."""
        own = {name.rpartition(".")[0] for name in shapes}
        # Modulations too: original "blocks.0" and "head", Diffusers' "blocks.0" and "".
        original = {to.rpartition(".")[0]: name.rpartition(".")[0] for name, to in original_names([*shapes]).items()}
        if any(key.startswith("lora_unet_") for key in self._shapes):
            return {name.replace(".", "_"): to for name, to in original.items()}
        # Norms have the same names in both layouts and mean different ones; these parts of names are Diffusers' alone.
        diffusers = (".attn1.", ".attn2.", ".ffn.net.", "condition_embedder.", "proj_out.")
        if not any(part in key for key in self._shapes for part in diffusers):
            return original
        return {name: name for name in own}

    def _misfits(self, change, shape):
        """Yield what is wrong with the matrices of a change of a parameter of this shape."""
        if (change.down is None) != (change.up is None):
            yield f"{change.down or change.up} alone"
        elif change.down is not None:
            down, up = self._shapes[change.down], self._shapes[change.up]
            if len(shape) != 2 or len(down) != 2 or len(up) != 2 or (up[0], down[1]) != shape or up[1] != down[0]:
                yield f"{change.down} {down} and {change.up} {up} for {shape}"
            elif not 0 < down[0] <= max(shape):
                yield f"{change.down} of rank {down[0]} for {shape}"
        elif change.alpha is not None:
            yield f"{change.alpha} without matrices"
        if change.alpha is not None and math.prod(self._shapes[change.alpha]) != 1:
            yield f"{change.alpha} {self._shapes[change.alpha]}"

    def _metadata_alpha(self):
        """Return alpha / rank from the metadata that Diffusers writes; 1 without it."""
        text = self._file.metadata.get(LORA_ADAPTER_METADATA_KEY)
        if text is None:
            return 1.0
        try:
            entries = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
            if any(entries.get(name) for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")):
                raise ValueError("ranks or scales that differ between layers")
            rank, alpha = float(entries["r"]), float(entries["lora_alpha"])
            if not (rank > 0 and math.isfinite(alpha)):
                raise ValueError(f"r {rank:g} and lora_alpha {alpha:g}")
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(
                f"{self.path}: its metadata {LORA_ADAPTER_METADATA_KEY} is not supported ({error}); give another file"
            ) from None
        return alpha / rank

    def _factor(self, change):
        """Return scale · alpha / rank of a change."""
        if change.alpha is None:
            return self.scale * self._alpha
        return self.scale * float(self._file.tensor(change.alpha)) / self._shapes[change.down][0]

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a parameter with this LoRA, in fp32; one that the file does not change as it is.

        Args:
            name: Diffusers' name.
            weight: of a float dtype.

        Raises:
            InputError: the result is not finite.
        """
        change = self._changes.get(name)
        if change is None:
            return weight
        # In fp64, so that the sum rounded to fp32 does not depend on the order in which a library adds.
        total = weight.double()
        if change.down is not None:
            down, up = (self._file.tensor(key).double() for key in (change.down, change.up))
            total = torch.addmm(total, up, down, alpha=self._factor(change))
        if change.difference is not None:
            total = total + self.scale * self._file.tensor(change.difference).double()
        if change.bias is not None:
            factor = self._factor(self._changes[_weight_of(name)])
            total = total + factor * self._file.tensor(change.bias).double()
        total = total.float()
        if not total.isfinite().all():
            raise InputError(f"{self.path}: with it {name} is not finite; give an undamaged file, or a lower scale")
        return total


def _weight_of(bias):
    """Return the name of the weight beside a bias."""
    return f"{bias.removesuffix('bias')}weight"


def _without_prefix(key):
    """Return a key without the prefix of its layout."""
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


class WeightIndexWithLoras(WeightIndex):
    """The tensors of a backbone's files with LoRAs added to them.

    Args:
        path: see `WeightIndex`.
        loras: may be empty.

    Raises:
        InputError: see `WeightIndex` and `LoraFile.match`; or a LoRA for a .gguf file.
    """

    def __init__(self, path: str | Path, loras: Iterable[LoraFile] = ()):
        super().__init__(path)
        loras = list(loras)
        if loras and self.is_gguf:
            raise InputError(
                f"{path}: its weights are quantised, so no LoRA can be added to them; give the bf16, fp16 or fp32 "
                ".safetensors file"
            )
        self.loras = [lora.match(self.shapes()) for lora in loras]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) sorted by name; a tensor that a LoRA changes is in fp32."""
        for name, tensor in super().tensors():
            for lora in self.loras:
                tensor = lora.add_to(name, tensor)
            yield name, tensor
