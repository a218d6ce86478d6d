"""Files and folders that are complete or absent, safe JSON and safetensors, and fingerprints."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from c2r import InputError

#: Why a file cannot be written, where no other attempt would help.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def digest(value) -> str:
    """SHA-256 hex of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomic(path: Path, data: bytes):
    """Write a file so that it is complete or absent, whenever the process dies.

    The temporary file has a name of its own and is never read, so what a killed process leaves does no harm.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power failure could leave the name without its content
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors, metadata):
    """Write tensors (on any device) and their provenance (a dict) atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(tensors, metadata={"c2r": json.dumps(metadata, sort_keys=True)}))


def is_complete(path: Path, names) -> bool:
    """Whether a cache file is there with its tensors `names` and in its full length. Reads its header alone."""
    try:
        with safe_open(path, framework="pt") as file:  # refuses a file whose length its header does not explain
            return set(file.keys()) == set(names)
    except (SafetensorError, OSError):
        return False


def load_tensors(path: Path):
    """(tensors, provenance) of a cache file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("c2r", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        state = "damaged" if path.exists() else "missing"
        raise InputError(f"{path}: this cached clip is {state}; run python -m c2r.encode again") from error


def read_json(path):
    """A JSON file of a model folder; an InputError line if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the model folder is incomplete or of another kind") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); the model folder is damaged") from None


def fingerprint(named_tensors):
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the names.

    Args:
        named_tensors: a state dict, or an iterable of (name, tensor).

    Returns:
        64 hex digits. The same values in another dtype have another fingerprint.
    """
    named_tensors = named_tensors.items() if hasattr(named_tensors, "items") else named_tensors
    return _digest(sorted(named_tensors, key=lambda named_tensor: named_tensor[0]))


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
