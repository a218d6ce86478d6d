"""Folders of datasets: one interface for a folder of this machine and for an fsspec address (`c2r.data.remote`)."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, cached_property
from pathlib import Path

import torch

from c2r import InputError
from c2r.data.clips import Clip, DatasetFile
from c2r.data.containers import file_kind
from c2r.data.drop_reasons import DropReason, DropRow
from c2r.data.remote import RemoteFolder, is_remote
from c2r.data.sequences import find_sequence, is_pattern, parse_rate
from c2r.data.settings import ClipSettings
from c2r.data.video import probe, read_window
from c2r.data.video_info import UnusableVideo, VideoInfo


class LocalFolder:
    """A dataset's folder on this machine; files outside it cannot be reached through it.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, address: str | Path):
        path = Path(address)
        if path.is_file():
            raise InputError(f"{path}: a file, not a dataset; give the folder that holds it and its metadata")
        if not path.is_dir():
            raise InputError(f"{path}: no such dataset folder; check the path")
        self.address = str(path.resolve())
        self._contains = cache(self._contains_uncached)

    def has_file(self, name: str) -> bool:
        """Return True if there is a file of this name."""
        return os.path.isfile(f"{self.address}/{name}")

    def has_folder(self, name: str) -> bool:
        """Return True if there is a folder of this name; "" is the dataset's folder itself."""
        return os.path.isdir(f"{self.address}/{name}")

    def locate(self, name: str) -> DatasetFile | None:
        """Return the file of this name; None if there is none.

        Raises:
            DropRow: it is outside the folder, or no file.
        """
        path = os.path.normpath(os.path.join(self.address, name))
        parent = os.path.dirname(path)
        try:
            status = os.lstat(path)
            is_link = stat.S_ISLNK(status.st_mode)
            status = os.stat(path) if is_link else status
        except (OSError, ValueError):  # ValueError: no file can have this name
            return None
        if stat.S_ISDIR(status.st_mode):  # perhaps of an image sequence
            return None
        if not stat.S_ISREG(status.st_mode):
            raise DropRow(DropReason.NOT_A_FILE, f"{name} is a {file_kind(status.st_mode)}")
        # Neither ".." nor a link may lead out of the dataset: the name and the real path are both checked.
        if not (self._contains(parent) and (not is_link or self._contains_uncached(path))):
            raise DropRow(DropReason.OUTSIDE_FOLDER, f"{name} leads to {os.path.realpath(path)}")
        return DatasetFile(self.address, path[len(self.address) + 1 :], status.st_size, status.st_mtime_ns)

    def locate_sequence(self, name: str, fps: str | float | None) -> DatasetFile | None:
        """Return the image sequence of this name, named by its pattern and rate; None if there is none.

        Args:
            name: a folder or a pattern, see `c2r.data.sequences`.
            fps: its rate; None or "": it has none.

        Raises:
            DropRow: it is outside the folder or incomplete, or has no rate.
        """
        path = os.path.normpath(os.path.join(self.address, name))
        if not os.path.isdir(path if not is_pattern(path) else os.path.dirname(path)):
            return None
        if not self._contains(path if os.path.isdir(path) else os.path.dirname(path)):
            raise DropRow(DropReason.OUTSIDE_FOLDER, f"{name} leads to {os.path.realpath(path)}")
        try:
            sequence = find_sequence(path, name, self._contains_uncached)
        except DropRow as drop:
            if drop.reason == DropReason.MISSING_FILE and not os.path.isdir(path):
                return None
            raise
        if not fps:
            raise DropRow(DropReason.NO_RATE, f"{name}: give the row an fps, or --sequence_fps")
        pattern = os.path.normpath(os.path.join(os.path.relpath(sequence.folder, self.address), sequence.pattern))
        return DatasetFile(self.address, f"{pattern}@{parse_rate(name, fps):.10g}", sequence.size, sequence.state)

    @cached_property
    def names_by_spelling(self) -> dict[str, str]:
        """All file names in the folder by their `spelling`. Links to folders are not followed."""
        found: dict[str, str] = {}
        for parent, folders, files in os.walk(self.address):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            inside = os.path.relpath(parent, self.address)
            names = (os.path.normpath(os.path.join(inside, name)) for name in files)
            found |= {spelling(name): name for name in names}
        return found

    def _contains_uncached(self, path):
        inside = self.address.rstrip("/") + "/"
        return all(p == self.address or p.startswith(inside) for p in (path, os.path.realpath(path)))

    @contextmanager
    def local_copy(self, file: DatasetFile) -> Iterator[Path]:
        """Give the path under which a file can be read while the context is open."""
        yield Path(file.path)

    def probe(self, file: DatasetFile) -> VideoInfo:
        """Return length, rate and shape of a file, see `c2r.data.video.probe`."""
        return probe(file.path)


