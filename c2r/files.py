"""Files and folders: JSON, atomic writes, safetensors, fingerprints and disk space.

A file or folder written here is complete or absent, even if the process is killed while it writes. What is read here
may come from a stranger: JSON is checked against a type, and a fault is one line that names the file and the entry.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from c2r import InputError, __version__
from c2r.units import size_text

# ---------------------------------------------------------------------------------------------------------------- JSON

#: Far above the index of any model's weights and the state of any run. To check more would take gigabytes.
MAX_JSON_BYTES = 4 * 2**20


def read_json(path: str | Path, kind: Any = dict[str, Any], extra: Literal["forbid", "allow"] = "forbid") -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        kind: type of the content: a dataclass, a TypedDict or a type expression. Types are exact: neither "1" nor True
            is a number.
        extra: whether a dict of `kind` may have entries that it does not name: "forbid" for files of this project,
            "allow" for those of others.

    Raises:
        InputError: the file is missing, too large or not JSON, or an entry is missing, unknown or of another type.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file; check that its folder is the right one")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than {MAX_JSON_BYTES} bytes; replace it by an undamaged copy")
        return parse_json(path.read_bytes(), kind, path, extra)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check that its folder is the right one and complete") from None


def parse_json(text: str | bytes, kind: Any, where: str | Path, extra: Literal["forbid", "allow"] = "forbid") -> Any:
    """Return the content of a JSON document, see `read_json`; `where` names it in errors."""
    try:
        return _adapter(kind).validate_json(text, strict=True, extra=extra)
    except ValidationError as error:
        raise InputError(f"{where}: {_reason(error)}; replace it by an undamaged copy") from None


def _reason(error):
    """Return what is wrong in one line: the first fault, and how many others there are."""
    first, *others = error.errors(include_url=False)
    entry = ".".join(str(key)[:80] for key in first["loc"])
    found = repr(first["input"])
    found = found if len(found) <= 80 else f"{found[:80]}…"
    more = f", and {len(others)} more" if others else ""
    match first["type"]:
        case "json_invalid":
            return f"not valid JSON ({first['ctx']['error']})"
        case "missing":
            return f"has no entry {entry}{more}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"has an unknown entry {entry}{more}"
    return f"{entry and f'entry {entry}: '}{first['msg'].removeprefix('Value error, ')}, not {found}{more}"


#: Builds the validator of a type once: it takes longer than to read a file.
_adapter = cache(TypeAdapter)


@contextmanager
def library_errors_as_input(path: str | Path) -> Iterator[None]:
    """Turn whatever a library raises about a stranger's file into one InputError line.

    Libraries trust a model's files: a damaged one raises any exception, somewhere.

    Args:
        path: the file or folder that is read within the context, and nothing else.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raised = " ".join(f"{type(error).__name__}: {error}".split())
        raised = raised if len(raised) <= 300 else f"{raised[:300]}…"
        raise InputError(f"{path}: cannot be loaded ({raised}); replace it by an undamaged copy") from error


# -------------------------------------------------------------------------------------------------------- atomic files


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is complete or absent, whenever the process dies.

    The temporary file beside it has a unique name and is never read, so one left by a killed process does no harm.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could leave the new name without its content
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: str | Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------ atomic folders


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder under a temporary name and rename it when it is complete.

    Whenever the process dies, `folder` is the old one, the new one or absent, never a part of one. One rename cannot
    replace a folder with content, so there are two, and between them `folder` is absent and the complete old folder is
    called `.<name>.old`: `complete_folder` finds it there, and the next `atomic_folder` renames it back. Only one
    process may write at a time.

    Yields:
        the temporary folder. If the body raises, it is removed and `folder` stays as it was.
    """
    temporary = start_folder(folder)
    try:
        yield temporary
        sync_tree(temporary)
    except BaseException:
        remove_tree(temporary)
        raise
    replace_folder(folder)


def start_folder(folder: str | Path) -> Path:
    """Create the empty `temporary_folder` of a folder that is to be written there; `replace_folder` ends it."""
    folder = Path(os.path.abspath(folder))
    temporary, old = temporary_folder(folder), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    remove_tree(old)
    remove_tree(temporary)  # left by a killed run
    temporary.mkdir(parents=True)
    return temporary


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)


def replace_folder(folder: str | Path) -> None:
    """Rename the complete `temporary_folder` of a folder, in place of an older one."""
    folder = Path(os.path.abspath(folder))
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    temporary_folder(folder).rename(folder)
    sync_file(folder.parent)
    remove_tree(old)


def temporary_folder(folder: str | Path) -> Path:
    """Return the folder that `start_folder` creates on one process; other processes write there too."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f".{folder.name}.tmp")


