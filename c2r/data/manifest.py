"""A dataset folder as clips: which windows of which files are used, which are held out, which are dropped and why."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import datasets
from datasets import Dataset
from tqdm import tqdm

from c2r import InputError
from c2r.data.cache import cache_folder, check_clip_shape, digest, undecodable_path, write_atomic
from c2r.data.video import VideoInfo, exact, probe

METADATA_READERS = {
    # Captions are text, also "NA" and "007"; utf-8-sig because spreadsheet programs write a byte order mark.
    "metadata.csv": lambda path, **kwargs: Dataset.from_csv(
        path,
        encoding="utf-8-sig",
        na_filter=False,
        converters=dict.fromkeys(("file_name", "text", "control_name"), str),
        **kwargs,
    ),
    "metadata.jsonl": Dataset.from_json,
    "metadata.parquet": Dataset.from_parquet,
}
HELD_OUT_FRACTION = 0.05
# A pair's rates may differ by this much: 23.976 and 24 are one rate to a clip of seconds.
RATE_TOLERANCE = 0.005
# And its aspect ratios: encoders round sizes to even numbers. At 832 pixels this moves the edge by 4.
ASPECT_TOLERANCE = 0.01
# Fewer files than this are looked into before a progress bar could be read.
BAR_FROM = 200


@dataclass(frozen=True)
class Clip:
    """One window of one file, or of both files of a CG pair."""

    folder: str  # the dataset's
    name: str  # of the file within the folder, with forward slashes
    text: str
    domain: str  # "real" or "cg"
    window: int  # 0, 1, …
    start: float  # seconds from the file's first frame
    size: int  # of the file, in bytes
    mtime_ns: int
    held_out: bool
    control_name: str | None = None  # the coarse video: of a CG pair, or of a real clip, for validation alone
    control_size: int | None = None
    control_mtime_ns: int | None = None

    @property
    def file(self) -> str:
        """Path of the video whose latents are learned."""
        return str(Path(self.folder) / self.name)

    @property
    def control_file(self) -> str | None:
        """Path of the coarse video of a CG pair; a real clip is its own control."""
        return self.coarse_file if self.domain == "cg" else None

    @property
    def coarse_file(self) -> str | None:
        """Path of the coarse video: each CG pair has one, and a real clip may."""
        return self.control_name and str(Path(self.folder) / self.control_name)


@dataclass(frozen=True)
class Dropped:
    """A metadata row that is not used, or not in full. Rows are counted by `reason`; `detail` tells them apart."""

    file: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Source:
    """A file of the dataset as it is on disk."""

    folder: Path
    name: str
    size: int
    mtime_ns: int


class DropRow(Exception):
    """Raised with (reason, detail) while a row is looked into; ends in the manifest's `dropped`."""


def is_held_out(name, fraction=HELD_OUT_FRACTION) -> bool:
    """Whether a file of this name is held out: by the name's SHA-256, so always the same, whatever else is there."""
    return _place(name) < fraction


