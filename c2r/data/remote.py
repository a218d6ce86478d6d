"""Datasets at an fsspec address: files are fetched to this machine on first use, into a cache of limited size.

fsspec's own `filecache` has no limit: it would keep every video, more than a disk may hold.

    <cache_dir>/videos/ab12….mp4             a complete copy; every reader holds a shared lock on it
    <cache_dir>/videos/.ab12….mp4.<id>.part  a reservation: empty, but as long as the file that is being downloaded;
                                             the downloading process holds a lock on it
    <cache_dir>/videos/.ab12….mp4.<id>.tmp   the download itself: apart from the reservation, because a filesystem may
                                             replace the file that it writes to, and the lock would be lost
    <cache_dir>/videos/.lock                 locked while copies are removed, reserved or renamed
"""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem

from c2r import InputError

#: Keys of a listing's entries that change with a file's content, by filesystem.
MARKS = (
    *("ETag", "etag", "e_tag", "blob_id", "sha", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "CRC"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "modify", "updated"),
)


class ListedFile(NamedTuple):
    """A file in a listing."""

    size: int  # bytes
    version: int  # changes with the listing's MARKS of the file, and with its size


def is_remote(address: str | Path) -> bool:
    """Return True if a dataset is at an fsspec address, False if it is in a folder."""
    return "://" in str(address)


