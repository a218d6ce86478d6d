"""Datasets at an fsspec address: files are fetched to this machine on first use, into a cache of bounded size.

fsspec's own `filecache` has no such bound: it would keep every video of a dataset that no disk holds.
"""

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

from c2r import InputError

#: What a listing may say of a file's content; its size counts too.
MARKS = ("ETag", "etag", "e_tag", "blob_id", "md5Hash", "content_md5", "checksum", "mtime", "LastModified", "modified")
# A download that has not grown for so long, in seconds, is one that was killed.
STALE = 3600


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
        max_bytes: of all copies there.
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

        Names with ".." and absolute ones are in no listing: nothing outside the folder can be asked for.

        Raises:
            InputError: no such folder, or no access.
        """
        with self._telling(self.address):
            filesystem, root = self._connect()
            listing = filesystem.find(root, detail=True)
        found = {}
        for path, info in listing.items():
            name = str(PurePosixPath(filesystem._strip_protocol(path)).relative_to(root or "/"))
            size = int(info.get("size") or 0)
            mark = repr([size, [str(info[key]) for key in MARKS if info.get(key) is not None]])
            found[name] = RemoteFile(size, int.from_bytes(sha256(mark.encode()).digest()[:8], "big") >> 1)
        return found

    def open(self, name):
        """A seekable binary file object, to look into a file without fetching it."""
        with self._telling(f"{self.address}/{name}"):
            filesystem, root = self._connect()
            return filesystem.open(f"{root}/{name}", "rb")

    @contextmanager
    def fetch(self, name, size, version):
        """The path of a local copy, which stays while the context is open.

        Raises:
            InputError: it cannot be fetched, comes in another length, or has no room within max_bytes.
        """
        key = sha256(repr((self.address, name, size, version)).encode()).hexdigest()[:40]
        path = self.folder / f"{key}{PurePosixPath(name).suffix}"
        while True:
            held = _hold(path)
            if held is not None:
                break
            self._download(name, size, path)
        try:
            now = time.time_ns()  # the system's own mark would be too coarse
            os.utime(path, ns=(now, now))
            yield path
        finally:
            os.close(held)

    def _download(self, name, size, path):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(name, size)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with self._telling(f"{self.address}/{name}"):
                filesystem, root = self._connect()
                filesystem.get_file(f"{root}/{name}", str(aside))
            if aside.stat().st_size != size:
                raise InputError(
                    f"{self.address}/{name}: {aside.stat().st_size} bytes came of {size}; it was cut off, or has "
                    "changed: start again"
                )
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def _make_room(self, name, size):
        """Remove copies that nobody holds, the least recently used first, until `size` more bytes fit."""
        files = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.name.endswith(".tmp") and time.time() - status.st_mtime > STALE:
                    path.unlink()
                else:
                    files.append((status.st_mtime_ns, status.st_size, path))
        used = sum(count for _, count, _ in files)
        for _, count, path in sorted(files):
            if used + size <= self.max_bytes:
                return
            if not path.name.endswith(".tmp") and _remove(path):
                used -= count
        if used + size > self.max_bytes:
            raise InputError(
                f"--video_cache_gb {self.max_bytes / 1e9:g}: {self.address}/{name} of {size / 1e9:.3g} GB does not "
                "fit beside the files in use; raise it"
            )

    @contextmanager
    def _telling(self, what):
        """Network and access errors, of whatever library, in one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{what}: cannot be read ({reason}); check the address, access and network") from error


def _hold(path):
    """A descriptor that keeps a copy from being removed, or None if it is not there."""
    try:
        held = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(held, fcntl.LOCK_SH)
    if os.fstat(held).st_nlink == 0:  # removed between the two
        os.close(held)
        return None
    return held


def _remove(path):
    """Remove a copy unless somebody holds it; whether it is gone."""
    try:
        held = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(held)