def remove_tree(path: Path) -> None:
    """Remove a folder with its content if it is there. Of a link the link alone is removed, never what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def refuse_linked_folders(folder: str | Path) -> None:
    """Check that neither a cache folder nor the folders in it are links, which could lead out of a dataset.

    Args:
        folder: need not exist; its folders are checked two levels down, as deep as a cache has them.

    Raises:
        InputError: one is a link.
    """
    levels = [Path(folder)]
    for depth in range(3):
        for path in levels:
            if path.is_symlink():
                raise InputError(f"{path}: a link in a cache; remove it, or give a --cache_dir of your own")
        if depth < 2:
            inner = (os.scandir(path) for path in levels if path.is_dir())
            levels = [Path(e.path) for entries in inner for e in entries if e.is_symlink() or e.is_dir()]


def complete_folder(folder: str | Path) -> Path:
    """Return `folder`, or the old one if `atomic_folder` was killed, or is at this moment, between its two renames.

    A reader renames nothing: the writer may be alive.
    """
    folder = Path(folder)
    old = folder.with_name(f".{folder.name}.old") if folder.name else folder
    return old if old.exists() and not folder.exists() else folder


# --------------------------------------------------------------------------------------------------------- safetensors


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically.

    Args:
        path: the file.
        tensors: on any device.
        metadata: where they come from, as JSON can hold it; the version of this package is added.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**metadata, "version": __version__}, sort_keys=True)
    write_atomic(path, save(tensors, metadata={"c2r": text}))


def load_tensors(
    path: Path, names: Iterable[str] | None = None, metadata: Any = dict[str, Any]
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors and metadata of a cached file, as `save_tensors` wrote it.

    Args:
        path: the file.
        names: of its tensors; None: any.
        metadata: type of the metadata, which may have more entries.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("c2r", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        if not path.exists():
            raise InputError(
                f"{path}: this cached file is missing; run python -m c2r.encode and start again"
            ) from error
        raise damaged_cache_error(path) from error
    if names is not None and tensors.keys() != set(names):
        raise damaged_cache_error(path)
    try:
        return tensors, parse_json(text, metadata, path, extra="allow")
    except InputError as error:
        raise damaged_cache_error(path) from error


def damaged_cache_error(path: Path) -> InputError:
    """Return the error for a cached file whose content does not fit."""
    return InputError(f"{path}: this cached file is damaged; delete it and start again")


def is_complete(path: str | Path, names: Iterable[str]) -> bool:
    """Return True if a safetensors file has its full length and exactly these tensors; only its header is read."""
    try:
        with safe_open(path, framework="pt") as file:  # raises if the length does not agree with the header
            return set(file.keys()) == set(names)
    except (SafetensorError, OSError):
        return False


# -------------------------------------------------------------------------------------------------------- fingerprints


def digest(value: Any) -> str:
    """Return a SHA-256 in hex of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a SHA-256 in hex of the name, dtype, shape and bytes of every tensor, in the order of their names.

    The same values in another dtype have another fingerprint.
    """
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return fingerprint_sorted(sorted(pairs, key=lambda pair: pair[0]))


def fingerprint_sorted(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the `fingerprint` of tensors that come sorted by name and need not all be in memory at once."""
    content = hashlib.sha256()
    for name, tensor in named_tensors:
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- disk

#: Errors of writing a file that no second attempt would repair: of the disk, of permissions and of the path itself.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
)


def write_problem(error: Exception, path: str | Path) -> str:
    """Return in a few words why a path cannot be written.

    Args:
        error: OSError or SafetensorError of the attempt. For a disk without free inodes it says "no space" too.
        path: need not exist.
    """
    problem = getattr(error, "strerror", None) or str(error)
    if os.strerror(errno.ENOSPC) in problem:
        disk = os.statvfs(existing_parent(path))
        if disk.f_files and not disk.f_favail and disk.f_bavail:
            return "No inodes left on device: it has room, but holds too many files"
    return problem


def require_room(path: str | Path, num_bytes: int) -> None:
    """Check that a disk has room for a file or folder that is to be written.

    Raises:
        InputError: it has not.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if num_bytes > free:
        raise InputError(
            f"{path}: {size_text(num_bytes)} needed, {size_text(free)} free; make room, or choose another disk"
        )


def existing_parent(path: str | Path) -> Path:
    """Return the nearest existing folder above a path, or the path itself: its disk is the one to be written to."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
