"""Probe videos and images, and read windows of them as uint8 RGB.

PyAV reads videos; Pillow reads photographs and animated WebP (`c2r.data.pictures`). Times count from a file's first
shown frame, because the clocks of two files may start at different values.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from einops import rearrange

from c2r import InputError
from c2r.data.colour import require_known_colours, rgb_pixels
from c2r.data.containers import DECODE_TIMES_FORMATS, is_image, open_video
from c2r.data.drop_reasons import DropReason, DropRow
from c2r.data.frame_times import (
    decoded_frames,
    first_frame,
    frame_interval,
    last_packet,
    nearest_frames,
    timed_frames,
)
from c2r.data.pictures import open_picture
from c2r.data.sequences import Sequence, find_sequence, split_rate
from c2r.data.video_info import (
    FRAMES_PER_PICTURE,
    LARGE_PIXELS,
    MAX_SECONDS,
    SeekableFile,
    UnusableVideo,
    VideoInfo,
    one_large_frame,
    require_shape,
    to_fraction,
    unusable_video,
)


def display_transform(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return the steps that turn a frame upright: (transpose, flip vertically, flip horizontally), in this order.

    Source: libavutil/display.h: (x', y') = (a·x + c·y, b·x + d·y), 16.16 fixed point, matrix (a, b, u, c, d, …).
    """
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV cannot list side data of a kind that it has no name for, such as a photograph's EXIF. The angle alone
        # (degrees counter-clockwise) is available.
        quarters = round(frame.rotation / 90) % 4
        return quarters % 2 == 1, quarters in (1, 2), quarters in (2, 3)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype="<i4")[:5].astype(np.int64)
    if abs(a) >= abs(b):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def probe(path: str | Path, file: SeekableFile | None = None) -> VideoInfo:
    """Measure length, rate and shape of a video or image; only its first frame is decoded.

    The length comes from the last packets. The header does not show that a file was cut off, and its length may be
    that of the sound.

    Args:
        path: the file; only for messages if there is a file object.
        file: a seekable binary file object to read instead.

    Raises:
        UnusableVideo: the file is no video, is damaged, was cut off, has colours that cannot be converted, or is
            beyond the limits.
        InputError: the system fails to read it.
    """
    if file is None and (sequence := open_sequence(path)) is not None:
        pictures, rate = sequence
        shape = probe(pictures.path(0))
        return VideoInfo((pictures.count - 1) / rate, 1 / rate, shape.aspect, False, shape.height)
    with open_picture(path, file) as picture:
        if picture is not None:
            with _one_at_a_time(*picture.image.size):
                return picture.info()
    with open_video(path, file) as (container, stream):
        with _one_at_a_time(stream.codec_context.width, stream.codec_context.height):
            first, aspect, height = _first_shape(path, container, stream)
        interval = frame_interval(container, stream)
        if is_image(container):
            return VideoInfo(Fraction(0), interval, aspect, True, height)
        # The container's length includes its sound, so it counts only if there is no sound.
        length = stream.duration and stream.duration * stream.time_base
        if length is None and container.duration is not None and len(container.streams) == 1:
            length = Fraction(container.duration, av.time_base)
        last, end = last_packet(path, container, stream)
        if container.format.name in DECODE_TIMES_FORMATS:
            # The decoder gives the first frame only when it knows the next ones, and with a later packet's time.
            first = (stream.start_time or 0) * stream.time_base
        missing = 0 if length is None else (stream.start_time or 0) * stream.time_base + length - end
        if missing > max(1, length / 10 if length else 0):
            raise unusable_video(path, f"it was cut off: its last {float(missing):.1f} s are missing")
        info = VideoInfo(max(last - first, Fraction(0)), interval, aspect, False, height)
        if info.duration > MAX_SECONDS:  # the last frame alone may be declared to last for years
            raise unusable_video(path, f"it lasts {info.duration / 3600:.0f} hours", DropReason.BEYOND_LIMITS)
        return info


def _one_at_a_time(width: int, height: int) -> AbstractContextManager:
    return one_large_frame if width * height > LARGE_PIXELS else nullcontext()


