"""Datasets at an fsspec address: files are fetched to this machine on first use, into a cache of bounded size.

fsspec's own `filecache` has no such bound: it would keep every video of a dataset that no disk holds.

    <cache_dir>/videos/ab12….mp4             a copy, whole; who reads it holds a shared lock
    <cache_dir>/videos/.ab12….mp4.<id>.part  a download under way: empty, but as long as the file will be, and locked
    <cache_dir>/videos/.ab12….mp4.<id>.tmp   what has come of it; its writer may replace it, which would lose a lock
    <cache_dir>/videos/.lock                 locked while copies are removed, announced or named
"""

import errno
import fcntl
import os
import time
import uuid
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from c2r import InputError

#: What a listing may say of a file's content; its size counts too.
MARKS = (
    *("ETag", "etag", "e_tag", "blob_id", "sha", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "CRC"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "modify", "updated"),
)


class RemoteFile(NamedTuple):
    """A file in a listing."""

    size: int  # bytes
    version: int  # changes with the content, as far as the listing tells; where it has no mark, with the size alone


def is_remote(address) -> bool:
    """Whether a dataset is at an address and not in a folder."""
    return "://" in str(address)


class RemoteFolder:
    """A folder at an fsspec address. It may be pickled, and used by many processes at once.

    Args:
        address: such as hf://datasets/user/name or s3://bucket/folder.
        cache_dir: copies go to videos/ in it.
        max_bytes: of all copies there, those under way included.
    """

    def __init__(self, address, cache_dir, max_bytes):
        self.address, self.folder, self.max_bytes = str(address).rstrip("/"), Path(cache_dir) / "videos", max_bytes

    def _connect(self):
        # fsspec makes a new connection in each process: one does not outlive a fork.
        filesystem, root = fsspec.core.url_to_fs(self.address)
        return filesystem, root.rstrip("/")

    @cached_property
    def files(self) -> dict[str, RemoteFile]:
        """{name within the folder: RemoteFile} of one listing.

        Names with ".." and absolute ones are in no listing, nor are links that lead out of a folder of this machine:
        nothing outside the folder can be asked for.

        Raises:
            InputError: no such folder, nothing in it, or no access.
        """
        with self.telling(self.address):
            filesystem, root = self._connect()
            listing = filesystem.find(root, detail=True)
            # Of a folder of this machine, links may lead out of it.
            real_root = Path(root).resolve() if isinstance(filesystem, LocalFileSystem) else None
            found = {}
            for path, info in listing.items():
                folder, name = path[: len(root) + 1], path[len(root) + 1 :]
                # A web page links to other folders too, and a key in a bucket may hold any characters.
                if folder != f"{root}/" or not _is_inside(name):
                    continue
                if real_root and not Path(path).resolve().is_relative_to(real_root):
                    continue
                if info.get("size") is None:  # a web page's links
                    with suppress(FileNotFoundError):  # one that leads nowhere is no file
                        found[name] = _describe(filesystem.info(path))
                else:
                    found[name] = _describe(info)
        if not found:
            raise InputError(f"{self.address}: no files there; check the address")
        return found

    def open(self, name):
        """A `_RemoteObject`, to look into a file without fetching it."""
        with self.telling(f"{self.address}/{name}"):
            filesystem, path = self._locate(name)
            return _RemoteObject(filesystem.open(path, "rb"))

    def _locate(self, name):
        if not _is_inside(name):
            raise InputError(f"{self.address}/{name}: leads out of the dataset's folder; mend its metadata")
        filesystem, root = self._connect()
        return filesystem, f"{root}/{name}"

    @contextmanager
    def fetch(self, name, size, version):
        """The path of a local copy, which stays while the context is open.

        Raises:
            InputError: it cannot be fetched, comes in another length, or has no room within max_bytes.
        """
        key = sha256(repr((self.address, name, size, version)).encode()).hexdigest()[:40]
        path = self.folder / f"{key}{PurePosixPath(name).suffix}"
        while (held := _hold(path)) is None and (held := self._download(name, size, path)) is None:
            pass
        try:
            now = time.time_ns()  # the system's own mark would be too coarse
            with suppress(PermissionError):  # another user's copy
                os.utime(held, ns=(now, now))
            yield path
        finally:
            os.close(held)

    def _download(self, name, size, path):
        """A descriptor that holds the new copy; None if another process has fetched it, or has tried: look again."""
        announced = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        lock = self._announce(announced, name, size, path)
        if lock is None:
            return None
        aside = announced.with_suffix(".tmp")
        try:
            with self.telling(f"{self.address}/{name}"):
                filesystem, there = self._locate(name)
                filesystem.get_file(there, str(aside))
            if aside.stat().st_size != size:
                raise InputError(
                    f"{self.address}/{name}: {aside.stat().st_size} bytes came of {size}; it was cut off, or has "
                    "changed: start again; or its server names no size: copy the dataset to this machine"
                )
            with self._alone():
                held = _hold(aside)  # before it has its name: nobody may remove it in between
                os.replace(aside, path)
                announced.unlink()
            return held
        finally:
            aside.unlink(missing_ok=True)
            announced.unlink(missing_ok=True)
            os.close(lock)

    def _announce(self, announced, name, size, path):
        """Make room for a download and take it: a descriptor that is held while it lasts.

        Returns None after waiting for another process that was fetching the same file.
        """
        if size > self.max_bytes:
            raise self._no_room(name, size)
        with self._alone():
            if path.exists():
                return None
            other = self._make_room(name, size, path)
            if other is None:
                lock = os.open(announced, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                fcntl.flock(lock, fcntl.LOCK_EX)
                os.truncate(lock, size)
                return lock
        try:
            fcntl.flock(other, fcntl.LOCK_SH)
        finally:
            os.close(other)
        return None

    def _make_room(self, name, size, path):
        """Make `size` more bytes fit: remove what killed downloads left, then copies that nobody holds, the least
        recently used first.

        Returns:
            A descriptor of another process's download of the same file; None if there is none, and room.
        """
        copies, used = [], 0
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a download that fails meanwhile removes its own
                if file.suffix == ".tmp":
                    if not file.with_suffix(".part").exists():
                        file.unlink()
                elif file.suffix == ".part" and _remove(file):
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
            if _remove(file):
                used -= count
        if used + size > self.max_bytes:
            raise self._no_room(name, size)
        return None

    def _no_room(self, name, size):
        return InputError(
            f"--video_cache_gb {self.max_bytes / 1e9:g}: {self.address}/{name} of {size / 1e9:.3g} GB does not "
            "fit beside the files in use; raise it"
        )

    @contextmanager
    def _alone(self):
        """No other process removes, announces or names a copy meanwhile; short, no download within."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def telling(self, what):
        """Network and access errors, of whatever library, and a full disk, in one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"{self.folder}: no room on the disk for {what}; make room, or lower --video_cache_gb"
                ) from error
            raise InputError(f"{what}: cannot be read ({reason}); check the address, access and network") from error


