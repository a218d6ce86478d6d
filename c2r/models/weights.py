"""Weights on disk: what a safetensors header tells, fingerprints, and folders that are complete or absent."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import SafetensorError, safe_open

from c2r import InputError

#: The file name of a model's weights in a folder, as Diffusers and as transformers have it.
STEMS = ("diffusion_pytorch_model", "model")


def read_json(path):
    """A JSON file of a model folder; an InputError line if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the model folder is incomplete or of another kind") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); the model folder is damaged") from None


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


def fingerprint(named_tensors):
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the names.

    Args:
        named_tensors: a state dict, or an iterable of (name, tensor).

    Returns:
        64 hex digits. The same values in another dtype have another fingerprint.
    """
    named_tensors = named_tensors.items() if hasattr(named_tensors, "items") else named_tensors
    return _digest(sorted(named_tensors, key=lambda named_tensor: named_tensor[0]))


def fingerprint_files(path):
    """`fingerprint` of the weights in a folder or .safetensors file, tensor by tensor, without building a model."""
    return _digest(WeightIndex(path).tensors())


def _digest(sorted_tensors):
    digest = hashlib.sha256()
    for name, tensor in sorted_tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def atomic_folder(folder):
    """Write a folder aside and put it in place when it is complete: `with atomic_folder(path) as temporary: ...`.

    Whenever the process dies, `folder` is the old one, the new one or absent, never half of one. It is absent only
    between two renames, while the complete old folder stands beside it as `.<name>.old`: `complete_folder` finds it
    there, and the next `atomic_folder` puts it back. (One rename cannot replace a folder that is not empty.) One
    process at a time may write.

    Yields:
        the temporary folder to write into. If the body raises, it is removed and `folder` stays as it was.
    """
    folder = Path(os.path.abspath(folder))
    temporary, old = temporary_folder(folder), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync_file(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync_file(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def temporary_folder(folder):
    """Where `atomic_folder` writes it: on several processes one enters it, and the others write there too."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f".{folder.name}.tmp")


def complete_folder(folder):
    """`folder`, or the old one beside it if `atomic_folder` was killed, or is just now, between its renames.

    A reader only looks and moves nothing: the writer may be alive.
    """
    folder = Path(folder)
    old = folder.with_name(f".{folder.name}.old") if folder.name else folder
    return old if old.exists() and not folder.exists() else folder


def sync_file(path):
    """Have a file, or a folder's list of files, on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_parent(path):
    """The nearest folder above a path, or the path itself, that exists: its disk is the one that will be written."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