class RemoteFolder:
    """A folder at an fsspec address. It can be pickled, and used by many processes at once.

    Args:
        address: such as hf://datasets/user/name or s3://bucket/folder.
        cache_dir: copies go to videos/ in it.
        max_bytes: limit of all copies there, downloads under way included.
    """

    def __init__(self, address: str, cache_dir: str | Path, max_bytes: int):
        self.address, self.folder, self.max_bytes = str(address).rstrip("/"), Path(cache_dir) / "videos", max_bytes

    def _connect(self) -> tuple[AbstractFileSystem, str]:
        """Return the filesystem and the folder's path on it.

        Called for each access: a connection does not survive a fork, and fsspec makes a new one in the child.
        """
        filesystem, root = fsspec.core.url_to_fs(self.address)
        return filesystem, root.rstrip("/")

    @cached_property
    def files(self) -> dict[str, ListedFile]:
        """{name within the folder: its entry} of one listing.

        Names that are absolute or contain ".." are left out, and so are links that lead out of a folder of this
        machine: nothing outside the folder can be fetched.

        Raises:
            InputError: no such folder, nothing in it, or no access.
        """
        with self.raise_input_errors(self.address):
            filesystem, root = self._connect()
            listing = filesystem.find(root, detail=True)
            real_root = Path(root).resolve() if _is_local(filesystem) else None
            found = {}
            for path, info in listing.items():
                folder, name = path[: len(root) + 1], path[len(root) + 1 :]
                # A web page links to other folders too, and a key in a bucket may hold any characters.
                if folder != f"{root}/" or not _is_inside(name):
                    continue
                if real_root and not Path(path).resolve().is_relative_to(real_root):
                    continue
                if info.get("size") is None:  # links of a web page
                    with suppress(FileNotFoundError):  # a dead link
                        found[name] = _listed_file(filesystem.info(path))
                else:
                    found[name] = _listed_file(info)
        if not found:
            raise InputError(f"{self.address}: no files there; check the address")
        return found

    def open(self, name: str) -> "RemoteStream":
        """Open a file for reading without fetching all of it."""
        with self.raise_input_errors(f"{self.address}/{name}"):
            filesystem, path = self._locate(name)
            return RemoteStream(filesystem.open(path, "rb"))

    def _locate(self, name: str) -> tuple[AbstractFileSystem, str]:
        if not _is_inside(name):
            raise InputError(f"{self.address}/{name}: leads out of the dataset's folder; correct its metadata")
        filesystem, root = self._connect()
        return filesystem, f"{root}/{name}"

    @contextmanager
    def fetch(self, name: str, size: int, version: int) -> Iterator[Path]:
        """Give the path of a local copy, which is not removed while the context is open.

        Args:
            name: the file's name within the folder.
            size, version: as in `ListedFile`.

        Raises:
            InputError: it cannot be fetched, has another length than listed, or does not fit within max_bytes.
        """
        key = sha256(repr((self.address, name, size, version)).encode()).hexdigest()[:40]
        path = self.folder / f"{key}{PurePosixPath(name).suffix}"
        while (copy := _open_shared(path)) is None and (copy := self._download(name, size, path)) is None:
            pass
        try:
            now = time.time_ns()  # os.utime's default has too coarse a resolution to order copies by
            with suppress(PermissionError):  # another user's copy
                os.utime(copy, ns=(now, now))
            yield path
        finally:
            os.close(copy)

    def _download(self, name: str, size: int, path: Path) -> int | None:
        """Download a file to its place in the cache.

        Returns:
            a descriptor that keeps the new copy from being removed; None if another process has downloaded the file,
            or has tried to.
        """
        reservation = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        lock = self._reserve(reservation, name, size, path)
        if lock is None:
            return None
        partial = reservation.with_suffix(".tmp")
        try:
            with self.raise_input_errors(f"{self.address}/{name}"):
                filesystem, remote_path = self._locate(name)
                filesystem.get_file(remote_path, str(partial))
            received = partial.stat().st_size
            if received != size:
                raise InputError(
                    f"{self.address}/{name}: {received} bytes received instead of {size}: the download was cut off, "
                    "the file has changed, or its server does not give its size; start again, or copy the dataset "
                    "to this machine"
                )
            with self._locked():
                copy = _open_shared(partial)  # before the rename, so that no process can remove the copy in between
                os.replace(partial, path)
                reservation.unlink()
            return copy
        finally:
            partial.unlink(missing_ok=True)
            reservation.unlink(missing_ok=True)
            os.close(lock)

    def _reserve(self, reservation: Path, name: str, size: int, path: Path) -> int | None:
        """Reserve room for a download, after removing copies if necessary.

        Returns:
            a descriptor to hold during the download; None if another process has downloaded the file, or has tried to,
            after waiting for it.
        """
        if size > self.max_bytes:
            raise self._no_room_error(name, size)
        with self._locked():
            if path.exists():
                return None
            other = self._make_room(name, size, path)
            if other is None:
                lock = os.open(reservation, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                fcntl.flock(lock, fcntl.LOCK_EX)
                os.truncate(lock, size)
                return lock
        try:
            fcntl.flock(other, fcntl.LOCK_SH)
        finally:
            os.close(other)
        return None

    def _make_room(self, name: str, size: int, path: Path) -> int | None:
        """Make room for `size` more bytes.

        Remains of killed downloads are removed first, then copies without readers, the least recently used first.

        Returns:
            a descriptor of another process's reservation for the same file; None if there is none, and now room.
        """
        copies, used = [], 0
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a download that fails removes its own files
                if file.suffix == ".tmp":
                    if not file.with_suffix(".part").exists():
                        file.unlink()
                elif file.suffix == ".part" and _remove_unlocked(file):
                    file.with_suffix(".tmp").unlink()
                elif file.name.startswith(f".{path.name}."):
                    return os.open(file, os.O_RDONLY)
                elif file.name != ".lock":
                    status = file.stat()
                    used += status.st_size
                    if file.suffix != ".part":
                        copies.append((status.st_mtime_ns, status.st_size, file))
        for _, count, file in sorted(copies):
            if used + size <= self.max_bytes:
                break
            if _remove_unlocked(file):
                used -= count
        if used + size > self.max_bytes:
            raise self._no_room_error(name, size)
        return None

    def _no_room_error(self, name: str, size: int) -> InputError:
        return InputError(
            f"--video_cache_gb {self.max_bytes / 1e9:g}: {self.address}/{name} of {size / 1e9:.3g} GB does not "
            "fit beside the files in use; raise it"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against processes that remove, reserve or rename copies. Never held during a download."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def raise_input_errors(self, address: str) -> Iterator[None]:
        """Turn errors of network, access and disk into an InputError that names `address`.

        Every filesystem's library has exceptions of its own.
        """
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"{self.folder}: no room on the disk for {address}; make room, or lower --video_cache_gb"
                ) from error
            raise InputError(f"{address}: cannot be read ({reason}); check the address, access and network") from error


class RemoteStream:
    """A seekable binary file that remembers the error that reading it has raised.

    A decoder may hide such an error: it goes on with the data that it has, or raises an error of its own.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: Exception | None = None

    def __enter__(self) -> "RemoteStream":
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.error = error
            raise

    def seek(self, offset: int, origin: int = 0, /) -> int:
        return self._file.seek(offset, origin)

    def tell(self) -> int:
        return self._file.tell()


def _is_local(filesystem: AbstractFileSystem) -> bool:
    """Return True if the files are on this machine, also behind a cache such as simplecache::file://."""
    while isinstance(filesystem, CachingFileSystem):
        filesystem = filesystem.fs
    return isinstance(filesystem, LocalFileSystem)


def _is_inside(name: str) -> bool:
    """Return True if a name is that of a file within a folder, without empty, "." or ".." parts."""
    return not {"", ".", ".."} & set(name.split("/"))


def _listed_file(info: dict[str, Any]) -> ListedFile:
    """Read size and version from a listing's entry."""
    size = int(info.get("size") or 0)
    marks = [str(info[key]) for key in MARKS if info.get(key) is not None]
    # `created` is the last resort: on a local disk it changes with permissions too, but memory:// has no other mark.
    mark = repr([size, marks or [str(info[key]) for key in ("created",) if key in info]])
    return ListedFile(size, int.from_bytes(sha256(mark.encode()).digest()[:8], "big") >> 1)


def _open_shared(path: Path) -> int | None:
    """Open a copy with a shared lock, which keeps it from being removed; None if there is no copy."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    os.close(descriptor)  # removed between opening and locking
    return None


def _remove_unlocked(path: Path) -> bool:
    """Remove a file if no process holds a lock on it. Return True if the file is gone."""
    try:
        # Shared filesystems may emulate these locks by ones that are exclusive for writers only, so O_RDONLY is not
        # enough.
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
