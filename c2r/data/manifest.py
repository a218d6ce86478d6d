"""Manifests: the clips of a dataset, which of them are held out, and which rows are dropped for which reason."""

import csv
import hashlib
import io
import logging
import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from c2r import InputError
from c2r.data.buckets import MUCH_CROPPED, Bucket, cut_into_windows, fitting_size, nearest_buckets
from c2r.data.clips import ENTRY, Clip, Clips, DatasetFile, FileTable
from c2r.data.drop_reasons import DropReason, DropRow
from c2r.data.failures import Window, noted_failures
from c2r.data.folders import DatasetFolder, open_folder, spelling
from c2r.data.metadata import find_metadata, rows_of
from c2r.data.probes import Probes
from c2r.data.settings import ClipSettings
from c2r.data.video_info import UnusableVideo, VideoInfo, to_fraction
from c2r.files import digest, refuse_linked_folders, write_atomic

logger = logging.getLogger(__name__)

HELD_OUT_FRACTION = 0.05
# Largest relative difference of a pair's frame rates: 23.976 and 24 count as equal, clips last seconds only.
RATE_TOLERANCE = 0.005
# Largest relative difference of a pair's aspect ratios: encoders round sizes to even numbers. At a width of 832 pixels
# the edge moves by 4.
ASPECT_TOLERANCE = 0.01


@dataclass(frozen=True)
class DroppedRow:
    """A metadata row, or one window of it, that is not used; or a row that is used without its coarse version."""

    file: str
    reason: DropReason
    detail: str = ""
    window: int | None = None  # 0, 1, … within the file; None: all of them