def _place(name) -> float:
    """A number in [0, 1) that belongs to a file name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def clips_fingerprint(clips) -> str:
    """SHA-256 hex of a list of clips: names, windows, sizes, times of change and captions."""
    return digest(
        [
            [c.name, c.window, c.start, c.size, c.mtime_ns, c.text, c.control_name, c.control_size, c.control_mtime_ns]
            for c in clips
        ]
    )


@dataclass(frozen=True)
class Manifest:
    """What is used of a dataset folder, in the order of its metadata."""

    folder: Path
    domain: str
    clips: list[Clip]
    dropped: list[Dropped]
    cache_dir: Path
    # Real rows that are kept, but without the coarse version that they name.
    without_coarse: list[Dropped] = field(default_factory=list)

    @property
    def train(self) -> list[Clip]:
        return [clip for clip in self.clips if not clip.held_out]

    @property
    def held_out(self) -> list[Clip]:
        return [clip for clip in self.clips if clip.held_out]

    @property
    def fingerprint(self) -> str:
        """`clips_fingerprint` of all clips."""
        return clips_fingerprint(self.clips)

    def report(self):
        """Print how many clips are used and how many rows dropped, by reason, and write the list into the cache."""
        path = self.cache_dir / f"manifest-{self.domain}-{self.folder.name}.csv"
        self.write(path)
        files = len({clip.name for clip in self.clips})
        print(
            f"{self.folder} ({self.domain}): kept {len(self.clips)} clips of {files} files "
            f"({len(self.train)} to train on, {len(self.held_out)} held out), "
            f"dropped {len(self.dropped)} rows{': ' if self.dropped else ''}{by_reason(self.dropped)}; list in {path}",
            flush=True,
        )
        if self.without_coarse:
            print(
                f"{self.folder} ({self.domain}): kept {len(self.without_coarse)} rows without their coarse version: "
                f"{by_reason(self.without_coarse)}",
                flush=True,
            )

    def write(self, path):
        """Write every clip and every dropped row as csv: file, window, use (train, held out, dropped, without coarse
        version), reason."""
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["file_name", "window", "use", "reason"])
        writer.writerows((c.name, c.window, "held out" if c.held_out else "train", "") for c in self.clips)
        for use, rows in (("dropped", self.dropped), ("without coarse version", self.without_coarse)):
            for row in rows:
                writer.writerow([row.file, "", use, f"{row.reason}: {row.detail}" if row.detail else row.reason])
        try:
            write_atomic(Path(path), table.getvalue().encode())
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); give a --cache_dir that can be"
            ) from error


def by_reason(dropped) -> str:
    """'3 shorter than 81 frames at 16 fps, 1 file not found', the most frequent first."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row.reason for row in dropped).most_common())


def read_manifest(folder, domain, options) -> Manifest:
    """Read a dataset folder's metadata and look into its files.

    Args:
        folder: has metadata.csv, .jsonl or .parquet (columns file_name, text, and control_name for CG pairs), in
            itself or in train/, and perhaps in validation/. Names are relative to the metadata's folder, to the
            dataset folder or to its train/.
        domain: "real" or "cg". A real row may name its coarse version as control_name; one that does not fit is not
            used, and the row is kept.
        options: has height, width, num_frames, fps, and perhaps cache_dir.

    Returns:
        `Manifest`. Held-out files are those in validation/ where there is one; otherwise about 5 %, by a hash of the
        name, and at least one where there are two. All windows of a file fall on one side.

    Raises:
        InputError: no folder, metadata or column, or not one usable row.
    """
    check_clip_shape(options)
    folder = Path(folder).resolve()
    rows = _read_rows(folder, ["file_name", "text"] + ["control_name"] * (domain == "cg"), ["control_name"])
    cache_dir = cache_folder(folder, getattr(options, "cache_dir", None))
    dropped, without_coarse, usable = [], [], []
    for row in rows:
        try:
            sources = [_locate(folder, row["folder"], row["file_name"])]
            if domain == "cg" or row.get("control_name"):
                try:
                    sources.append(_locate(folder, row["folder"], row["control_name"]))
                except DropRow as drop:
                    if domain == "cg":
                        raise
                    without_coarse.append(Dropped(sources[0].name, *drop.args))
            usable.append((row["text"], sources))
        except DropRow as drop:
            dropped.append(Dropped(row["file_name"], *drop.args))
    probes = _probe_all({source for _, sources in usable for source in sources}, cache_dir)

    def windows_of(text, sources):
        count = _count_windows([probes[source] for source in sources], options)
        for source in sources:
            _require_decodable(source, cache_dir)
        return _windows(folder, domain, text, sources, count, options)

    clips = []
    for text, sources in usable:
        name = sources[0].name
        try:
            clips += windows_of(text, sources)
        except DropRow as drop:
            try:
                if domain == "cg" or len(sources) == 1:
                    raise
                clips += windows_of(text, sources[:1])
                without_coarse.append(Dropped(name, *drop.args))
            except DropRow as own:
                dropped.append(Dropped(name, *own.args))
    if not clips:
        raise InputError(
            f"{folder}: none of its {len(rows)} rows can be used ({by_reason(dropped) or 'the metadata is empty'}); "
            f"{_first_detail(dropped)}see the README on datasets"
        )
    held_out = _held_out_names(folder, {clip.name for clip in clips})
    clips = [Clip(**clip.__dict__ | {"held_out": clip.name in held_out}) for clip in clips]
    return Manifest(folder, domain, clips, dropped, cache_dir, without_coarse)


