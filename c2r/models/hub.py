"""Find a model in a folder or on the hub, and check it before its weights are read."""

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from pydantic import Field, StringConstraints
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import fingerprint_sorted, library_errors_as_input, read_json
from c2r.models.float8 import FLOAT8, FLOATS, Rounding, dequantise, split_scales
from c2r.models.gguf_weights import GGUFFile

#: File names of a model's weights, without suffix: Diffusers' and transformers'.
STEMS = ("diffusion_pytorch_model", "model")

#: Ending of a file whose weights are quantised, as llama.cpp and ComfyUI-GGUF write them.
GGUF = ".gguf"

#: Ending of a weight's name that only Wan's original layout has.
ORIGINAL_KEY = "head.modulation"

#: Weights in formats other than safetensors, which are never downloaded: a pickle can run code when it is loaded.
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5"]

#: Entries of a config that would run code of a model's author, or load its weights in another way than ours.
REFUSED_ENTRIES = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation")

# Sizes in configs, bounded far above Wan 2.1 14B: a model of any size would take hours to build, even without weights.
Layers = Annotated[int, Field(ge=1, le=100)]
Count = Annotated[int, Field(ge=1, le=1000)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]


class _ShardIndex(TypedDict):
    """A *.safetensors.index.json: which file holds which weight. The files lie beside it."""

    weight_map: dict[str, Annotated[str, StringConstraints(pattern=r"^[\w.-]+\.safetensors$", max_length=255)]]


def resolve_model_folder(name_or_path: str | Path, subfolders: list[str] | None = None) -> Path:
    """Return the local folder of a model: a path unchanged, or a Hugging Face hub name's folder in the hub's cache.

    Args:
        name_or_path: a local folder, or a hub name like `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
        subfolders: required parts; only these and all .json files are downloaded. None: everything but PICKLES.

    Raises:
        InputError: no such folder or hub model, no access to a gated one, hub out of reach, a part missing.
    """
    name, folder = str(name_or_path), Path(name_or_path)
    if os.path.isfile(folder):  # unlike Path.is_file, no error for a name that no file can have
        refuse_pickle(folder)
        raise InputError(f"{name}: this is a file, but a model folder is needed; give the folder that holds it")
    if not os.path.isdir(folder):
        # `outputs/phase1` looks like a hub name too: where its first half is a local folder, it is a mistyped path.
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or os.path.isdir(folder.parent):
            raise InputError(f"{name}: no such model folder; check the path")
        patterns = None if subfolders is None else ["*.json", *(f"{subfolder}/*" for subfolder in subfolders)]
        folder = _download(name, patterns)
    for subfolder in subfolders or []:
        if not (folder / subfolder).is_dir():
            raise InputError(f"{name}: has no {subfolder}/; give a Diffusers pipeline folder of Wan 2.1 T2V")
    for inner in (folder, *(folder / subfolder for subfolder in subfolders or [])):
        _refuse_special_files(inner)
    return folder


def refuse_pickle(path: Path) -> None:
    """Raise InputError for an existing file that has the name of a pickle."""
    if any(path.match(pattern) for pattern in PICKLES):
        raise InputError(f"{path}: files of this kind can hold code and are not read; give the .safetensors weights")


def _refuse_special_files(folder):
    """Refuse pipes and devices, which a library would read without end."""
    for path in folder.iterdir():
        if path.exists() and stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"{path}: neither a file nor a folder; remove it")


def _download(name, patterns):
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=PICKLES))
    except GatedRepoError:
        raise InputError(
            f"{name}: access to these weights is restricted; ask for it at https://huggingface.co/{name}, "
            "then log in with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"{name}: no local folder and no Hugging Face model has this name; check it") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name}: not a local folder, and it cannot be fetched from the Hugging Face hub ({reason}); "
            "check the connection, or download it first and give its folder"
        ) from None


