"""Notes on files, or windows of files, that looked usable but could not be encoded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from c2r.data.clips import DatasetFile
from c2r.data.drop_reasons import DropReason
from c2r.files import digest, write_atomic


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


def note_failure(cache_dir: str | Path, failure: Failure) -> None:
    """Note a failure in a dataset's cache.

    The next `read_manifest` drops the file, or the window, as long as the file does not change.
    """
    file = failure.file
    key = [file.name, file.size, file.mtime_ns, failure.settings, failure.window]
    note = {"file": key[:3], "reason": failure.reason, "detail": failure.detail, "settings": failure.settings}
    note["window"] = failure.window
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
            note = json.loads(path.read_text())
            file, detail, settings = note["file"], note["detail"], note["settings"]
            reason = DropReason(note["reason"])
            window = note["window"] and Window(*note["window"])
        except (OSError, ValueError, KeyError, TypeError):  # a file without a legible note is tried again
            continue
        if settings is not None and current_encoders is not None:
            current = current or current_encoders()
        if settings in (None, current):
            detail = f"{detail} (noted in {path}; delete this note to try again)"
            noted.setdefault(tuple(file), {})[window] = reason, detail
    return noted
