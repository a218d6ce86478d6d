"""Manifests: the clips of a dataset, which of them are held out, and which rows are dropped for which reason."""

import csv
import hashlib
import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pyarrow as pa

from c2r import InputError
from c2r.data.buckets import MUCH_CROPPED, fitting_size
from c2r.data.clips import Clip, Clips
from c2r.data.drop_reasons import DroppedRow, DropRow
from c2r.data.failures import noted_failures
from c2r.data.folders import DatasetFolder, open_folder
from c2r.data.probes import Probes
from c2r.data.rows import locate_rows
from c2r.data.settings import ClipSettings
from c2r.data.video_info import VideoInfo
from c2r.data.windows import WindowCutter
from c2r.files import digest, refuse_linked_folders, write_atomic

logger = logging.getLogger(__name__)

HELD_OUT_FRACTION = 0.05
#: Share of the clips' frame rate below which a file is warned of; a rate that was rounded is above it.
MIN_RATE_SHARE = 0.95


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
    # Frames per second of the same files; infinite for images.
    rates: np.ndarray = field(default_factory=lambda: np.empty(0))

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
        self._report_repeated_frames(name)
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

    def _report_repeated_frames(self, name):
        """Log how many files have clearly fewer frames per second than their clips."""
        fps, rates = self.clips.tables[0].fps, self.rates[self.clips.entries["row"]]
        moving = np.array([bucket.num_frames > 1 for bucket in self.clips.buckets])[self.clips.bucket_numbers]
        slow = np.flatnonzero(moving & (rates < MIN_RATE_SHARE * fps))
        if len(slow):
            slowest = int(slow[np.argmin(rates[slow])])
            logger.warning(
                f"{name}: {self.clips[slow].file_count} of {self.clips.file_count} files have fewer frames per second "
                f"than --fps {fps:g}, {self.clips[slowest].name} the fewest, {rates[slowest]:.3g}: frames of their "
                "clips repeat, so that they stutter; lower --fps, or give videos of a higher rate"
            )

    def write(self, remarks: Mapping[str, str] = MappingProxyType({})) -> Path:
        """Write the clips and dropped rows as a CSV file into the cache, and return its path.

        Columns: file_name, window, bucket, cropped (share of the picture), use (train, held out, dropped, without
        coarse version), reason.

        Args:
            remarks: what is said of clips that are used, by caption.
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
        names, texts, uses = table.names.to_pylist(), table.texts, ("train", "held out")
        rows, windows, buckets, held_out = (entries[name].tolist() for name in ("row", "window", "bucket", "held_out"))
        for row, window, bucket, held, cropped in zip(rows, windows, buckets, held_out, self.cropped.tolist()):
            remark = remarks.get(texts[row].as_py(), "") if remarks else ""
            writer.writerow([names[row], window, table.buckets[bucket], f"{cropped:.2f}", uses[held], remark])
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
    table, dropped, without_coarse, row_count = locate_rows(folder, domain, cache_dir, settings.sequence_fps)
    probes = Probes(cache_dir)
    probes.probe_missing(folder, (file for row in range(len(table)) for file in table.files(row)))
    cutter = WindowCutter(domain, probes, noted_failures(cache_dir, current_encoders), settings)
    aspects, rates = (np.full(len(table), np.nan) for _ in range(2))
    for row in range(len(table)):
        files, part = table.files(row), table.parts[row]
        try:
            try:
                windows = cutter.cut(files, part)
            except DropRow as drop:
                if domain == "cg" or len(files) == 1:
                    raise
                windows = cutter.cut(files[:1], part)
                table.control_names[row] = None
                without_coarse.append(DroppedRow(files[0].name, drop.reason, drop.detail))
            table.add_windows(row, windows)
            info = cast(VideoInfo, probes.of(files[0]))
            aspects[row], rates[row] = info.aspect, math.inf if info.is_image else info.rate
        except DropRow as drop:
            dropped.append(DroppedRow(files[0].name, drop.reason, drop.detail))
    clips = table.clips(domain, settings.fps, settings.buckets)
    manifest = Manifest(
        folder.address, domain, clips, dropped, cache_dir, row_count, without_coarse, cutter.dropped, aspects, rates
    )
    manifest.require_kept(settings.max_dropped)
    _hold_out(folder, clips)
    return manifest


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
