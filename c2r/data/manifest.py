"""A dataset as clips: which windows of which files are used, which are held out, which rows are dropped and why."""

import csv
import hashlib
import io
from array import array
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from c2r import InputError
from c2r.data.buckets import buckets_of, cut_into_windows, nearest_buckets
from c2r.data.clips import INDEX, Clips, FileTable, Source, cache_folder
from c2r.data.failures import noted_failures
from c2r.data.folders import DropRow, open_folder
from c2r.data.metadata import find_metadata, rows_of
from c2r.data.probes import Probes
from c2r.data.video import UnusableVideo
from c2r.files import digest, write_atomic

HELD_OUT_FRACTION = 0.05
# A pair's rates may differ by this much: 23.976 and 24 are one rate to a clip of seconds.
RATE_TOLERANCE = 0.005
# And its aspect ratios: encoders round sizes to even numbers. At 832 pixels this moves the edge by 4.
ASPECT_TOLERANCE = 0.01


@dataclass(frozen=True)
class Dropped:
    """A metadata row that is not used, or not in full. Rows are counted by `reason`; `detail` tells them apart."""

    file: str
    reason: str
    detail: str = ""


def is_held_out(name, fraction=HELD_OUT_FRACTION) -> bool:
    """Whether a file of this name is held out: by the name's SHA-256, so always the same, whatever else is there."""
    return _place(name) < fraction


def _place(name) -> float:
    """A number in [0, 1) that belongs to a file name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def clips_fingerprint(clips) -> str:
    """SHA-256 hex of a sequence of clips: names, windows, buckets, sizes, times of change and captions."""
    content = hashlib.sha256()
    for c in clips:
        entry = (c.name, c.window, c.start, *c.bucket, c.size, c.mtime_ns, c.text)
        content.update(f"{entry}{c.control_name, c.control_size, c.control_mtime_ns}".encode())
    return content.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What is used of a dataset, in the order of its metadata."""

    folder: str  # or address
    domain: str
    clips: Clips
    dropped: list[Dropped]
    cache_dir: Path
    row_count: int  # of the metadata
    # Real rows that are kept, but without the coarse version that they name.
    without_coarse: list[Dropped] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For messages."""
        return self.folder

    @property
    def train(self) -> Clips:
        return self.clips[~self.clips.index["held_out"]]

    @property
    def held_out(self) -> Clips:
        return self.clips[self.clips.index["held_out"]]

    @cached_property
    def fingerprint(self) -> str:
        """`clips_fingerprint` of all clips."""
        return clips_fingerprint(self.clips)

    def report(self):
        """Print how many clips are used and how many rows dropped, by reason, and write the list into the cache."""
        path = self.write()
        held_out = int(self.clips.index["held_out"].sum())
        print(
            f"{self.folder} ({self.domain}): kept {len(self.clips)} clips of {self.clips.file_count} files "
            f"({len(self.clips) - held_out} to train on, {held_out} held out), "
            f"dropped {len(self.dropped)} rows{': ' if self.dropped else ''}{by_reason(self.dropped)}; list in {path}",
            flush=True,
        )
        if len(self.clips.buckets) > 1:
            numbers = Counter(self.clips.bucket_numbers.tolist())
            shares = ", ".join(f"{numbers[i]} of {bucket}" for i, bucket in enumerate(self.clips.buckets))
            print(f"{self.folder} ({self.domain}): clips by bucket: {shares}", flush=True)
        if self.without_coarse:
            print(
                f"{self.folder} ({self.domain}): kept {len(self.without_coarse)} rows without their coarse version: "
                f"{by_reason(self.without_coarse)}",
                flush=True,
            )

    def write(self) -> Path:
        """Write every dropped row and every clip as csv into the cache: file, window, bucket, use (train, held out,
        dropped, without coarse version), reason. Returns the file's path."""
        # Datasets that share a cache may have folders of one name.
        path = self.cache_dir / f"manifest-{self.domain}-{Path(self.folder).name}-{digest(self.folder)[:6]}.csv"
        content = io.StringIO()
        writer = csv.writer(content)
        writer.writerow(["file_name", "window", "bucket", "use", "reason"])
        for use, rows in (("dropped", self.dropped), ("without coarse version", self.without_coarse)):
            for row in rows:
                reason = f"{row.reason}: {row.detail}" if row.detail else row.reason
                writer.writerow([row.file, "", "", use, reason])
        index, table = self.clips.index, self.clips.tables[0]
        names, uses = table.names.to_pylist(), ("train", "held out")
        rows, windows, buckets, held_out = (index[name].tolist() for name in ("row", "window", "bucket", "held_out"))
        for row, window, bucket, held in zip(rows, windows, buckets, held_out):
            writer.writerow([names[row], window, table.buckets[bucket], uses[held], ""])
        try:
            write_atomic(path, content.getvalue().encode(errors="replace"))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); give a --cache_dir that can be"
            ) from error
        return path

    def require_kept(self, max_dropped=None):
        """Write the list and raise InputError if there is no clip, or more than this share of the rows is dropped."""
        if not len(self.clips):
            raise InputError(
                f"{self.folder}: none of its {self.row_count} rows can be used "
                f"({by_reason(self.dropped) or 'the metadata is empty'}); {_first_detail(self.dropped)}"
                f"list in {self.write()}; see the README on datasets"
            )
        if max_dropped is not None and len(self.dropped) > max_dropped * self.row_count:
            raise InputError(
                f"{self.folder}: {len(self.dropped)} of {self.row_count} rows are dropped "
                f"({by_reason(self.dropped)}), more than --max_dropped {max_dropped:g}; mend them, or raise it; "
                f"list in {self.write()}"
            )