class RemoteDataset:
    """A dataset at an fsspec address, with the interface of `LocalFolder`; `probe` does not fetch the whole file."""

    def __init__(self, folder: RemoteFolder):
        self.address, self._folder = folder.address, folder

    def has_file(self, name: str) -> bool:
        return name in self._folder.files

    def has_folder(self, name: str) -> bool:
        return not name or any(file.startswith(f"{name}/") for file in self._folder.files)

    def locate(self, name: str) -> DatasetFile | None:
        name = os.path.normpath(name)
        file = self._folder.files.get(name)
        if file is None and name.startswith(("/", "..")):
            raise DropRow(DropReason.OUTSIDE_FOLDER, name)
        return file and DatasetFile(self.address, name, file.size, file.version)

    def locate_sequence(self, name: str, fps: str | float | None) -> DatasetFile | None:
        if name and self.has_folder(os.path.normpath(name)):
            raise DropRow(
                DropReason.MISSING_FILE, f"{name}: image sequences are read from folders of this machine only"
            )
        return None

    @cached_property
    def names_by_spelling(self) -> dict[str, str]:
        return {spelling(name): name for name in self._folder.files}

    def local_copy(self, file: DatasetFile) -> AbstractContextManager[Path]:
        return self._folder.fetch(file.name, file.size, file.mtime_ns)

    def probe(self, file: DatasetFile) -> VideoInfo:
        with self._folder.raise_input_errors(file.path), self._folder.open(file.name) as stream:
            try:
                return probe(file.path, stream)
            finally:
                # A lost connection is no fault of the video, whatever error the decoder has made of it.
                if stream.error is not None:
                    raise stream.error


DatasetFolder = LocalFolder | RemoteDataset


def spelling(name: str) -> str:
    """Return a name in the form in which names that look alike are equal.

    Upper and lower case, the two ways of Unicode to write an accent (macOS uses another than most), back-slashes and
    spaces at the ends make no difference.
    """
    return unicodedata.normalize("NFC", name.replace("\\", "/").strip()).casefold()


def open_folder(address: str | Path, settings: ClipSettings) -> DatasetFolder:
    """Open a dataset's folder.

    Args:
        address: a path, or an fsspec address such as hf://datasets/user/name.
        settings: an address needs cache_dir; video_cache_gb limits the videos that are fetched to it.

    Raises:
        InputError: there is no such folder, or no cache_dir for an address.
    """
    address = str(address)
    if not is_remote(address):
        return _local_folder(address)
    if settings.cache_dir is None:
        raise InputError(f"{address}: is not on this machine; give a --cache_dir for fetched videos and encoded clips")
    return _remote_dataset(address, settings.cache_dir, int(settings.video_cache_gb * 1e9))


_local_folder = cache(LocalFolder)


@cache
def _remote_dataset(address, cache_dir, max_bytes):
    return RemoteDataset(RemoteFolder(address, cache_dir, max_bytes))


def read_frames(file: DatasetFile, clip: Clip, settings: ClipSettings) -> torch.Tensor:
    """Decode a clip's window of one of its files, see `read_window`.

    Args:
        file: the clip's target_file, control_file or coarse_file.
        clip: the window.
        settings: the frame rate, and where copies of remote files are kept.

    Returns:
        (F, 3, H, W) uint8 RGB in [0, 255], in the shape of the clip's bucket.

    Raises:
        UnusableVideo: the file cannot be decoded.
        InputError: it cannot be read or fetched.
    """
    num_frames, height, width = clip.bucket
    with open_folder(file.folder, settings).local_copy(file) as path:
        try:
            return read_window(path, clip.start, num_frames, settings.fps, height, width)
        except UnusableVideo as error:
            # Users know the file by its address, not by its copy in the cache.
            raise UnusableVideo(str(error).replace(str(path), file.path), error.reason, error.of_window) from error