def read_config(folder: str | Path, key: str, needed: str, kind: Any) -> Any:
    """Read a model's config.json.

    Args:
        folder: of the model.
        key: entry that names the model's class: `_class_name` in Diffusers, `model_type` in transformers.
        needed: its value.
        kind: TypedDict of the entries that are checked.

    Returns:
        all entries.

    Raises:
        InputError: it is missing or damaged, of another class, or has one of REFUSED_ENTRIES.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if config.get(key) != needed:
        name = {"_class_name": "class", "model_type": "type"}[key]
        raise InputError(f"{folder}: model {name} is {config.get(key)}, but {needed} is needed; check the path")
    refuse_entries(path, config)
    return read_json(path, kind, extra="allow")


def refuse_entries(path: Path, config: dict[str, Any]) -> None:
    """Raise InputError if a config has one of REFUSED_ENTRIES."""
    for name in REFUSED_ENTRIES:
        if config.get(name) is not None:
            raise InputError(
                f"{path}: has {name}, which is not supported: only the classes of the installed libraries are used, "
                "with unquantized weights; remove the entry, or give another copy"
            )


def require_complete(where: str | Path, missing: Iterable, unfit: Iterable):
    """Check that a model's weights are complete.

    Args:
        where: file or folder, for the message.
        missing: names of missing weights.
        unfit: names of weights that are unexpected or of another shape.

    Raises:
        InputError: naming some of the weights.
    """
    for names, problem in ((missing, "missing"), (unfit, "unexpected or of another shape")):
        names = sorted(str(name) for name in names)
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(
                f"{where}: weights are {problem}: {some}; the file is damaged or of another model, check the path"
            )


class SafetensorsFile:
    """The tensors of a safetensors file, by the names in it. Creating it reads only the header.

    Raises:
        InputError: no such file, or no safetensors.
    """

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({error}); copy or download it again") from None
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Return the type of a tensor, such as BF16."""
        return self._file.get_slice(key).get_dtype()

    def tensor(self, key: str) -> torch.Tensor:
        """Return a tensor."""
        return self._file.get_tensor(key)


