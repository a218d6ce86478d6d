"""Where a dataset is: a folder of this machine, or an fsspec address (`c2r.data.remote`); both look alike here."""

import os
import stat
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from c2r import InputError
from c2r.data.clips import Source
from c2r.data.remote import RemoteFolder, is_remote
from c2r.data.video import UnusableVideo, probe, read_window


class DropRow(Exception):
    """Raised with (reason, detail) while a row is looked into; ends in the manifest's `dropped`."""


class LocalFolder:
    """A dataset's folder; nothing outside it is ever given.

    Args:
        address: its path.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, address):
        path = Path(address)
        if not path.is_dir():
            raise InputError(f"{path}: no such dataset folder; check the path")
        self.address = str(path.resolve())
        self._inside = cache(self._is_inside)

    def has(self, name) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(f"{self.address}/{name}")

    def has_folder(self, name) -> bool:
        """Whether there is such a folder within it."""
        return os.path.isdir(f"{self.address}/{name}")

    def locate(self, name) -> Source | None:
        """The file of this name within the folder; None if there is none.

        Raises:
            DropRow: it is outside.
        """
        path = os.path.normpath(os.path.join(self.address, name))
        parent = os.path.dirname(path)
        try:
            status = os.lstat(path)
            link = stat.S_ISLNK(status.st_mode)
            status = os.stat(path) if link else status
        except (OSError, ValueError):  # also a name that no file can have
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        # Both as written and as it is on disk: neither ".." nor a link may lead out of the dataset.
        if not (self._inside(parent) and (not link or self._is_inside(path))):
            raise DropRow("path outside the folder", f"{name} leads to {os.path.realpath(path)}")
        return Source(self.address, path[len(self.address) + 1 :], status.st_size, status.st_mtime_ns)

    def _is_inside(self, path):
        within = (self.address, self.address.rstrip("/") + "/")
        return all(p == within[0] or p.startswith(within[1]) for p in (path, os.path.realpath(path)))

    @contextmanager
    def local_copy(self, source):
        """The path of a file of this folder, while the context is open."""
        yield Path(source.file)

    def probe(self, source):
        """`c2r.data.video.probe` of a file."""
        return probe(source.file)


class RemoteDataset:
    """A dataset at an fsspec address, see `RemoteFolder`; its files are looked into where they are."""

    def __init__(self, folder: RemoteFolder):
        self.address, self._folder = folder.address, folder

    def has(self, name) -> bool:
        return name in self._folder.files

    def has_folder(self, name) -> bool:
        return not name or any(file.startswith(f"{name}/") for file in self._folder.files)

    def locate(self, name) -> Source | None:
        name = os.path.normpath(name)
        file = self._folder.files.get(name)
        if file is None and name.startswith(("/", "..")):
            raise DropRow("path outside the folder", name)
        return file and Source(self.address, name, file.size, file.version)

    def local_copy(self, source):
        return self._folder.fetch(source.name, source.size, source.mtime_ns)

    def probe(self, source):
        with self._folder.telling(source.file), self._folder.open(source.name) as file:
            try:
                return probe(source.file, file)
            finally:  # a lost connection says nothing of the video, whatever the decoder has made of it
                if file.error is not None:
                    raise file.error


def open_folder(address, options):
    """`LocalFolder` or `RemoteDataset`.

    Args:
        address: a path, or an fsspec address such as hf://datasets/user/name.
        options: a command's; a remote dataset needs its cache_dir, and video_cache_gb bounds what is fetched to it.

    Raises:
        InputError: there is no such folder.
    """
    if not is_remote(str(address)):
        return _local_folder(str(address))
    cache_dir = getattr(options, "cache_dir", None)
    if cache_dir is None:
        raise InputError(f"{address}: is not on this machine: give a --cache_dir for what is fetched and encoded")
    return _remote_dataset(str(address), str(cache_dir), int(options.video_cache_gb * 1e9))


_local_folder = cache(LocalFolder)


@cache
def _remote_dataset(*where):
    return RemoteDataset(RemoteFolder(*where))


def read_source(source, clip, options):
    """Decode a clip's window of one of its files, see `read_window`.

    Args:
        source: the clip's `source`, `control_source` or `coarse_source`.
        clip: `Clip`.
        options: see `open_folder`; and fps.

    Returns:
        (F, 3, H, W) uint8 RGB in the shape of the clip's bucket.

    Raises:
        UnusableVideo: the file cannot be decoded.
        InputError: it cannot be read or fetched.
    """
    with open_folder(source.folder, options).local_copy(source) as path:
        try:
            return read_window(path, clip.start, clip.bucket.num_frames, options.fps, *clip.bucket[1:])
        except UnusableVideo as error:  # of the file, not of its copy
            raise UnusableVideo(str(error).replace(str(path), source.file), error.reason) from error
