"""Open video files by PyAV, safely: no other file, no network, no enormous frames."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import av

from c2r import InputError
from c2r.data.drop_reasons import DropReason
from c2r.data.mp4_tables import require_honest_tables
from c2r.data.png_chunks import require_small_chunks
from c2r.data.video_info import MAX_PIXELS, SeekableFile, unusable_video

# Playlists, streams and files in parts are refused: they open files outside the dataset's folder, or the network.
REFERENCING_FORMATS = {"concat", "dash", "hls", "imf", "lavfi", "mlv", "rtp", "rtsp", "sap", "sdp", "vobsub"}
REFERENCING_FORMATS |= {"webm_dash_manifest"}
# AVI stores decode times only. They serve as show times because decoders of one thread output frames in show order.
DECODE_TIMES_FORMATS = {"avi"}
OPEN_OPTIONS = {
    "protocol_whitelist": "file",  # no network, whatever a file refers to
    # Formats are refused before they are opened: opening one opens the files that it refers to.
    "format_whitelist": ",".join(sorted(set(av.formats_available) - REFERENCING_FORMATS)),
    "pattern_type": "none",  # FFmpeg would take a "%03d" in an image's name for a numbered series
    "max_pixels": str(MAX_PIXELS),  # decoders refuse larger frames before they allocate memory
}


@contextmanager
def open_video(
    path: str | Path, file: SeekableFile | None = None, of_window: bool = False
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file and its main picture stream (not cover art).

    Args:
        path: the file; only for messages if there is a file object.
        file: a seekable binary file object to read instead.
        of_window: the body reads one window, so its decoder's errors say nothing of other windows.

    Raises:
        UnusableVideo: it has no such stream, exceeds a limit, or the body raises a decoder's error.
        InputError: the system fails to read it.
    """
    opened = False
    try:
        with open_content(path, file) as content:
            require_honest_tables(path, content)
            require_small_chunks(path, content)
            content.seek(0)
        with av.open(file or str(path), "r", options=OPEN_OPTIONS) as container:
            stream = cast(av.VideoStream | None, container.streams.best("video"))
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise unusable_video(path, "it has no video stream", DropReason.NO_VIDEO_STREAM)
            if stream.codec_context is None:
                raise unusable_video(path, "no decoder knows its video stream")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                raise unusable_video(path, f"frames of {width}x{height} pixels", DropReason.BEYOND_LIMITS)
            opened = True
            # A frame may be larger than its container declares: then the decoder refuses it.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            # Decoders with several threads hand frames over before they know that these are damaged, and data loader
            # workers use all cores without them.
            stream.codec_context.thread_count = 1
            yield container, stream
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        if file is None:
            require_readable(path)
        detail = getattr(error, "strerror", None) or error
        raise unusable_video(path, detail, of_window=of_window and opened) from error


@contextmanager
def open_content(path: str | Path, file: SeekableFile | None = None) -> Iterator[BinaryIO]:
    """Open a file to read its bytes; a given file object stays open.

    Raises:
        UnusableVideo: it is a pipe, device or folder, which are not opened.
        OSError: the system cannot open it.
    """
    if file is not None:
        yield cast(BinaryIO, file)
        return
    kind = file_kind(os.stat(path).st_mode)
    if kind != "file":
        raise unusable_video(path, f"it is a {kind}", DropReason.NOT_A_FILE)
    with open(path, "rb") as content:
        yield content


def file_kind(mode: int) -> str:
    """Name the kind of a file by its `os.stat` mode."""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def require_readable(path: str | Path) -> None:
    """Raise InputError if the system fails to read a file, as after the loss of a disk or server.

    Such a file may be a good video. A file without read permission counts as readable here, and thus as unusable.
    """
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except PermissionError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); start again when it can be") from error


def is_image(container: av.container.InputContainer) -> bool:
    """Return True if the file is a still image."""
    return container.format.name == "image2" or container.format.name.endswith("_pipe")