class WeightIndex:
    """The tensors of a model's files, by Diffusers' names. Creating it reads only the files' headers.

    Weights in float8 are given in fp32, times their scales; see `c2r.models.float8`.

    Args:
        path: a folder with one safetensors file, or with shards and their index, or one .safetensors or .gguf file.
            Names of Wan's original files are translated, with any prefix, so a model has the same index in all forms.

    Attributes:
        is_original: the files have Wan's original names.
        is_gguf: the path is a .gguf file.
        float8: names of the weights that are stored in float8.
        rounding: of the float8 weights that `tensors` has given.

    Raises:
        InputError: no weights there, a damaged file, or weights that are quantised in a way that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_gguf = self.path.suffix == GGUF
        self._files: dict[str, Any] = {}  # {name in the file: open file}
        metadata: dict[str, str] = {}
        for file in self._find_files():
            if not file.is_file():
                raise InputError(f"{file}: no such file; copy or download it again")
            opened: GGUFFile | SafetensorsFile = GGUFFile(file) if self.is_gguf else SafetensorsFile(file)
            self._files |= dict.fromkeys(opened.keys(), opened)
            metadata |= opened.metadata
        weights, scales = list(self._files), dict[str, str]()
        if not self.is_gguf:
            weights, scales = split_scales(self.path, weights, self._dtype, self._read, metadata)
        self.is_original = any(key.endswith(ORIGINAL_KEY) for key in weights)
        with library_errors_as_input(self.path):
            self._keys = _diffusers_names(weights) if self.is_original else {key: key for key in weights}
        if len(self._keys) < len(weights):
            raise InputError(f"{self.path}: has the same weight under two names; give an undamaged copy")
        self._scales = {name: scales.get(key) for name, key in self._keys.items()}
        self.float8 = [name for name, key in self._keys.items() if self._dtype(key) in FLOAT8]
        self.rounding = Rounding()

    def _find_files(self):
        if self.path.is_file():
            return [self.path]
        for stem in STEMS:
            index = self.path / f"{stem}.safetensors.index.json"
            if index.is_file():
                names = sorted(set(read_json(index, _ShardIndex, extra="allow")["weight_map"].values()))
                return [self.path / name for name in names]
            if (self.path / f"{stem}.safetensors").is_file():
                return [self.path / f"{stem}.safetensors"]
        raise InputError(f"{self.path}: has no safetensors weights; give a folder that save_pretrained wrote")

    def _dtype(self, key):
        return self._files[key].dtype(key)

    def _read(self, key):
        return self._files[key].tensor(key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape}."""
        return {name: self._files[key].shape(key) for name, key in self._keys.items()}

    def types(self) -> dict[str, str]:
        """Return {name: type in the file}, such as BF16, F8_E4M3 or Q4_K."""
        return {name: self._dtype(key) for name, key in self._keys.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return {name: dtype that `tensors` gives it}, fp32 for float8; only of safetensors."""
        return {name: FLOATS.get(type_, torch.float32) for name, type_ in self.types().items()}

    def require_fit(self, model: torch.nn.Module, exactly: bool = True) -> None:
        """Compare names and shapes with those of a model of Diffusers, built without memory on the device "meta".

        Raises:
            InputError: a weight is missing or of another shape, or `exactly`, and the model has no such weight.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = self.shapes()
        unfit = [f"{name} {shape}" for name, shape in found.items() if expected.get(name, shape) != shape]
        unknown = [name for name in found if exactly and name not in expected]
        require_complete(self.path, [name for name in expected if name not in found], unfit + unknown)

    def require_whole(self) -> None:
        """Check that no weight is in float8, for models that a library loads: it would round them in silence.

        Raises:
            InputError: one is.
        """
        if self.float8:
            raise InputError(
                f"{self.path}: {self.float8[0]} is stored in float8, which only the transformer may be; give the "
                "bf16, fp16 or fp32 files of this model"
            )

    def require_enough_for(self, model: torch.nn.Module) -> None:
        """Check that the files can fill a model of transformers, built without memory on the device "meta".

        Names are not compared: transformers renames weights of older files when it loads them.

        Raises:
            InputError: the model has more weights than the files.
        """
        needed = sum(parameter.numel() for parameter in model.parameters())
        found = sum(math.prod(shape) for shape in self.shapes().values())
        if found < needed:
            raise InputError(
                f"{self.path}: its files have {found:,} weights, but its config.json describes a model of {needed:,}; "
                "give an undamaged copy"
            )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) sorted by name, one at a time; quantised weights of a .gguf file as `GGUFParameter`.

        Raises:
            InputError: a float8 weight lacks its scale.
        """
        float8 = set(self.float8)
        for name, key in sorted(self._keys.items()):
            tensor = self._read(key)
            if name in float8:
                self.rounding.add(tensor)
                scale = self._scales[name]
                tensor = dequantise(self.path, key, tensor, None if scale is None else self._read(scale))
            yield name, tensor


def _diffusers_names(keys):
    """Return {Diffusers' name: name in the file} of Wan's original names."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers  # takes 0.3 s, seldom needed

    marker = next(key for key in keys if key.endswith(ORIGINAL_KEY))
    prefix = marker.removesuffix(ORIGINAL_KEY)  # ComfyUI: model.diffusion_model.
    names = {key.removeprefix(prefix): key for key in keys}
    # Diffusers' converter renames the keys of a state dict. Only of these parts of Wan Animate it changes values too.
    others = {name: key for name, key in names.items() if "motion_encoder" in name or "face_adapter" in name}
    return convert_wan_transformer_to_diffusers({n: key for n, key in names.items() if n not in others}) | others


def fingerprint_files(path: str | Path) -> str:
    """Return the `fingerprint` of the weights in a folder or file, without building a model.

    Float8 weights count by the values that they stand for, weights of a .gguf file by the bytes in it and their type.
    """
    return fingerprint_sorted(
        (f"{name} {tensor.quant_type.name}" if hasattr(tensor, "quant_type") else name, tensor)
        for name, tensor in WeightIndex(path).tensors()
    )
