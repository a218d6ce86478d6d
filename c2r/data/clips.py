"""Clips in columns: a million of them take little memory, and the data loader's workers share it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from c2r.data.buckets import Bucket
from c2r.data.video import exact

INDEX = np.dtype(
    [
        ("table", np.uint8),  # number of the file table
        ("row", np.int64),  # of the file
        ("window", np.int32),
        ("first_frame", np.int64),  # at the rate of the clips
        ("bucket", np.uint8),  # number in the table's buckets
        ("held_out", np.bool_),
    ]
)

CLIPS_AT_ONCE = 10_000


class Source(NamedTuple):
    """A file of a dataset as it is now."""

    folder: str  # the dataset's, or its address
    name: str  # within the folder, with forward slashes
    size: int  # bytes
    mtime_ns: int  # of a remote file: a number that changes with its content

    @property
    def file(self) -> str:
        """Its path, or address."""
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Clip:
    """One window of one file, or of both files of a CG pair."""

    folder: str  # the dataset's, or its address
    name: str  # of the file within the folder, with forward slashes
    text: str
    domain: str  # "real" or "cg"
    window: int  # 0, 1, …
    start: float  # seconds from the file's first frame
    bucket: Bucket
    size: int  # of the file, as in `Source`
    mtime_ns: int
    held_out: bool
    control_name: str | None = None  # the coarse video: of a CG pair, or of a real clip, for validation alone
    control_size: int | None = None
    control_mtime_ns: int | None = None

    @property
    def file(self) -> str:
        """Path, or address, of the video whose latents are learned."""
        return self.source.file

    @property
    def source(self) -> Source:
        """The file whose latents are learned."""
        return Source(self.folder, self.name, self.size, self.mtime_ns)

    @property
    def coarse_source(self) -> Source | None:
        """The coarse video: each CG pair has one, and a real clip may."""
        return self.control_name and Source(self.folder, self.control_name, self.control_size, self.control_mtime_ns)

    @property
    def control_source(self) -> Source:
        """What is the control in training: the coarse video of a CG pair; a real clip is its own control."""
        return self.coarse_source if self.domain == "cg" else self.source


@dataclass(frozen=True)
class FileTable:
    """The files, or pairs, of one dataset that give clips; row by row.

    Args:
        folder, domain, fps, buckets: of all rows.
        names, texts, control_names: arrow arrays of strings; control_names has nulls.
        sizes, mtimes, control_sizes, control_mtimes: int64.
    """

    folder: str
    domain: str
    fps: float
    buckets: list[Bucket]
    names: pa.Array
    texts: pa.Array
    sizes: np.ndarray
    mtimes: np.ndarray
    control_names: pa.Array
    control_sizes: np.ndarray
    control_mtimes: np.ndarray

    @cached_property
    def rate(self) -> tuple[int, int]:
        """So many frames in so many seconds."""
        return exact(self.fps).as_integer_ratio()

    def clips(self, index):
        """The `Clip`s of some entries of an INDEX, all of this table. Much faster for many at once."""
        frames, seconds = self.rate
        rows = index["row"]
        strings = [
            strings.take(pa.array(rows)).to_pylist() for strings in (self.names, self.texts, self.control_names)
        ]
        numbers = [
            numbers[rows].tolist() for numbers in (self.sizes, self.mtimes, self.control_sizes, self.control_mtimes)
        ]
        entries = [index[name].tolist() for name in ("window", "first_frame", "bucket", "held_out")]
        for name, text, control_name, *sizes_and_times, window, first_frame, bucket, held_out in zip(
            *strings, *numbers, *entries
        ):
            size, mtime_ns, control_size, control_mtime_ns = sizes_and_times
            yield Clip(
                folder=self.folder,
                name=name,
                text=text,
                domain=self.domain,
                window=window,
                start=first_frame * seconds / frames,
                bucket=self.buckets[bucket],
                size=size,
                mtime_ns=mtime_ns,
                held_out=held_out,
                control_name=control_name,
                control_size=None if control_name is None else control_size,
                control_mtime_ns=None if control_name is None else control_mtime_ns,
            )


class Clips(Sequence):
    """A sequence of `Clip`, made when they are asked for. A slice, a mask or an array of positions gives `Clips`.

    Args:
        tables: list of `FileTable`.
        index: array of INDEX, one entry for each clip.
    """

    def __init__(self, tables, index):
        self.tables, self.index = tables, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            return next(iter(Clips(self.tables, self.index[[key]])))
        return Clips(self.tables, self.index[key])

    def __iter__(self):
        for first in range(0, len(self), CLIPS_AT_ONCE):
            block = self.index[first : first + CLIPS_AT_ONCE]
            for part in np.split(block, np.flatnonzero(np.diff(block["table"])) + 1):
                yield from self.tables[part["table"][0]].clips(part)

    @classmethod
    def concatenated(cls, parts) -> "Clips":
        """All clips of several `Clips`, in order."""
        tables, indices = [], []
        for part in parts:
            indices.append(part.index.copy())
            indices[-1]["table"] += len(tables)
            tables += part.tables
        return cls(tables, np.concatenate([np.empty(0, INDEX), *indices]))

    def first_windows(self, count=None) -> "Clips":
        """Up to `count` clips from as many files as possible: first windows before second ones, and among these one of
        each dataset and bucket before second ones."""
        table, bucket, window = (self.index[name] for name in ("table", "bucket", "window"))
        by_kind = np.lexsort((bucket, table, window))
        kinds = self.index[["table", "bucket", "window"]][by_kind]
        places = np.arange(len(self))
        first_of_kind = np.maximum.accumulate(np.where(kinds != np.roll(kinds, 1), places, 0))
        turns = np.empty(len(self), np.int64)
        turns[by_kind] = places - first_of_kind
        return self[np.lexsort((turns, window))[:count]]

    def of_bucket(self, bucket) -> "Clips":
        """Those of one bucket."""
        return self[self.bucket_numbers == self.buckets.index(bucket)] if bucket in self.buckets else self[:0]

    @property
    def main_bucket(self) -> Bucket | None:
        """The bucket of most clips; None of none."""
        return self.buckets[np.bincount(self.bucket_numbers).argmax()] if len(self) else None

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets that `bucket_numbers` count."""
        return self.tables[0].buckets if self.tables else []

    @property
    def bucket_numbers(self) -> np.ndarray:
        """(len,) uint8: the number in `buckets` of each clip."""
        return self.index["bucket"]

    @property
    def file_count(self) -> int:
        return len(np.unique(self.index[["table", "row"]]))


def cache_folder(dataset_folder, options) -> Path:
    """A command's `--cache_dir`, or .c2r_cache in the dataset's folder."""
    cache_dir = getattr(options, "cache_dir", None)
    return Path(cache_dir) if cache_dir else Path(dataset_folder) / ".c2r_cache"
