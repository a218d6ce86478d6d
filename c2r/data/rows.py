"""Find the files that the rows of a dataset's metadata name."""

import math
import unicodedata
from array import array
from pathlib import Path

import numpy as np
import pyarrow as pa

from c2r.data.buckets import Bucket
from c2r.data.clips import ENTRY, Clips, DatasetFile, FileTable
from c2r.data.drop_reasons import DroppedRow, DropReason, DropRow
from c2r.data.folders import DatasetFolder, spelling
from c2r.data.metadata import find_metadata, rows_of

#: A part of a file: start and end in seconds.
Part = tuple[float, float]


class TableBuilder:
    """Collects the columns of a `FileTable` and of the entries of its clips.

    Args:
        folder: the dataset's.
    """

    def __init__(self, folder: DatasetFolder):
        self.folder = folder
        self.names: list[str] = []
        self.texts: list[str] = []
        self.control_names: list[str | None] = []
        self.numbers = {name: array("q") for name in ("sizes", "mtimes", "control_sizes", "control_mtimes")}
        self.parts: list[Part | None] = []  # None: the whole file
        self.windows = {name: array("q") for name in ("row", "window", "first_frame", "bucket")}

    def __len__(self):
        return len(self.names)

    def add(self, text: str, part: Part | None, target: DatasetFile, coarse: DatasetFile | None = None) -> None:
        """Add a row of the table."""
        self.parts.append(part)
        self.names.append(target.name)
        self.texts.append(text)
        self.control_names.append(coarse and coarse.name)
        self.numbers["sizes"].append(target.size)
        self.numbers["mtimes"].append(target.mtime_ns)
        self.numbers["control_sizes"].append(coarse.size if coarse else 0)
        self.numbers["control_mtimes"].append(coarse.mtime_ns if coarse else 0)

    def files(self, row: int) -> list[DatasetFile]:
        """Return a row's target file, and its coarse file if it has one."""
        sizes, mtimes, control_sizes, control_mtimes = self.numbers.values()
        files = [DatasetFile(self.folder.address, self.names[row], sizes[row], mtimes[row])]
        if (coarse := self.control_names[row]) is not None:
            files.append(DatasetFile(self.folder.address, coarse, control_sizes[row], control_mtimes[row]))
        return files

    def add_windows(self, row: int, windows: dict[int, tuple[int, int]]) -> None:
        """Add the windows of a row by number, see `cut_into_windows`; a row without windows gives no clips."""
        for window, (first, bucket) in windows.items():
            for column, value in zip(self.windows.values(), (row, window, first, bucket)):
                column.append(value)

    def clips(self, domain: str, fps: float, buckets: tuple[Bucket, ...]) -> Clips:
        """Return the clips of all windows, none of them held out yet."""
        entries = np.zeros(len(self.windows["row"]), ENTRY)
        for name, column in self.windows.items():
            entries[name] = column
        table = FileTable(
            folder=self.folder.address,
            domain=domain,
            fps=fps,
            buckets=buckets,
            names=pa.array(self.names, pa.string()),
            texts=pa.array(self.texts, pa.large_string()),
            control_names=pa.array(self.control_names, pa.string()),
            **{name: np.array(numbers, np.int64) for name, numbers in self.numbers.items()},
        )
        return Clips([table], entries)


def locate_rows(
    folder: DatasetFolder, domain: str, cache_dir: Path, sequence_fps: float | None
) -> tuple[TableBuilder, list[DroppedRow], list[DroppedRow], int]:
    """Find the files of each metadata row.

    Returns:
        the rows whose files are there, the dropped rows, the rows kept without a coarse version, and the number of all
        rows.
    """
    table, dropped, without_coarse, row_count = TableBuilder(folder), [], [], 0
    seen = set()
    for metadata_folder, rows in find_metadata(folder, domain, cache_dir):
        row_count += len(rows)
        bases = [base for base in dict.fromkeys((metadata_folder, "", "train")) if folder.has_folder(base)]
        for row in rows_of(rows, f"{folder.address}/{metadata_folder}".rstrip("/")):
            name, text, control_name = row[:3]
            try:
                fps, part = row.fps or sequence_fps, part_of(row.start, row.end)
                files = [locate(folder, bases, name, fps)]
                if not text.strip():
                    raise DropRow(DropReason.EMPTY_CAPTION)
                if domain == "cg" or control_name:
                    try:
                        files.append(locate(folder, bases, control_name, fps))
                    except DropRow as drop:
                        if domain == "cg":
                            raise
                        without_coarse.append(DroppedRow(files[0].name, drop.reason, drop.detail))
                if (key := hash((text, part, *files))) in seen:
                    raise DropRow(DropReason.DUPLICATE_ROW)
                seen.add(key)
                table.add(text, part, *files)
            except DropRow as drop:
                dropped.append(DroppedRow(name, drop.reason, drop.detail))
    return table, dropped, without_coarse, row_count


def locate(folder: DatasetFolder, bases: list[str], name: str, fps: str | float | None) -> DatasetFile:
    """Return the file or image sequence that a row names, relative to the first base that has it.

    Raises:
        DropRow: the row names none, or there is none in the folder.
    """
    if not name:
        raise DropRow(DropReason.MISSING_FILE, "the row names none")
    for base in bases:
        path = f"{base}/{name}" if base else name
        if (file := folder.locate(path) or folder.locate_sequence(path, fps)) is not None:
            return file
    hint = "; name an image sequence by its folder, or as a_####.png" if "*" in name else ""
    raise DropRow(DropReason.MISSING_FILE, name + (hint or _near_match(folder, bases, name)))


def _near_match(folder: DatasetFolder, bases: list[str], name: str) -> str:
    """Return a hint at a file whose name differs in spelling alone; "" if there is none."""
    for base in bases:
        key = spelling(f"{base}/{name.strip()}" if base else name)
        if (found := folder.names_by_spelling.get(key)) is not None:
            found = found.removeprefix(f"{base}/") if base else found
            return f"; there is {found!a}: its name differs in {_difference(name, found)}; correct the row"
    return ""


def _difference(name, found):
    if "\\" in name:
        return "back-slashes"
    if name.strip() != name:
        return "spaces at its ends"
    composed = unicodedata.normalize("NFC", name), unicodedata.normalize("NFC", found)
    return "the way in which accents are stored" if composed[0] == composed[1] else "upper and lower case"


def part_of(start: str, end: str) -> Part | None:
    """Return the part of a file that a row names, in seconds; None: the whole file.

    Raises:
        DropRow: they are no times, or the end is not after the start.
    """
    if not start and not end:
        return None
    try:
        part = float(start or 0), float(end or "inf")
    except ValueError:
        part = (math.nan, math.nan)
    if not 0 <= part[0] < part[1]:
        raise DropRow(DropReason.BAD_PART, f"start {start or 0!r}, end {end!r}: give seconds, the end after the start")
    return part
