"""Find a model in a folder or on the hub, and check it before its weights are read."""

import re
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from c2r import InputError
from c2r.files import _digest, read_json

#: The file name of a model's weights in a folder, as Diffusers and as transformers have it.
STEMS = ("diffusion_pytorch_model", "model")


class WeightIndex:
    """The tensors of a model's safetensors files, by Diffusers' names; nothing is read but the headers.

    Args:
        path: a folder that `save_pretrained` wrote (one file or shards), or one .safetensors file. Names of Wan's
            original files are translated, so a model has the same index in both forms.

    Raises:
        InputError: no weights there, or a damaged file.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._files = {}
        for file in self._find_files():
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file}: cannot be read as safetensors ({error}); copy or download it anew"
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

    def shapes(self):
        """{name: shape tuple}."""
        return {name: tuple(self._files[key].get_slice(key).get_shape()) for name, key in self._keys.items()}

    def tensors(self):
        """Yield (name, tensor) in the order of the names, one at a time."""
        for name, key in sorted(self._keys.items()):
            yield name, self._files[key].get_tensor(key)


def _diffusers_names(keys):
    """{Diffusers' name: key in the file}; the names of a Diffusers file are its keys."""
    if not any(key.endswith("head.modulation") for key in keys):
        return {key: key for key in keys}
    return convert_wan_transformer_to_diffusers({key: key for key in keys})  # it renames keys, whatever they hold


def fingerprint_files(path):
    """`fingerprint` of the weights in a folder or .safetensors file, tensor by tensor, without building a model."""
    return _digest(WeightIndex(path).tensors())


PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5"]


def resolve_model_folder(name_or_path, subfolders=None):
    """The local folder of a model: a path as it is, or a Hugging Face hub name through the hub's cache.

    Args:
        name_or_path: a local folder, or a hub name like `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
        subfolders: the parts that are needed: these and every .json file are downloaded, and each part must be there.
            None: everything.

    Returns:
        `Path` of the folder that holds the model (and each of `subfolders`).

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
            f"{name}: not a local folder, and it cannot be had from the Hugging Face hub ({reason}); "
            "check the connection, or download it first and give its folder"
        ) from None


def require_complete(where, missing, unfit):
    """Raise an InputError that names some of the weights that are missing or of another shape, if there are any."""
    for names, what in ((missing, "missing"), (unfit, "unexpected or of another shape")):
        names = sorted(str(name) for name in names)
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{where}: weights are {what}: {some}; the file is damaged or of another model")


def require_class(folder, class_name):
    """Check `_class_name` of a Diffusers model folder; returns its config."""
    config = read_json(Path(folder) / "config.json")
    if config.get("_class_name") != class_name:
        raise InputError(f"{folder}: this is a {config.get('_class_name')}, but a {class_name} is needed")
    return config
