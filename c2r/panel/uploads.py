"""The coarse video that a user uploads, and its limits."""

import os
from collections.abc import Sequence
from pathlib import Path

from c2r import InputError

#: Limits of an upload, beside --max_upload_mb: seconds of a video, pixels of a frame, pictures of a sequence. Only the
#: frames of one clip are kept in memory.
MAX_SECONDS, MAX_FRAME_PIXELS, MAX_PICTURES = 600, 4096 * 4096, 5000


def place_upload(files: Sequence[str] | None, folder: Path, max_mb: int) -> tuple[str, str]:
    """Return the path of an upload, and its name for a command; pictures are first put into a new folder.

    Raises:
        InputError: there is none, it is too large, or its files are not the pictures of one sequence.
    """
    from c2r.data.sequences import SUFFIXES

    if not files:
        raise InputError("--control_video: missing; upload a video, or the numbered pictures of a sequence")
    size = sum(os.path.getsize(file) for file in files)
    if size > max_mb * 10**6:
        raise InputError(
            f"--control_video: {size / 1e6:.0f} MB, above {max_mb} MB; scale it down, or restart "
            "with a higher --max_upload_mb"
        )
    if len(files) == 1:
        return files[0], Path(files[0]).name
    if len(files) > MAX_PICTURES:
        raise InputError(f"--control_video: {len(files)} files, above {MAX_PICTURES:,}; upload fewer")
    for file in files:
        if not file.lower().endswith(SUFFIXES):
            raise InputError(
                f"--control_video {Path(file).name}: is no picture, and only the pictures of a sequence are several "
                "files; remove the others, or this one"
            )
    sequence = folder / "upload"
    sequence.mkdir()
    for file in files:
        picture = sequence / Path(file).name
        if picture.exists():
            raise InputError(f"--control_video {picture.name}: uploaded twice; remove one of the two")
        os.link(file, picture)
    return str(sequence), "FOLDER"


def require_within_limits(path: str) -> None:
    """Raise InputError for a video that is too long or too large."""
    from c2r.data.video import probe

    info = probe(path)
    width = round(info.height * info.aspect)
    if info.duration > MAX_SECONDS:
        raise InputError(f"--control_video {path}: {info.duration:.0f} s long, above {MAX_SECONDS} s; cut it")
    if info.height * width > MAX_FRAME_PIXELS:
        raise InputError(
            f"--control_video {path}: {width}x{info.height} pixels, above {MAX_FRAME_PIXELS:,}; scale it down"
        )
