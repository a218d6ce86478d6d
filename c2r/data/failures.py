"""Notes on files, or windows of files, that looked usable but could not be encoded."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from c2r import InputError
from c2r.data.clips import DatasetFile
from c2r.data.drop_reasons import DropReason
from c2r.files import digest, read_json, write_atomic

logger = logging.getLogger(__name__)


class Window(NamedTuple):
    """The part of a file that a clip shows."""

    start: float  # seconds from the file's first frame
    num_frames: int
    fps: float


class Failure(NamedTuple):
    """A file, or one window of it, that could not be decoded or encoded."""

    file: DatasetFile
    reason: DropReason
    detail: str  # one line that names the file
    settings: dict[str, Any] | None = None  # the encoders that failed, if other encoders may succeed
    window: Window | None = None  # None: the whole file


class _Note(TypedDict):
    """The content of a note's file."""

    file: tuple[str, int, int]  # name, size and mtime_ns
    reason: DropReason
    detail: str
    settings: dict[str, Any] | None
    window: tuple[float, int, float] | None  # start, num_frames and fps


def note_failure(cache_dir: str | Path, failure: Failure) -> None:
    """Note a failure in a dataset's cache.

    The next `read_manifest` drops the file, or the window, as long as the file does not change.
    """
    file = failure.file
    key = [file.name, file.size, file.mtime_ns, failure.settings, failure.window]
    note = _Note(
        file=(file.name, file.size, file.mtime_ns),
        reason=failure.reason,
        detail=failure.detail,
        settings=failure.settings,
        window=failure.window,
    )
    write_atomic(Path(cache_dir) / "failures" / f"{digest(key)}.json", json.dumps(note).encode())


def noted_failures(
    cache_dir: str | Path, current_encoders: Callable[[], dict[str, Any]] | None
) -> dict[tuple[str, int, int], dict[Window | None, tuple[DropReason, str]]]:
    """Read the notes that apply to the current encoders.

    Args:
        cache_dir: the dataset's.
        current_encoders: gives what `Failure.settings` would be now; called only if a note names encoders. None:
            notes that name encoders do not apply.

    Returns:
        {(name, size, mtime_ns) of a file: {window, or None for the whole file: (reason, detail)}}.
    """
    noted: dict[tuple[str, int, int], dict[Window | None, tuple[DropReason, str]]] = {}
    current = None
    for path in Path(cache_dir).glob("failures/*.json"):
        try:
            note = read_json(path, _Note)
        except InputError as error:
            logger.warning("%s; the note is ignored, and its file tried again", error)
            continue
        settings = note["settings"]
        if settings is not None and current_encoders is not None:
            current = current or current_encoders()
        if settings in (None, current):
            detail = f"{note['detail']} (noted in {path}; delete this note to try again)"
            window = None if note["window"] is None else Window(*note["window"])
            noted.setdefault(note["file"], {})[window] = note["reason"], detail
    return noted