def _first_detail(dropped):
    detail = next((f"{row.file}: {row.detail}" for row in dropped if row.detail), "")
    return f"the first: {detail}; " if detail else ""


# ---------------------------------------------------------------------------------------------------------- metadata


def _read_rows(folder, columns, optional=()):
    """The metadata's rows as dicts of text, with the "folder" that their names are relative to."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such dataset folder; check the path")
    main = _find_metadata(folder) or _find_metadata(folder / "train")
    if main is None:
        raise InputError(f"{folder}: has no metadata.csv, .jsonl or .parquet, nor has its train/; add one of them")
    rows = []
    for path in filter(None, (main, _find_metadata(folder / "validation"))):
        table = _read_table(path)
        for column in columns:
            if column not in table.column_names:
                raise InputError(
                    f"{path}: has no column {column} (its columns: {', '.join(table.column_names)}); "
                    + ("CG pairs need the coarse video's name there" if column == "control_name" else "add it")
                )
        present = [column for column in optional if column in table.column_names and column not in columns]
        for row in table.select_columns([*columns, *present]).to_list():
            rows.append({name: "" if value is None else str(value) for name, value in row.items()})
            rows[-1]["folder"] = path.parent
    return rows


def _find_metadata(folder):
    found = [folder / name for name in METADATA_READERS if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: has {' and '.join(path.name for path in found)}; keep one of them")
    return found[0] if found else None


def _read_table(path) -> Dataset:
    """The metadata through `datasets`, into memory: an old copy in its cache could hide an edit of the file."""
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the exception
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return METADATA_READERS[path.name](str(path), cache_dir=scratch, keep_in_memory=True)
    except Exception as error:  # pandas, pyarrow and datasets each have their own
        if "corresponds to no data" in str(error):
            raise InputError(f"{path}: has no rows; list the videos in it") from error
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path}: cannot be read ({reason}); correct the file") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _locate(folder, metadata_folder, name) -> Source:
    """The file that a row names."""
    if not name:
        raise DropRow("without a file name")
    for base in (metadata_folder, folder, folder / "train"):
        path = Path(os.path.normpath(base / name))
        if not (base.is_dir() and path.is_file()):
            continue
        # Both as written and as it is on disk: neither ".." nor a link may lead out of the dataset.
        if not (path.is_relative_to(folder) and path.resolve().is_relative_to(folder)):
            raise DropRow("outside the dataset folder", f"{name} leads to {path.resolve()}")
        status = path.stat()
        return Source(folder, path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)
    raise DropRow("file not found", name)


# ------------------------------------------------------------------------------------------------------------- files


def _probe_all(sources, cache_dir) -> dict[Source, VideoInfo | InputError]:
    """`probe` of every file; what an earlier run found out is taken from the cache."""
    store = cache_dir / "probes.json"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}
    keys = {source: digest([source.name, source.size, source.mtime_ns, "1"]) for source in sources}
    unknown = sorted((source for source in sources if keys[source] not in known), key=lambda source: source.name)

    def look_into(source):
        try:
            return probe(source.folder / source.name)
        except InputError as error:
            return error

    with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool:
        quiet = len(unknown) < BAR_FROM or os.environ.get("RANK", "0") != "0"
        bar = tqdm(
            pool.map(look_into, unknown), total=len(unknown), desc="looking into files", unit="file", disable=quiet
        )
        found = dict(zip(unknown, bar))
    # Failures are not kept: a right to read or a file server may come back without a change of the file.
    new = {keys[source]: _pack(info) for source, info in found.items() if isinstance(info, VideoInfo)}
    if new:
        # A cache that cannot be written is an error where it must be written.
        with suppress(OSError):
            write_atomic(store, json.dumps(known | new).encode())
    return found | {source: _unpack(known[keys[source]]) for source in sources if source not in found}


def _pack(info: VideoInfo):
    return [str(info.last), str(info.interval), info.aspect, info.is_image]


def _unpack(stored) -> VideoInfo:
    last, interval, aspect, is_image = stored
    return VideoInfo(Fraction(last), Fraction(interval), aspect, is_image)


def _count_windows(infos, options) -> int:
    """How many windows a file, or a pair of files, gives; DropRow if none."""
    for info in infos:
        if isinstance(info, InputError):
            raise DropRow("cannot be decoded", str(info))
    if len(infos) == 2:
        _require_pair(*infos)
    frames = min(info.frames_at(options.fps) for info in infos)
    if frames < options.num_frames:
        if infos[0].is_image:
            raise DropRow("single images", f"num_frames is {options.num_frames}")
        raise DropRow(
            f"shorter than {options.num_frames} frames at {options.fps:g} fps",
            f"{frames} frames, {float(infos[0].duration):.2f} s",
        )
    return frames // options.num_frames


def _require_pair(fine, coarse):
    if fine.is_image or coarse.is_image:
        if fine.is_image != coarse.is_image:
            raise DropRow("pairs of an image and a video")
    else:
        if abs(fine.rate / coarse.rate - 1) > RATE_TOLERANCE:
            raise DropRow("pairs of different frame rates", f"{fine.rate:g} fps, its control {coarse.rate:g} fps")
        if abs(fine.duration - coarse.duration) > max(fine.interval, coarse.interval) * Fraction(3, 2):
            lengths = f"{float(fine.duration):.2f} s, its control {float(coarse.duration):.2f} s"
            raise DropRow("pairs of different lengths", lengths)
    if abs(fine.aspect / coarse.aspect - 1) > ASPECT_TOLERANCE:
        raise DropRow("pairs of different aspect ratios", f"{fine.aspect:.3f}, its control {coarse.aspect:.3f}")


def _require_decodable(source, cache_dir):
    """DropRow if an encoding pass has noted that this very file fails in its middle."""
    note = undecodable_path(cache_dir, source)
    if note.is_file():
        raise DropRow("cannot be decoded", f"{json.loads(note.read_text())['reason']} (noted in {note})")


def _windows(folder, domain, text, sources, count, options):
    source, control = sources[0], sources[1] if len(sources) == 2 else None
    for window in range(count):
        yield Clip(
            folder=str(folder),
            name=source.name,
            text=text,
            domain=domain,
            window=window,
            start=float(window * options.num_frames / exact(options.fps)),
            size=source.size,
            mtime_ns=source.mtime_ns,
            held_out=False,
            control_name=control and control.name,
            control_size=control and control.size,
            control_mtime_ns=control and control.mtime_ns,
        )


def _held_out_names(folder, names) -> set[str]:
    if (folder / "validation").is_dir():
        held_out = {name for name in names if name.startswith("validation/")}
        for side, missing in (("validation", not held_out), ("train", held_out == names)):
            if missing:
                raise InputError(
                    f"{folder}: {side}/ gives no usable clip, but validation/ is there; list its videos in the "
                    "metadata, or remove validation/"
                )
        return held_out
    held_out = {name for name in names if is_held_out(name)}
    by_place = sorted(names, key=_place)
    if len(names) >= 2:
        held_out = (held_out or {by_place[0]}) - ({by_place[-1]} if held_out == names else set())
    elif held_out == names:
        held_out = set()
    return held_out
