"""Find the videos and image sequences of a folder, and measure them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from c2r import InputError
from c2r.data.clips import DatasetFile
from c2r.data.drop_reasons import DroppedRow, DropReason, DropRow
from c2r.data.folders import LocalFolder
from c2r.data.probes import Probes
from c2r.data.sequences import SUFFIXES, numbered_pictures
from c2r.data.video_info import UnusableVideo, VideoInfo

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv"),
    *(".ts", ".webm", ".wmv"),
)
#: Fewer numbered pictures are taken for single pictures.
MIN_PICTURES = 5


class Source(NamedTuple):
    """A video file or an image sequence."""

    name: str  #: path within the folder, as a metadata row names it
    stem: str  #: the path without its ending
    is_sequence: bool


@dataclass(frozen=True)
class Video:
    """A source that can be decoded."""

    source: Source
    file: DatasetFile
    info: VideoInfo
    fps: float | None  #: rate of an image sequence

    @property
    def name(self) -> str:
        """Path within the folder, as a metadata row names it."""
        return self.source.name


def is_unicode(name: str) -> bool:
    """Return True if a file name is text; Python gives other bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def list_sources(folder: str) -> tuple[list[Source], int]:
    """Find the videos and image sequences of a folder and its folders, but not in those whose name begins with a dot.

    Returns:
        the sources by name, and the number of pictures that belong to no sequence. Links to folders are not followed.

    Raises:
        InputError: a name is not UTF-8.
    """
    sources, pictures = [], 0
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(parent, folder)
        files = [name for name in files if not name.startswith(".")]
        for name in files:
            if not is_unicode(name):
                raise InputError(
                    f"{folder}: the name of {name!a} is not UTF-8, which metadata.csv has to be; rename it"
                )
            stem, suffix = os.path.splitext(os.path.normpath(os.path.join(inside, name)))
            if suffix.lower() in VIDEO_SUFFIXES:
                sources.append(Source(stem + suffix, stem, False))
        found = {key: numbers for key, numbers in numbered_pictures(parent).items() if len(numbers) >= MIN_PICTURES}
        sources += [_sequence(inside, *key, numbers, len(found)) for key, numbers in found.items()]
        pictures += sum(name.lower().endswith(SUFFIXES) for name in files) - sum(map(len, found.values()))
    return sorted(sources), pictures


def _sequence(inside, prefix, suffix, numbers, count):
    """Return a sequence, named by its folder if it is the only one in it."""
    if count == 1 and inside != ".":
        return Source(inside, inside, True)
    pattern = f"{prefix}{'#' * min(map(len, numbers))}{suffix}"
    stem = prefix.rstrip("_-. ") or pattern
    return Source(*(os.path.normpath(os.path.join(inside, name)) for name in (pattern, stem)), True)


def measure(
    folder: LocalFolder, sources: Iterable[Source], rates: Mapping[str, float | None], probes: Probes
) -> tuple[dict[str, Video], list[DroppedRow]]:
    """Locate and probe sources.

    Args:
        folder: the folder that holds them.
        sources: see `list_sources`.
        rates: frames per second of each sequence, by name.
        probes: keeps what is measured.

    Returns:
        the videos that can be used, by name, and the others with their reasons.

    Raises:
        InputError: a sequence has no rate, or a file cannot be reached.
    """
    without_rate = [source.name for source in sources if source.is_sequence and rates.get(source.name) is None]
    if without_rate:
        raise InputError(
            f"--sequence_fps: missing, and {folder.address} holds image sequences ({some(without_rate)}); give their "
            "frames per second"
        )
    files, unusable = {}, []
    for source in sources:
        try:
            file = (
                folder.locate_sequence(source.name, rates[source.name])
                if source.is_sequence
                else folder.locate(source.name)
            )
            if file is None:
                raise DropRow(
                    DropReason.MISSING_FILE, f"{source.name}: it is no regular file, or a link that leads nowhere"
                )
            files[source] = file
        except DropRow as drop:
            unusable.append(DroppedRow(source.name, drop.reason, drop.detail))
    probes.probe_missing(folder, files.values())
    videos = {}
    for source, file in files.items():
        info = probes.of(file)
        if isinstance(info, UnusableVideo):
            unusable.append(DroppedRow(source.name, info.reason, str(info)))
        else:
            fps = rates[source.name] if source.is_sequence else None
            videos[source.name] = Video(source, file, info, fps)
    return videos, unusable


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of some names, and the number of the others: "a, b, c and 2 more"."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
