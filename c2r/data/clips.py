"""Clips, stored in columns: a million of them need little memory, and data loader workers share it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from c2r.data.buckets import Bucket
from c2r.data.video_info import to_fraction

#: One clip in `Clips.entries`.
ENTRY = np.dtype(
    [
        ("table", np.uint8),  # position of the clip's `FileTable`
        ("row", np.int64),  # row of its file there
        ("window", np.int32),  # 0, 1, … within the file
        ("first_frame", np.int64),  # at the frame rate of the clips
        ("bucket", np.uint8),  # position in the table's buckets
        ("held_out", np.bool_),
    ]
)

#: Entries that iteration turns into clips at a time.
CLIPS_AT_ONCE = 10_000


class DatasetFile(NamedTuple):
    """A file of a dataset, in its current state."""

    folder: str  # the dataset's path or address
    name: str  # path within the folder, with forward slashes
    size: int  # bytes
    mtime_ns: int  # time of last change; of a remote file, a number that changes with its content

    @property
    def path(self) -> str:
        """Path or address of the file."""
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Clip:
    """One window of a file, or of both files of a CG pair."""

    folder: str  # the dataset's path or address
    name: str  # of the target file: path within the folder, with forward slashes
    text: str
    domain: str  # "real" or "cg"
    window: int  # 0, 1, … within the file
    start: float  # seconds from the file's first frame
    bucket: Bucket
    size: int  # of the target file, as in `DatasetFile`
    mtime_ns: int
    held_out: bool
    control_name: str | None = None  # the coarse file: of a CG pair, or of a real clip (used in validation only)
    control_size: int | None = None
    control_mtime_ns: int | None = None

    @property
    def target_file(self) -> DatasetFile:
        """The file whose latents are learned."""
        return DatasetFile(self.folder, self.name, self.size, self.mtime_ns)

    @property
    def coarse_file(self) -> DatasetFile | None:
        """The coarse version: every CG pair has one, a real clip may have one."""
        if self.control_name is None:
            return None
        return DatasetFile(self.folder, self.control_name, self.control_size, self.control_mtime_ns)

    @property
    def control_file(self) -> DatasetFile:
        """The control in training: the coarse version of a CG pair; a real clip is its own control."""
        return self.coarse_file if self.domain == "cg" else self.target_file


@dataclass(frozen=True)
class FileTable:
    """The files, or pairs of files, of one dataset that give clips; one row per file or pair.

    Args:
        folder: the dataset's path or address.
        domain: "real" or "cg".
        fps: frame rate of the clips.
        buckets: all buckets in use.
        names, texts, control_names: arrow arrays of strings; control_names has nulls.
        sizes, mtimes, control_sizes, control_mtimes: int64.
    """

    folder: str
    domain: str
    fps: float
    buckets: tuple[Bucket, ...]
    names: pa.Array
    texts: pa.Array
    sizes: np.ndarray
    mtimes: np.ndarray
    control_names: pa.Array
    control_sizes: np.ndarray
    control_mtimes: np.ndarray

    @cached_property
    def rate(self) -> tuple[int, int]:
        """The frame rate as a ratio of whole numbers: frames, and the seconds that they take."""
        return to_fraction(self.fps).as_integer_ratio()

    def clips(self, entries: np.ndarray) -> Iterator[Clip]:
        """Yield the clips of some entries of this table: much faster than one call for each entry."""
        frames, seconds = self.rate
        rows = entries["row"]
        strings = [
            strings.take(pa.array(rows)).to_pylist() for strings in (self.names, self.texts, self.control_names)
        ]
        numbers = [
            numbers[rows].tolist() for numbers in (self.sizes, self.mtimes, self.control_sizes, self.control_mtimes)
        ]
        columns = [entries[name].tolist() for name in ("window", "first_frame", "bucket", "held_out")]
        for name, text, control_name, *sizes_and_times, window, first_frame, bucket, held_out in zip(
            *strings, *numbers, *columns
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


class Clips(Sequence[Clip]):
    """A sequence of `Clip`, each made on access. A slice, a mask or an array of positions gives `Clips`.

    Args:
        tables: the files.
        entries: array of ENTRY, one per clip.
    """

    def __init__(self, tables: list[FileTable], entries: np.ndarray):
        self.tables, self.entries = tables, entries

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            return next(iter(Clips(self.tables, self.entries[[key]])))
        return Clips(self.tables, self.entries[key])

    def __iter__(self):
        for first in range(0, len(self), CLIPS_AT_ONCE):
            block = self.entries[first : first + CLIPS_AT_ONCE]
            for part in np.split(block, np.flatnonzero(np.diff(block["table"])) + 1):
                yield from self.tables[part["table"][0]].clips(part)

    @classmethod
    def concatenated(cls, parts: Iterable["Clips"]) -> "Clips":
        """Return all clips of several `Clips`, in order."""
        tables: list[FileTable] = []
        all_entries = [np.empty(0, ENTRY)]
        for part in parts:
            entries = part.entries.copy()
            entries["table"] += len(tables)
            all_entries.append(entries)
            tables += part.tables
        return cls(tables, np.concatenate(all_entries))

    def first_windows(self, count: int | None = None) -> "Clips":
        """Return up to `count` clips of as many files as possible, or all clips in this order.

        Clips are ordered by their window's number within its file; among clips of one number, datasets and buckets
        take turns.
        """
        table, bucket, window = (self.entries[name] for name in ("table", "bucket", "window"))
        by_kind = np.lexsort((bucket, table, window))
        kinds = self.entries[["table", "bucket", "window"]][by_kind]
        places = np.arange(len(self))
        first_of_kind = np.maximum.accumulate(np.where(kinds != np.roll(kinds, 1), places, 0))
        turns = np.empty(len(self), np.int64)
        turns[by_kind] = places - first_of_kind
        return self[np.lexsort((turns, window))[:count]]

    def of_bucket(self, bucket: Bucket) -> "Clips":
        """Return the clips of one bucket."""
        return self[self.bucket_numbers == self.buckets.index(bucket)] if bucket in self.buckets else self[:0]

    @property
    def main_bucket(self) -> Bucket | None:
        """The bucket with the most clips; None if there are no clips."""
        return self.buckets[np.bincount(self.bucket_numbers).argmax()] if len(self) else None

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """All buckets in use; some may have no clips."""
        return self.tables[0].buckets if self.tables else ()

    @property
    def bucket_numbers(self) -> np.ndarray:
        """The position in `buckets` of each clip's bucket: (len,) uint8."""
        return self.entries["bucket"]

    @property
    def file_count(self) -> int:
        """Number of files, or pairs, that the clips come from; several rows of a table may be parts of one file."""
        count = 0
        for number in np.unique(self.entries["table"]):
            rows = np.unique(self.entries["row"][self.entries["table"] == number])
            count += len(self.tables[number].names.take(pa.array(rows)).unique())
        return count
