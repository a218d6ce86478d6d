"""What is known of a dataset's files: looked into once, kept in the cache."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from c2r.data.video import UnusableVideo, VideoInfo
from c2r.files import write_atomic

# Fewer files than this are looked into before a progress bar could be read.
BAR_FROM = 200
# What was found is written so often, in seconds: a killed command repeats no more. At each write all is written.
SAVE_EVERY = 60
FILES_AT_ONCE = 1000
# Raise it when `probe` measures otherwise: what older ones have found is then looked into anew.
VERSION = 3


class Probes:
    """`probe` of files, by `Source`; what an earlier command found out is taken from the cache.

    Args:
        cache_dir: the dataset's; probes.safetensors in it holds a row of numbers for each file.
    """

    def __init__(self, cache_dir):
        self.store = Path(cache_dir) / "probes.safetensors"
        try:
            stored = load_file(self.store)
            self._keys, self._values = stored["keys"], stored["values"]
        except (OSError, SafetensorError, KeyError):
            self._keys, self._values = np.empty((0, 16), np.uint8), np.empty((0, 7))
        self._rows = {key.tobytes(): row for row, key in enumerate(self._keys)}
        self._failed = {}
        # Files are of few kinds and lengths: a million of them are hundreds of these.
        self._infos = {}

    def look_into(self, folder, sources):
        """Probe the files that are not known yet. Call it before `of`.

        Raises:
            InputError: a remote file cannot be reached, which says nothing of its content.
        """
        unknown = {key: source for source in sources if (key := _key(source)) not in self._rows}

        def probe(item):
            try:
                return item[0], folder.probe(item[1])
            except UnusableVideo as error:
                return item[0], error

        unknown = list(unknown.items())
        quiet = len(unknown) < BAR_FROM or os.environ.get("RANK", "0") != "0"
        with (
            ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool,
            tqdm(total=len(unknown), desc="looking into files", unit="file", disable=quiet) as bar,
        ):
            new, saved = {}, time.monotonic()
            for first in range(0, len(unknown), FILES_AT_ONCE):
                for key, info in pool.map(probe, unknown[first : first + FILES_AT_ONCE]):
                    # Failures are not kept: a right to read or a file server may come back without a change of the
                    # file.
                    (self._failed if isinstance(info, UnusableVideo) else new)[key] = info
                    bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    self._add(new)
                    new, saved = {}, time.monotonic()
            self._add(new)

    def of(self, source) -> VideoInfo | UnusableVideo:
        """What is known of a file; the same object for all files that are alike."""
        key = _key(source)
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

    def _add(self, new):
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
        # A cache that cannot be written is an error where it must be written.
        with suppress(OSError):
            write_atomic(self.store, save({"keys": self._keys, "values": self._values}))


def _key(source):
    return sha256(f"{VERSION} {source.name} {source.size} {source.mtime_ns}".encode(errors="replace")).digest()[:16]
