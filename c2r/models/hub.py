"""Find a model in a folder or on the hub, and check it before its weights are read."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from c2r import InputError
from c2r.files import fingerprint_sorted, read_json

#: File names of a model's weights, without suffix: Diffusers' and transformers'.
STEMS = ("diffusion_pytorch_model", "model")

#: Weights in formats other than safetensors, which are never downloaded: a pickle can run code when it is loaded.
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5"]


def resolve_model_folder(name_or_path: str | Path, subfolders: list[str] | None = None) -> Path:
    """Return the local folder of a model: a path unchanged, or a Hugging Face hub name's folder in the hub's cache.

    Args:
        name_or_path: a local folder, or a hub name like `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
        subfolders: required parts; only these and all .json files are downloaded. None: everything but PICKLES.

    Raises:
        InputError: no such folder or hub model, no access to a gated one, hub out of reach, a part missing.
    """
    name, folder = str(name_or_path), Path(name_or_path)
    if folder.is_file():
        raise InputError(f"{name}: this is a file, but a model folder is needed; give the folder that holds it")
    if not folder.is_dir():
        # `outputs/phase1` looks like a hub name too: where its first half is a local folder, it is a mistyped path.
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or folder.parent.is_dir():
            raise InputError(f"{name}: no such model folder; check the path")
        patterns = None if subfolders is None else ["*.json", *(f"{subfolder}/*" for subfolder in subfolders)]
        folder = _download(name, patterns)
    for subfolder in subfolders or []:
        if not (folder / subfolder).is_dir():
            raise InputError(f"{name}: has no {subfolder}/; give a Diffusers pipeline folder of Wan 2.1 T2V")
    return folder


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


def require_class(folder: str | Path, class_name: str) -> dict:
    """Check that a Diffusers model folder holds a model of this class; return its config.

    Raises:
        InputError: it holds another class.
    """
    config = read_json(Path(folder) / "config.json")
    if config.get("_class_name") != class_name:
        raise InputError(
            f"{folder}: model class is {config.get('_class_name')}, but a {class_name} is needed; check the path"
        )
    return config


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


class WeightIndex:
    """The tensors of a model's safetensors files, by Diffusers' names. Creating it reads only the files' headers.

    Args:
        path: a folder that `save_pretrained` wrote (one file or shards), or one .safetensors file. Names of Wan's
            original files are translated, so a model has the same index in both forms.

    Raises:
        InputError: no weights there, or a damaged file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Any] = {}  # {name in the file: open file}
        for file in self._find_files():
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file}: cannot be read as safetensors ({error}); copy or download it again"
                ) from None
            self._files |= dict.fromkeys(handle.keys(), handle)
        self._keys = _diffusers_names(self._files)

    def _find_files(self):
        if self.path.is_file():
            return [self.path]
        for stem in STEMS:
            index = self.path / f"{stem}.safetensors.index.json"
            if index.is_file():
                return [self.path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
            if (self.path / f"{stem}.safetensors").is_file():
                return [self.path / f"{stem}.safetensors"]
        raise InputError(f"{self.path}: has no safetensors weights; give a folder that save_pretrained wrote")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape}."""
        return {name: tuple(self._files[key].get_slice(key).get_shape()) for name, key in self._keys.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) sorted by name, one at a time."""
        for name, key in sorted(self._keys.items()):
            yield name, self._files[key].get_tensor(key)


def _diffusers_names(keys):
    """Return {Diffusers' name: name in the file}."""
    if not any(key.endswith("head.modulation") for key in keys):
        return {key: key for key in keys}
    # Diffusers' converter renames the keys of a state dict; their values may be anything.
    return convert_wan_transformer_to_diffusers({key: key for key in keys})


def fingerprint_files(path: str | Path) -> str:
    """Return the `fingerprint` of the weights in a folder or .safetensors file, without building a model."""
    return fingerprint_sorted(WeightIndex(path).tensors())