def is_held_out(name: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Return True if a file of this name is held out.

    The name's SHA-256 alone decides, so other files do not change the answer.
    """
    return _hash_position(name) < fraction


def _hash_position(name: str) -> float:
    """Map a file name to a number in [0, 1) by its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def clips_fingerprint(clips: Iterable[Clip]) -> str:
    """Return the SHA-256 hex of clips: names, windows, buckets, captions, and sizes and change times of files."""
    content = hashlib.sha256()
    for c in clips:
        entry = (c.name, c.window, c.start, *c.bucket, c.size, c.mtime_ns, c.text)
        content.update(f"{entry}{c.control_name, c.control_size, c.control_mtime_ns}".encode())
    return content.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The clips and dropped rows of a dataset, in the order of its metadata."""

    folder: str  # path or address
    domain: str
    clips: Clips
    dropped: list[DroppedRow]
    cache_dir: Path
    row_count: int  # rows of the metadata
    without_coarse: list[DroppedRow] = field(default_factory=list)  # real rows that are used without it
    dropped_windows: list[DroppedRow] = field(default_factory=list)  # of rows with other, good windows
    # Aspect ratio of the file of each row of the clips' table; NaN for rows without clips.
    aspects: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def name(self) -> str:
        """The dataset's name in messages."""
        return self.folder

    @property
    def train(self) -> Clips:
        """The clips that are not held out."""
        return self.clips[~self.clips.entries["held_out"]]

    @property
    def held_out(self) -> Clips:
        """The clips that are kept out of training, for validation."""
        return self.clips[self.clips.entries["held_out"]]

    @cached_property
    def fingerprint(self) -> str:
        """The `clips_fingerprint` of all clips."""
        return clips_fingerprint(self.clips)

    def report(self) -> None:
        """Log the numbers of clips used and of rows dropped by reason, and write the list into the cache."""
        path = self.write()
        name = f"{self.folder} ({self.domain})"
        held_out = int(self.clips.entries["held_out"].sum())
        logger.info(
            f"{name}: kept {len(self.clips)} clips of {self.clips.file_count} files "
            f"({len(self.clips) - held_out} to train on, {held_out} held out), "
            f"dropped {len(self.dropped)} rows{': ' if self.dropped else ''}{_count_reasons(self.dropped)}; "
            f"list in {path}"
        )
        if len(self.clips.buckets) > 1:
            numbers = Counter(self.clips.bucket_numbers.tolist())
            shares = ", ".join(f"{numbers[i]} of {bucket}" for i, bucket in enumerate(self.clips.buckets))
            logger.info(f"{name}: clips by bucket: {shares}")
        self._report_cropping(name)
        if self.dropped_windows:
            count = len(self.dropped_windows)
            logger.info(f"{name}: dropped {count} single clips: {_count_reasons(self.dropped_windows)}")
        if self.without_coarse:
            logger.info(
                f"{name}: kept {len(self.without_coarse)} rows without their coarse version: "
                f"{_count_reasons(self.without_coarse)}"
            )

    @cached_property
    def cropped(self) -> np.ndarray:
        """The share of the picture of each clip's file that its bucket crops away, in [0, 1)."""
        aspects = self.aspects[self.clips.entries["row"]]
        wanted = np.array([bucket.aspect for bucket in self.clips.buckets])[self.clips.bucket_numbers]
        return 1 - np.minimum(aspects, wanted) / np.maximum(aspects, wanted)

    def _report_cropping(self, name):
        """Log how many files lose much of their picture, and the bucket that would keep it."""
        much = np.flatnonzero(self.cropped > MUCH_CROPPED)
        if not len(much):
            return
        count = self.clips[much].file_count
        worst = int(np.argmax(self.cropped))
        clip, aspect = self.clips[worst], self.aspects[self.clips.entries["row"][worst]]
        height, width = fitting_size(aspect, clip.bucket.height * clip.bucket.width)
        logger.warning(
            f"{name}: {count} of {self.clips.file_count} files lose more than {MUCH_CROPPED:.0%} of their picture by "
            f"cropping, {clip.name} the most, {self.cropped[worst]:.0%} in {clip.bucket}; add a bucket to --buckets, "
            f"for this file {clip.bucket.num_frames}x{height}x{width}"
        )

    def write(self) -> Path:
        """Write the clips and dropped rows as a CSV file into the cache, and return its path.

        Columns: file_name, window, bucket, cropped (share of the picture), use (train, held out, dropped, without
        coarse version), reason.
        """
        # Datasets in one cache may have folders of the same name: the address tells them apart.
        path = self.cache_dir / f"manifest-{self.domain}-{Path(self.folder).name}-{digest(self.folder)[:6]}.csv"
        content = io.StringIO()
        writer = csv.writer(content)
        writer.writerow(["file_name", "window", "bucket", "cropped", "use", "reason"])
        dropped = [*self.dropped, *self.dropped_windows]
        for use, rows in (("dropped", dropped), ("without coarse version", self.without_coarse)):
            for row in rows:
                reason = f"{row.reason}: {row.detail}" if row.detail else row.reason
                writer.writerow([row.file, "" if row.window is None else row.window, "", "", use, reason])
        entries, table = self.clips.entries, self.clips.tables[0]
        names, uses = table.names.to_pylist(), ("train", "held out")
        rows, windows, buckets, held_out = (entries[name].tolist() for name in ("row", "window", "bucket", "held_out"))
        for row, window, bucket, held, cropped in zip(rows, windows, buckets, held_out, self.cropped.tolist()):
            writer.writerow([names[row], window, table.buckets[bucket], f"{cropped:.2f}", uses[held], ""])
        try:
            write_atomic(path, content.getvalue().encode(errors="replace"))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give a writable --cache_dir") from error
        return path

    def require_kept(self, max_dropped: float | None = None) -> None:
        """Raise InputError if there is no clip, or if more than this share of the rows is dropped.

        The list of rows is written first, because the message names its file.
        """
        if not len(self.clips):
            raise InputError(
                f"{self.folder}: none of its {self.row_count} rows can be used "
                f"({_count_reasons(self.dropped) or 'the metadata is empty'}); {_first_detail(self.dropped)}"
                f"list in {self.write()}; see docs/data.md"
            )
        if max_dropped is not None and len(self.dropped) > max_dropped * self.row_count:
            raise InputError(
                f"{self.folder}: {len(self.dropped)} of {self.row_count} rows are dropped "
                f"({_count_reasons(self.dropped)}), more than --max_dropped {max_dropped:g}; fix them, or raise it; "
                f"list in {self.write()}"
            )


def _count_reasons(dropped: list[DroppedRow]) -> str:
    """Return the reasons and their numbers, the most frequent first: "3 too short, 1 missing file"."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row.reason for row in dropped).most_common())


def _first_detail(dropped: list[DroppedRow]) -> str:
    row = next((row for row in dropped if row.detail), None)
    if row is None:
        return ""
    return f"the first: {row.detail if row.file in row.detail else f'{row.file}: {row.detail}'}; "


class _TableBuilder:
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
        self.parts: list[tuple[float, float] | None] = []  # start and end in seconds; None: the whole file
        self.windows = {name: array("q") for name in ("row", "window", "first_frame", "bucket")}

    def __len__(self):
        return len(self.names)

    def add(
        self, text: str, part: tuple[float, float] | None, target: DatasetFile, coarse: DatasetFile | None = None
    ) -> None:
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


def read_manifest(
    address: str | Path,
    domain: str,
    settings: ClipSettings,
    current_encoders: Callable[[], dict[str, Any]] | None = None,
) -> Manifest:
    """Read a dataset's metadata and probe its files.

    Args:
        address: a folder, or an fsspec address, with metadata.csv, .jsonl or .parquet (columns file_name, text, and
            control_name for CG pairs), in itself or in train/, and perhaps in validation/. Names are relative to the
            metadata's folder, to the dataset folder or to its train/.
        domain: "real" or "cg". A real row may name its coarse version as control_name. If that version does not fit,
            the row is kept without it.
        settings: buckets, frame rate, cache and the allowed share of dropped rows.
        current_encoders: gives the encoders' settings, see `noted_failures`.

    Returns:
        The manifest. Held-out files are those in validation/ if there is one; otherwise about 5 %, chosen by a hash of
        the name, and at least one of two. All windows of a file fall on one side.

    Raises:
        InputError: no folder, metadata or column, no usable row, or too many rows dropped.
    """
    folder = open_folder(address, settings)
    cache_dir = settings.cache_folder(folder.address)
    if settings.cache_dir is None:  # in the dataset's folder, which a stranger may have made
        refuse_linked_folders(cache_dir)
    table, dropped, without_coarse, row_count = _locate_rows(folder, domain, cache_dir, settings.sequence_fps)
    probes = Probes(cache_dir)
    probes.probe_missing(folder, (file for row in range(len(table)) for file in table.files(row)))
    failures = noted_failures(cache_dir, current_encoders)
    aspects = np.full(len(table), np.nan)
    windows_of_infos: dict[tuple, list[tuple[int, int]]] = {}
    dropped_windows: list[DroppedRow] = []
    in_earlier_parts: Counter[str] = Counter()  # windows of a file in the rows so far
    per_second, seconds = to_fraction(settings.fps).as_integer_ratio()

    def windows_of(files, part):
        infos = [probes.of(file) for file in files]
        key = (part, *map(id, infos))  # `probes` keeps one object for all files that are alike
        if key not in windows_of_infos:
            windows_of_infos[key] = _cut(infos, settings, part)
        name = files[0].name
        windows, failed = dict(enumerate(windows_of_infos[key], in_earlier_parts[name] if part else 0)), []
        for file in files:
            notes = failures.get(file[1:])
            if not notes:
                continue
            if None in notes:
                raise DropRow(*notes[None])
            for number, (first, bucket) in list(windows.items()):
                window = Window(first * seconds / per_second, settings.buckets[bucket].num_frames, settings.fps)
                if window in notes:
                    del windows[number]
                    # A coarse version of a real clip is left out instead.
                    if not windows or (domain == "real" and file != files[0]):
                        raise DropRow(*notes[window])
                    failed.append(DroppedRow(name, *notes[window], number))
        dropped_windows.extend(failed)
        if part:
            in_earlier_parts[name] += len(windows_of_infos[key])
        return windows

    for row in range(len(table)):
        files, part = table.files(row), table.parts[row]
        try:
            try:
                windows = windows_of(files, part)
            except DropRow as drop:
                if domain == "cg" or len(files) == 1:
                    raise
                windows = windows_of(files[:1], part)
                table.control_names[row] = None
                without_coarse.append(DroppedRow(files[0].name, drop.reason, drop.detail))
            table.add_windows(row, windows)
            aspects[row] = cast(VideoInfo, probes.of(files[0])).aspect
        except DropRow as drop:
            dropped.append(DroppedRow(files[0].name, drop.reason, drop.detail))
    clips = table.clips(domain, settings.fps, settings.buckets)
    manifest = Manifest(
        folder.address, domain, clips, dropped, cache_dir, row_count, without_coarse, dropped_windows, aspects
    )
    manifest.require_kept(settings.max_dropped)
    _hold_out(folder, clips)
    return manifest


def _locate_rows(
    folder: DatasetFolder, domain: str, cache_dir: Path, sequence_fps: float | None
) -> tuple[_TableBuilder, list[DroppedRow], list[DroppedRow], int]:
    """Find the files of each metadata row.

    Returns:
        the rows whose files are there, the dropped rows, the rows kept without a coarse version, and the number of all
        rows.
    """
    table, dropped, without_coarse, row_count = _TableBuilder(folder), [], [], 0
    seen = set()
    for metadata_folder, rows in find_metadata(folder, domain, cache_dir):
        row_count += len(rows)
        bases = [base for base in dict.fromkeys((metadata_folder, "", "train")) if folder.has_folder(base)]
        for row in rows_of(rows, f"{folder.address}/{metadata_folder}".rstrip("/")):
            name, text, control_name = row[:3]
            try:
                fps, part = row.fps or sequence_fps, _part(row.start, row.end)
                files = [_locate(folder, bases, name, fps)]
                if not text.strip():
                    raise DropRow(DropReason.EMPTY_CAPTION)
                if domain == "cg" or control_name:
                    try:
                        files.append(_locate(folder, bases, control_name, fps))
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


def _locate(folder: DatasetFolder, bases: list[str], name: str, fps: str | float | None) -> DatasetFile:
    """Return the file or image sequence that a row names, relative to the first base that has it."""
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


def _part(start: str, end: str) -> tuple[float, float] | None:
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


def _cut(
    infos: Sequence[VideoInfo | UnusableVideo], settings: ClipSettings, part: tuple[float, float] | None = None
) -> list[tuple[int, int]]:
    """Cut a file or a pair of files, or a part of it, into windows, see `cut_into_windows`.

    Raises:
        DropRow: there is no window.
    """
    usable = []
    for info in infos:
        if isinstance(info, UnusableVideo):
            raise DropRow(info.reason, str(info))
        usable.append(info)
    if len(usable) == 2:
        _require_pair(*usable)
    fps, buckets, target = settings.fps, settings.buckets, usable[0]
    frames, first = min(info.frames_at(fps) for info in usable), 0
    if part is not None and not target.is_image:
        first, frames = _frames_of_part(part, frames, fps, max(info.interval for info in usable))
    windows = cut_into_windows(frames, target, buckets)
    if windows:
        return [(first + frame, bucket) for frame, bucket in windows]
    slow = [info for info in usable if info.is_frozen_at(fps)]
    if slow:
        raise DropRow(DropReason.FROZEN, f"{slow[0].rate:.3g} frames per second; a clip has {fps:g}")
    if target.is_image:
        raise DropRow(DropReason.IMAGE, "no bucket has one frame; name an image sequence by its folder")
    least = min(bucket.num_frames for bucket in nearest_buckets(target, buckets))
    detail = f"{frames} frames at {fps:g} fps, {target.duration:.2f} s; a clip takes {least}"
    native = min(info.native_frames for info in usable)
    if part is not None:
        native = min(native, round((min(part[1], target.duration) - part[0]) * target.rate))
    if native < least:
        raise DropRow(DropReason.TOO_SHORT, detail)
    raise DropRow(DropReason.TOO_FEW_RESAMPLED_FRAMES, detail)


def _frames_of_part(part: tuple[float, float], frames: int, fps: float, interval: Fraction) -> tuple[int, int]:
    """Return the first frame of a part and the number of its frames, at the frame rate of the clips.

    Args:
        part: start and end in seconds: the times of the first frame in the part, and of the first frame after it.
        frames: the whole file's, at `fps`.
        fps: frame rate of the clips.
        interval: seconds between two frames of the file. From half of it before the end on, the nearest frame would be
            the one after the part.
    """
    start, end = part
    rate = to_fraction(fps)
    first = math.ceil(to_fraction(start) * rate)
    if end < math.inf:
        frames = min(frames, math.floor((to_fraction(end) - interval / 2) * rate) + 1)
    return first, max(0, frames - first)


def _require_pair(fine: VideoInfo, coarse: VideoInfo) -> None:
    """Raise DropRow unless two files can be cut into the same windows."""
    if fine.is_image or coarse.is_image:
        if fine.is_image != coarse.is_image:
            raise DropRow(DropReason.PAIR_OF_KINDS)
    else:
        if abs(fine.rate / coarse.rate - 1) > RATE_TOLERANCE:
            raise DropRow(DropReason.PAIR_RATE, f"{fine.rate:g} fps, its control {coarse.rate:g} fps")
        if abs(fine.duration - coarse.duration) > max(fine.interval, coarse.interval) * Fraction(3, 2):
            lengths = f"{fine.duration:.2f} s, its control {coarse.duration:.2f} s"
            raise DropRow(DropReason.PAIR_LENGTH, lengths)
    if abs(fine.aspect / coarse.aspect - 1) > ASPECT_TOLERANCE:
        raise DropRow(DropReason.PAIR_ASPECT, f"{fine.aspect:.3f}, its control {coarse.aspect:.3f}")


def _hold_out(folder: DatasetFolder, clips: Clips) -> None:
    """Mark the clips that are held out, in place."""
    rows = np.unique(clips.entries["row"])
    names = clips.tables[0].names.take(pa.array(rows)).to_pylist()
    held_out = _held_out_names(folder, set(names))
    row_is_held_out = np.zeros(rows[-1] + 1, bool)
    row_is_held_out[rows] = [name in held_out for name in names]
    clips.entries["held_out"] = row_is_held_out[clips.entries["row"]]


def _held_out_names(folder: DatasetFolder, names: set[str]) -> set[str]:
    if folder.has_folder("validation"):
        held_out = {name for name in names if name.startswith("validation/")}
        for side, missing in (("validation", not held_out), ("train", held_out == names)):
            if missing:
                raise InputError(
                    f"{folder.address}: {side}/ gives no usable clip, but validation/ is there; list its videos in "
                    "the metadata, or remove validation/"
                )
        return held_out
    held_out = {name for name in names if is_held_out(name)}
    if len(names) >= 2 and not held_out:
        held_out = {min(names, key=_hash_position)}
    elif held_out == names:
        held_out -= {max(names, key=_hash_position)}
    return held_out
