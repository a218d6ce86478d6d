"""Probes of a dataset's files: length, rate and shape of each, kept in the cache."""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from c2r.bars import bar_settings
from c2r.data.clips import DatasetFile
from c2r.data.folders import DatasetFolder
from c2r.data.video_info import MAX_SECONDS, UnusableVideo, VideoInfo
from c2r.files import write_atomic

# Smallest number of files for which a progress bar is shown.
MIN_FILES_FOR_BAR = 200
# Seconds between two writes of all probes, so that a killed command loses little.
SAVE_EVERY = 60
FILES_AT_ONCE = 1000
# Raise it when `probe` measures differently: cached probes of an older version are then ignored.
VERSION = 4


class Probes:
    """Probes of files by `DatasetFile`; those of earlier commands are read from the cache.

    Args:
        cache_dir: the dataset's; probes.safetensors in it holds a row of numbers for each file.
    """

    def __init__(self, cache_dir: str | Path):
        self.store = Path(cache_dir) / "probes.safetensors"
        self._keys, self._values = np.empty((0, 16), np.uint8), np.empty((0, 7))
        with suppress(OSError, SafetensorError, KeyError):  # without them the files are probed again
            stored = load_file(self.store)
            if _are_probes(stored["keys"], stored["values"]):
                self._keys, self._values = stored["keys"], stored["values"]
        self._rows = {key.tobytes(): row for row, key in enumerate(self._keys)}
        self._failed: dict[bytes, UnusableVideo] = {}
        # Many files are alike in length, rate and shape: a million files share a few hundred objects.
        self._infos: dict[bytes, VideoInfo] = {}

    def probe_missing(self, folder: DatasetFolder, files: Iterable[DatasetFile]) -> None:
        """Probe the files that have no probe yet. Call it before `of`.

        Raises:
            InputError: a file cannot be reached, such as after a lost connection; its content may be good.
        """
        missing = {key: file for file in files if (key := _key(file)) not in self._rows}

        def probe(item: tuple[bytes, DatasetFile]) -> tuple[bytes, VideoInfo | UnusableVideo]:
            try:
                return item[0], folder.probe(item[1])
            except UnusableVideo as error:
                return item[0], error

        items = list(missing.items())
        quiet = len(items) < MIN_FILES_FOR_BAR or os.environ.get("RANK", "0") != "0"
        with (
            ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool,
            tqdm(total=len(items), desc="probing files", unit="file", **bar_settings(not quiet)) as bar,
        ):
            new: dict[bytes, VideoInfo] = {}
            saved = time.monotonic()
            for first in range(0, len(items), FILES_AT_ONCE):
                for key, info in pool.map(probe, items[first : first + FILES_AT_ONCE]):
                    # Failures are not cached: permissions or a file server may recover while the file stays the same.
                    if isinstance(info, UnusableVideo):
                        self._failed[key] = info
                    else:
                        new[key] = info
                    bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    self._add(new)
                    new, saved = {}, time.monotonic()
            self._add(new)

    def of(self, file: DatasetFile) -> VideoInfo | UnusableVideo:
        """Return a file's probe, or the error that probing it raised; one object for all files that are alike."""
        key = _key(file)
        if key in self._failed:
            return self._failed[key]
        values = self._values[self._rows[key]].tobytes()
        if values not in self._infos:
            *fractions, aspect, height, is_image = np.frombuffer(values).tolist()
            last, last_of, interval, interval_of = map(int, fractions)
            self._infos[values] = VideoInfo(
                Fraction(last, last_of), Fraction(interval, interval_of), aspect, bool(is_image), height=int(height)
            )
        return self._infos[values]

    def _add(self, new: dict[bytes, VideoInfo]) -> None:
        if not new:
            return
        values = [
            (*info.last.as_integer_ratio(), *info.interval.as_integer_ratio(), info.aspect, info.height, info.is_image)
            for info in new.values()
        ]
        keys = np.frombuffer(b"".join(new), np.uint8).reshape(-1, 16)
        self._rows |= {key: len(self._keys) + i for i, key in enumerate(new)}
        self._keys = np.concatenate([self._keys, keys])
        self._values = np.concatenate([self._values, np.array(values, np.float64)])
        # Probes are a shortcut only: reading goes on without them, and whatever must write the cache raises.
        with suppress(OSError):
            write_atomic(self.store, save({"keys": self._keys, "values": self._values}))


def _are_probes(keys, values):
    """Return True if stored arrays hold what `Probes` writes: the cache may come with a dataset."""
    if keys.dtype != np.uint8 or keys.shape[1:] != (16,) or values.shape != (len(keys), 7):
        return False
    last, last_of, interval, interval_of, aspect, height, is_image = values.T
    return values.dtype == np.float64 and bool(
        np.isfinite(values).all()
        and (np.minimum(last_of, interval_of) >= 1).all()
        and ((last >= 0) & (last <= MAX_SECONDS * last_of)).all()  # a longer video would be cut into endless windows
        and (interval >= 1).all()
        and (aspect > 0).all()
        and (height >= 0).all()
        and np.isin(is_image, (0, 1)).all()
    )


def _key(file: DatasetFile) -> bytes:
    return sha256(f"{VERSION} {file.name} {file.size} {file.mtime_ns}".encode(errors="replace")).digest()[:16]
