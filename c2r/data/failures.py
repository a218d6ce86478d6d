"""Notes on files that turned out unusable while they were encoded."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from c2r.data.clips import Source
from c2r.encoding.cache import CacheSettings
from c2r.files import digest, write_atomic


class Failure(NamedTuple):
    """A file that looked usable and is not."""

    source: Source
    reason: str
    detail: str  # one line that names the file
    settings: CacheSettings | None = None  # where the encoders fail, and the file may be good for others


def note_failure(cache_dir, failure: Failure):
    """Note that a file, as it is now, gives no clips: the next `read_manifest` drops it with this reason."""
    source, settings = failure.source, failure.settings and asdict(failure.settings)
    key = [source.name, source.size, source.mtime_ns, settings]
    note = {"file": key[:3], "reason": failure.reason, "detail": failure.detail, "settings": settings}
    write_atomic(Path(cache_dir) / "failures" / f"{digest(key)}.json", json.dumps(note).encode())


def noted_failures(cache_dir, options) -> dict[tuple[str, int, int], tuple[str, str]]:
    """{(name, size, mtime_ns) of a file: (reason, detail)} of all notes that count for these options."""
    noted, current = {}, None
    for path in Path(cache_dir).glob("failures/*.json"):
        try:
            note = json.loads(path.read_text())
            file, reason, detail, settings = (note[name] for name in ("file", "reason", "detail", "settings"))
        except (OSError, ValueError, KeyError):  # then it is found out again
            continue
        if settings is not None:
            current = current or asdict(CacheSettings.from_options(options))
        if settings in (None, current):
            noted[tuple(file)] = reason, f"{detail} (noted in {path}; delete that to try again)"
    return noted