def by_reason(dropped) -> str:
    """'3 too short, 1 missing file', the most frequent first."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row.reason for row in dropped).most_common())


class _Rows:
    """The columns of a `FileTable`, of the rows whose files are there, and of the index, while they are filled.

    Args:
        folder: `LocalFolder` or `RemoteDataset`, of all rows.
    """

    def __init__(self, folder):
        self.folder, self.names, self.texts, self.control_names = folder, [], [], []
        self.numbers = {name: array("q") for name in ("sizes", "mtimes", "control_sizes", "control_mtimes")}
        self.windows = {name: array("q") for name in ("row", "window", "first_frame", "bucket")}

    def __len__(self):
        return len(self.names)

    def add(self, text, source, coarse=None):
        """Add a row with the `Source` of its file, and of its coarse video."""
        self.names.append(source.name)
        self.texts.append(text)
        self.control_names.append(coarse and coarse.name)
        self.numbers["sizes"].append(source.size)
        self.numbers["mtimes"].append(source.mtime_ns)
        self.numbers["control_sizes"].append(coarse.size if coarse else 0)
        self.numbers["control_mtimes"].append(coarse.mtime_ns if coarse else 0)

    def sources(self, row):
        """The `Source`s of a row: its file, and its coarse video if it has one."""
        sizes, mtimes, control_sizes, control_mtimes = self.numbers.values()
        sources = [Source(self.folder.address, self.names[row], sizes[row], mtimes[row])]
        if (coarse := self.control_names[row]) is not None:
            sources.append(Source(self.folder.address, coarse, control_sizes[row], control_mtimes[row]))
        return sources

    def add_windows(self, row, windows):
        """Add windows, see `cut_into_windows`, of a row; a row without any is not used."""
        for window, (first, bucket) in enumerate(windows):
            for column, value in zip(self.windows.values(), (row, window, first, bucket)):
                column.append(value)

    def clips(self, domain, fps, buckets) -> Clips:
        """All of them, none held out yet."""
        index = np.zeros(len(self.windows["row"]), INDEX)
        for name, column in self.windows.items():
            index[name] = column
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
        return Clips([table], index)


def _hold_out(folder, clips):
    """Mark the clips that are held out, in place."""
    rows = np.unique(clips.index["row"])
    names = clips.tables[0].names.take(pa.array(rows)).to_pylist()
    held_out = _held_out_names(folder, set(names))
    is_held_out = np.zeros(rows[-1] + 1, bool)
    is_held_out[rows] = [name in held_out for name in names]
    clips.index["held_out"] = is_held_out[clips.index["row"]]


def read_manifest(address, domain, options) -> Manifest:
    """Read a dataset's metadata and look into its files.

    Args:
        address: a folder, or an fsspec address, with metadata.csv, .jsonl or .parquet (columns file_name, text, and
            control_name for CG pairs), in itself or in train/, and perhaps in validation/. Names are relative to the
            metadata's folder, to the dataset folder or to its train/.
        domain: "real" or "cg". A real row may name its coarse version as control_name; one that does not fit is not
            used, and the row is kept.
        options: has buckets (or height, width, num_frames), fps, and perhaps cache_dir and max_dropped.

    Returns:
        `Manifest`. Held-out files are those in validation/ where there is one; otherwise about 5 %, by a hash of the
        name, and at least one where there are two. All windows of a file fall on one side.

    Raises:
        InputError: no folder, metadata or column, not one usable row, or more than max_dropped lost.
    """
    buckets = buckets_of(options)
    folder = open_folder(address, options)
    cache_dir = cache_folder(folder.address, options)
    rows, dropped, without_coarse, row_count = _locate_rows(folder, domain, cache_dir)
    probes = Probes(cache_dir)
    probes.look_into(folder, (source for row in range(len(rows)) for source in rows.sources(row)))

    failures, known = noted_failures(cache_dir, options), {}

    def windows_of(sources):
        infos = [probes.of(source) for source in sources]
        alike = tuple(map(id, infos))  # `probes` keeps them
        if alike not in known:
            known[alike] = _windows(infos, buckets, options.fps)
        windows = known[alike]
        for source in sources:
            if source[1:] in failures:
                raise DropRow(*failures[source[1:]])
        return windows

    for row in range(len(rows)):
        sources = rows.sources(row)
        try:
            try:
                windows = windows_of(sources)
            except DropRow as drop:
                if domain == "cg" or len(sources) == 1:
                    raise
                windows = windows_of(sources[:1])
                rows.control_names[row] = None
                without_coarse.append(Dropped(sources[0].name, *drop.args))
            rows.add_windows(row, windows)
        except DropRow as drop:
            dropped.append(Dropped(sources[0].name, *drop.args))
    clips = rows.clips(domain, options.fps, buckets)
    manifest = Manifest(folder.address, domain, clips, dropped, cache_dir, row_count, without_coarse)
    manifest.require_kept(getattr(options, "max_dropped", None))
    _hold_out(folder, clips)
    return manifest


def _locate_rows(folder, domain, cache_dir):
    """(`_Rows` with files, dropped rows, coarse versions that are not there, count of all rows)."""
    rows, dropped, without_coarse, seen, row_count = _Rows(folder), [], [], set(), 0
    for place, table in find_metadata(folder, domain, cache_dir):
        row_count += len(table)
        # Names are relative to the metadata's folder, to the dataset's, or to its train/.
        bases = [base for base in dict.fromkeys((place, "", "train")) if folder.has_folder(base)]
        for name, text, control_name in rows_of(table, f"{folder.address}/{place}".rstrip("/")):
            try:
                sources = [_locate(folder, bases, name)]
                if not text.strip():
                    raise DropRow("empty caption", "")
                if domain == "cg" or control_name:
                    try:
                        sources.append(_locate(folder, bases, control_name))
                    except DropRow as drop:
                        if domain == "cg":
                            raise
                        without_coarse.append(Dropped(sources[0].name, *drop.args))
                if (row := hash((text, *sources))) in seen:
                    raise DropRow("duplicate row", "")
                seen.add(row)
                rows.add(text, *sources)
            except DropRow as drop:
                dropped.append(Dropped(name, *drop.args))
    return rows, dropped, without_coarse, row_count


def _first_detail(dropped):
    detail = next((f"{row.file}: {row.detail}" for row in dropped if row.detail), "")
    return f"the first: {detail}; " if detail else ""


def _locate(folder, bases, name):
    """The file that a row names, relative to the first base that has it."""
    if not name:
        raise DropRow("missing file", "the row names none")
    for base in bases:
        if (source := folder.locate(f"{base}/{name}" if base else name)) is not None:
            return source
    raise DropRow("missing file", name)


def _windows(infos, buckets, fps):
    """The windows of a file, or of a pair of files, see `cut_into_windows`; DropRow if there is none."""
    for info in infos:
        if isinstance(info, UnusableVideo):
            raise DropRow(info.reason, str(info))
    if len(infos) == 2:
        _require_pair(*infos)
    frames = min(info.frames_at(fps) for info in infos)
    windows = cut_into_windows(frames, infos[0], buckets)
    if windows:
        return windows
    if infos[0].is_image:
        raise DropRow("image", "no bucket has one frame")
    least = min(bucket.num_frames for bucket in nearest_buckets(infos[0], buckets))
    detail = f"{frames} frames at {fps:g} fps, {float(infos[0].duration):.2f} s; a clip takes {least}"
    if min(info.native_frames for info in infos) < least:
        raise DropRow("too short", detail)
    raise DropRow("too few frames after resampling", detail)


def _require_pair(fine, coarse):
    if fine.is_image or coarse.is_image:
        if fine.is_image != coarse.is_image:
            raise DropRow("pair of an image and a video", "")
    else:
        if abs(fine.rate / coarse.rate - 1) > RATE_TOLERANCE:
            raise DropRow("pair differs in rate", f"{fine.rate:g} fps, its control {coarse.rate:g} fps")
        if abs(fine.duration - coarse.duration) > max(fine.interval, coarse.interval) * Fraction(3, 2):
            lengths = f"{float(fine.duration):.2f} s, its control {float(coarse.duration):.2f} s"
            raise DropRow("pair differs in length", lengths)
    if abs(fine.aspect / coarse.aspect - 1) > ASPECT_TOLERANCE:
        raise DropRow("pair differs in aspect", f"{fine.aspect:.3f}, its control {coarse.aspect:.3f}")


def _held_out_names(folder, names) -> set[str]:
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
        held_out = {min(names, key=_place)}
    elif held_out == names:
        held_out -= {max(names, key=_place)}
    return held_out