def _first_shape(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[Fraction, float, int]:
    """Return the first frame's time, and its aspect ratio and height as shown; the frame itself is freed."""
    frame, first = first_frame(path, container, decoded_frames(container, stream))
    require_known_colours(path, frame, stream.codec_context.codec_tag)
    transpose = display_transform(frame)[0]
    aspect = require_shape(path, frame.width, frame.height, stream.sample_aspect_ratio or 1)
    return first, float(1 / aspect if transpose else aspect), frame.width if transpose else frame.height


def read_window(path: str | Path, start: float, num_frames: int, fps: float, height: int, width: int) -> torch.Tensor:
    """Decode one window of a video, resampled in time by nearest frame, resized to cover and centre-cropped.

    Args:
        path: a video of any container and codec, or an image (with num_frames = 1).
        start: seconds from the file's first frame.
        num_frames: F; frame n is the one shown nearest to start + n / fps; of two equally near, the earlier.
        fps: frames per second of the window.
        height, width: H and W in pixels, after the rotation that the file asks for.

    Returns:
        (F, 3, H, W) uint8 RGB in [0, 255].

    Raises:
        UnusableVideo: the file or the window cannot be decoded, ends before the window does, is frozen, has colours
            that cannot be converted, or is beyond the limits.
        InputError: the file is an image and num_frames is not 1, or the system fails to read it.
    """
    wanted = [to_fraction(start) + n / to_fraction(fps) for n in range(num_frames)]
    window = np.empty((num_frames, 3, height, width), dtype=np.uint8)
    filled = pictures = 0
    with _frames_from(path, wanted[0], wanted[-1], num_frames) as (timed, reach, pixel_aspect, tag):
        for count, frame in nearest_frames(timed, wanted, reach):
            # Checked for every frame: they may change within a file.
            require_shape(path, frame.width, frame.height, pixel_aspect)
            require_known_colours(path, frame, tag)
            rgb = to_rgb(frame, pixel_aspect, height, width)
            window[filled : filled + count] = rearrange(rgb, "h w c -> c h w")
            filled += count
            pictures += 1
    if filled < num_frames:
        detail = f"it ends before {float(wanted[filled]):.2f} s, within a window that needs it"
        raise unusable_video(path, detail, of_window=True)
    if pictures * FRAMES_PER_PICTURE < num_frames:
        detail = f"{pictures} pictures in the {num_frames} frames from {float(wanted[0]):.2f} s on"
        raise unusable_video(path, detail, DropReason.FROZEN, of_window=True)
    return torch.from_numpy(window)


@contextmanager
def open_frames(path: str | Path, lost: list[Fraction]) -> Iterator[Iterator[tuple[Fraction, av.VideoFrame]]]:
    """Give all frames of a video, image or image sequence as (seconds from the first frame, frame).

    Args:
        path: see `read_window`.
        lost: gets the times at which data is lost. Frames there are guessed, or left out.

    Raises:
        UnusableVideo: the file cannot be decoded at all.
    """
    with _frames_from(path, Fraction(0), None, 1, lost) as (timed, *_):
        yield timed


@contextmanager
def _frames_from(
    path: str | Path, start: Fraction, end: Fraction | None, num_frames: int, lost: list[Fraction] | None = None
) -> Iterator[tuple[Iterator[tuple[Fraction, av.VideoFrame]], Fraction, Fraction | int, str]]:
    """Open a file to read a window.

    Gives (time, frame) from a frame at or before `start` on, seconds for which the last frame is shown, width / height
    of a pixel, and the container's four letters for the codec.
    """
    if (sequence := open_sequence(path)) is not None:
        pictures, rate = sequence
        yield _pictures_from(pictures, rate, start, lost), 1 / rate, 1, ""
        return
    with open_picture(path) as picture:
        if picture is not None:
            _require_one_frame(path, num_frames, picture.times is None)
            yield picture.frames(start), picture.last_shown, 1, ""
            return
    with open_video(path, of_window=True) as (container, stream):
        _require_one_frame(path, num_frames, is_image(container))
        # The reach is one interval longer than in `VideoInfo.frames_at`: some decoders never output the last frame.
        reach = frame_interval(container, stream) * 3 / 2
        tag = stream.codec_context.codec_tag
        frames = timed_frames(path, container, stream, start, end, lost=lost)
        yield frames, reach, stream.sample_aspect_ratio or 1, tag


def open_sequence(path: str | Path) -> tuple[Sequence, Fraction] | None:
    """Return the pictures and the rate of an image sequence; None if this is another file.

    Raises:
        UnusableVideo: pictures are missing.
    """
    named = split_rate(str(path))
    if named is None or os.path.exists(path):
        return None
    pattern, fps = named
    try:
        return find_sequence(pattern), to_fraction(fps)
    except DropRow as drop:
        raise UnusableVideo(f"{drop.detail}; correct the sequence, or remove its row", drop.reason) from None


def _pictures_from(sequence, rate, start, lost):
    """Yield (time, frame) of a sequence; each picture is read as a single one is."""
    for number in range(sequence.count):
        if (number + 1) / rate > start:
            try:
                with _frames_from(sequence.path(number), Fraction(0), Fraction(0), 1) as (frames, *_):
                    frame = next(frames)[1]
            except UnusableVideo as error:  # the windows before and after it may be good
                if lost is None:
                    raise UnusableVideo(str(error), error.reason, of_window=True) from error
                lost.append(number / rate)
                continue
            yield number / rate, frame


def _require_one_frame(path, num_frames, is_image):
    if is_image and num_frames != 1:
        raise InputError(f"{path}: an image is one frame, but num_frames is {num_frames}; give a video")


def to_rgb(frame: av.VideoFrame, sample_aspect_ratio: Fraction | int, height: int, width: int) -> np.ndarray:
    """Convert a decoded frame to (H, W, 3) uint8 RGB: upright, resized to cover height × width, centre-cropped."""
    transpose, flip_vertically, flip_horizontally = display_transform(frame)
    h, w = (width, height) if transpose else (height, width)  # the crop before rotation
    shown_height, shown_width = frame.height, frame.width * sample_aspect_ratio
    scale = max(Fraction(h) / shown_height, Fraction(w) / shown_width)
    covering_height, covering_width = max(h, round(shown_height * scale)), max(w, round(shown_width * scale))
    rgb = rgb_pixels(frame, covering_height, covering_width)
    top, left = (covering_height - h) // 2, (covering_width - w) // 2
    rgb = rgb[top : top + h, left : left + w]
    rgb = rearrange(rgb, "h w c -> w h c") if transpose else rgb
    rgb = rgb[::-1] if flip_vertically else rgb
    return rgb[:, ::-1] if flip_horizontally else rgb