class _RemoteObject:
    """A seekable binary file that keeps the error which reading it has raised: a decoder goes on with what it has, or
    raises one of its own."""

    def __init__(self, file):
        self._file, self.error = file, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, *size):
        try:
            return self._file.read(*size)
        except Exception as error:
            self.error = error
            raise

    def seek(self, *place):
        return self._file.seek(*place)

    def tell(self):
        return self._file.tell()


def _is_inside(name):
    """Whether a name is one of a file within a folder, in the one way of writing it."""
    return not {"", ".", ".."} & set(name.split("/"))


def _describe(info):
    """RemoteFile of a listing's entry."""
    size = int(info.get("size") or 0)
    marks = [str(info[key]) for key in MARKS if info.get(key) is not None]
    # Of a file of this machine `created` changes with its rights too; memory:// has nothing else.
    mark = repr([size, marks or [str(info[key]) for key in ("created",) if key in info]])
    return RemoteFile(size, int.from_bytes(sha256(mark.encode()).digest()[:8], "big") >> 1)


def _hold(path):
    """A descriptor that keeps a copy from being removed, or None if it is not there."""
    try:
        held = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(held, fcntl.LOCK_SH)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(held), os.stat(path)):
            return held
    os.close(held)  # removed between the two
    return None


def _remove(path):
    """Remove a file unless somebody holds it; whether it is gone."""
    try:
        # A shared folder may emulate these locks by ones that are exclusive for writers alone: hence not O_RDONLY.
        held = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(held)
