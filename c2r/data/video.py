"""Read windows of video and image files as uint8 RGB (PyAV).

Times count from a file's first shown frame, because the clocks of two files may start at different values.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace, Interpolation
from einops import rearrange
from PIL import Image
from torch.utils.data import get_worker_info

from c2r import InputError
from c2r.data.drop_reasons import DropReason, DropRow
from c2r.data.sequences import find_sequence, split_rate

# Playlists, streams and files in parts are refused: they open files outside the dataset's folder, or the network.
REFERENCING_FORMATS = {"concat", "dash", "hls", "imf", "lavfi", "mlv", "rtp", "rtsp", "sap", "sdp", "vobsub"}
REFERENCING_FORMATS |= {"webm_dash_manifest"}
# swscale widens the bicubic kernel when it shrinks, so this does not alias; the flags keep chroma at full precision.
INTERPOLATION = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)
# These containers do not store a show time for every frame. FFmpeg's guess differs after a seek, so they are decoded
# from the beginning.
GUESSED_TIMES_FORMATS = {"avi", "mpeg"}
# AVI stores decode times only. They serve as show times because decoders output frames in show order, as long as no
# decoder threads hold frames back.
DECODE_TIMES_FORMATS = {"avi"}
# A file may declare any size. One frame of 8192x8192 pixels fills 200 MB; with 16 bits and alpha, 537 MB.
MAX_PIXELS = 8192 * 8192
# Several threads probe files; frames above this size are decoded one at a time, as together they would fill gigabytes.
LARGE_PIXELS = 4096 * 4096
_one_large_frame = threading.Lock()
# The windows of a longer file would fill the memory, whether it holds frames or only declares them.
MAX_SECONDS = 24 * 3600
# A picture is resized until it covers the window, then cropped. A header that declares pixels of 10000:1 would make it
# gigabytes large; scrolls and panoramas are within 32:1.
MAX_ASPECT = 32
OPEN_OPTIONS = {
    "protocol_whitelist": "file",  # no network, whatever a file refers to
    # Formats are refused before they are opened: opening one opens the files that it refers to.
    "format_whitelist": ",".join(sorted(set(av.formats_available) - REFERENCING_FORMATS)),
    "pattern_type": "none",  # FFmpeg would take a "%03d" in an image's name for a numbered series
    "max_pixels": str(MAX_PIXELS),  # decoders refuse larger frames before they allocate memory
}
UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED
# Seconds by which a seek aims too early: key frames are found by decode time, which runs ahead of show time, and the
# frames around an open group of pictures need the group before.
SEEK_MARGIN = Fraction(1, 2)


class SeekableFile(Protocol):
    """A binary file object: the methods that PyAV calls."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, origin: int = 0, /) -> int: ...

    def tell(self) -> int: ...


@dataclass(frozen=True)
class VideoInfo:
    """Length, rate and shape of a video or image."""

    last: Fraction  # time of the last frame, in seconds from the first one; 0 for an image
    interval: Fraction  # mean seconds between frames
    aspect: float  # width / height as shown, with pixel shape and rotation applied
    is_image: bool
    height: int  # in pixels as shown

    @property
    def rate(self) -> float:
        """Frames per second."""
        return float(1 / self.interval)

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last frame."""
        return float(self.last + self.interval)

    @property
    def native_frames(self) -> int:
        """Number of frames at the file's own rate."""
        return round(self.last / self.interval) + 1

    def frames_at(self, fps: float) -> int:
        """Return the number of frames after resampling to `fps`.

        Sample n, at n / fps, counts until half an interval after the last frame, where the nearest frame is still the
        last one. The half also absorbs the rounding of containers that store milliseconds.
        """
        if self.is_image:
            return 1
        return int((self.last + self.interval / 2) * to_fraction(fps)) + 1


def to_fraction(value: float) -> Fraction:
    """Convert a time or rate to the fraction that was meant: sums of fractions have no drift and no false ties."""
    return Fraction(value).limit_denominator(100_000)


class UnusableVideo(InputError):
    """A file that gives no frames; `reason` is UNREADABLE, NO_VIDEO_STREAM or BEYOND_LIMITS."""

    def __init__(self, message: str, reason: DropReason = DropReason.UNREADABLE):
        super().__init__(message)
        self.reason = reason


def unusable_video(path: str | Path, detail: object, reason: DropReason = DropReason.UNREADABLE) -> UnusableVideo:
    """Return the error to raise for a file, with a message of one line.

    Args:
        path: the file.
        detail: a description or a decoder's error.
        reason: its category.
    """
    detail = " ".join(str(detail).split()) or "unknown decoder error"
    return UnusableVideo(f"{path}: cannot be decoded ({detail}); repair or re-encode it, or remove its row", reason)


@contextmanager
def open_video(
    path: str | Path, file: SeekableFile | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file and its main picture stream (not cover art).

    Args:
        path: the file, or the name of an image sequence, see `c2r.data.sequences`; only for messages if there is a
            file object.
        file: a seekable binary file object to read instead.

    Raises:
        UnusableVideo: it has no such stream, exceeds a limit, or the body raises a decoder's error.
        InputError: the system fails to read it.
    """
    source: Any = {"file": file or str(path), "options": OPEN_OPTIONS}
    if file is None and (named := split_rate(str(path))) is not None:
        source = _sequence_source(*named)
    try:
        with av.open(mode="r", **source) as container:
            stream = cast(av.VideoStream | None, container.streams.best("video"))
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise unusable_video(path, "it has no video stream", DropReason.NO_VIDEO_STREAM)
            if stream.codec_context is None:
                raise unusable_video(path, "no decoder knows its video stream")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                raise unusable_video(path, f"frames of {width}x{height} pixels", DropReason.BEYOND_LIMITS)
            # A frame may be larger than its container declares: then the decoder refuses it.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            # Data loader workers already use all cores.
            if get_worker_info() is not None:
                stream.codec_context.thread_count = 1
            elif container.format.name not in DECODE_TIMES_FORMATS:
                stream.thread_type = "AUTO"
            yield container, stream
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        if file is None:
            _require_readable(path)
        if _is_huge_picture(path, file):
            raise unusable_video(
                path, f"it declares more than {MAX_PIXELS} pixels", DropReason.BEYOND_LIMITS
            ) from error
        raise unusable_video(path, getattr(error, "strerror", None) or error) from error


def _sequence_source(pattern, fps):
    """Return the arguments of `av.open` for the pictures of a sequence."""
    try:
        sequence = find_sequence(pattern)
    except DropRow as drop:
        raise UnusableVideo(f"{drop.detail}; correct the sequence, or remove its row", drop.reason) from None
    options = {"pattern_type": "sequence", "start_number": str(sequence.first), "framerate": str(to_fraction(fps))}
    return {"file": sequence.escaped_path, "format": "image2", "options": OPEN_OPTIONS | options}


def _require_readable(path: str | Path) -> None:
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


def _is_huge_picture(path: str | Path, file: SeekableFile | None = None) -> bool:
    """Return True if a picture has too many pixels, which FFmpeg refuses without naming a reason.

    Reads the header only.
    """
    try:
        if file is not None:
            file.seek(0)
        with Image.open(cast(BinaryIO, file or path)) as image:
            return image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        return True
    except (OSError, ValueError, SyntaxError):  # not a picture
        return False


def frame_time(container: av.container.InputContainer, frame: av.VideoFrame) -> Fraction | None:
    """Return a frame's show time in seconds on the stream's own clock; None if the container stores none."""
    ticks = frame.dts if container.format.name in DECODE_TIMES_FORMATS else frame.pts
    return None if ticks is None else ticks * Fraction(frame.time_base)


def first_frame(
    path: str | Path, container: av.container.InputContainer, decoder: Iterator[av.VideoFrame]
) -> tuple[av.VideoFrame, Fraction]:
    """Return the first frame and its time in seconds on the stream's own clock (0 for an image)."""
    frame = next(decoder, None)
    if frame is None:
        raise unusable_video(path, "it holds no frame")
    time = Fraction(0) if is_image(container) else frame_time(container, frame)
    if time is None:
        raise unusable_video(path, "its frames carry no times, as in a raw stream: remux it into mp4 or mkv")
    return frame, time


def is_image(container: av.container.InputContainer) -> bool:
    """Return True if the file is a still image."""
    if container.options.get("pattern_type") == "sequence":
        return False
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def frame_interval(stream: av.VideoStream) -> Fraction:
    """Return the mean seconds between frames, from the header; 1/25 if it names no rate, as for some images."""
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate else Fraction(1, 25)


def stored_aspect(path: str | Path, frame: av.VideoFrame, stream: av.VideoStream) -> Fraction:
    """Return width / height of a frame before rotation, with the shape of its pixels applied.

    Raises:
        UnusableVideo: it is beyond MAX_ASPECT.
    """
    aspect = Fraction(frame.width, frame.height) * (stream.sample_aspect_ratio or 1)
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        detail = f"{frame.width}x{frame.height} pixels, shown {float(aspect):.3g} times as wide as high"
        raise unusable_video(path, detail, DropReason.BEYOND_LIMITS)
    return aspect


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
        UnusableVideo: the file is no video, is damaged, was cut off, or is beyond the limits.
        InputError: the system fails to read it.
    """
    with open_video(path, file) as (container, stream):
        stream.thread_type = "NONE"  # one frame is not worth starting threads for
        is_large = stream.codec_context.width * stream.codec_context.height > LARGE_PIXELS
        with _one_large_frame if is_large else nullcontext():
            first, aspect, height = _first_shape(path, container, stream)
        interval = frame_interval(stream)
        if is_image(container):
            return VideoInfo(Fraction(0), interval, aspect, True, height)
        # The container's length includes its sound, so it counts only if there is no sound.
        length = stream.duration and stream.duration * stream.time_base
        if length is None and container.duration is not None and len(container.streams) == 1:
            length = Fraction(container.duration, av.time_base)
        last, end = last_packet(path, container, stream)
        missing = 0 if length is None else (stream.start_time or 0) * stream.time_base + length - end
        if missing > max(1, length / 10 if length else 0):
            raise unusable_video(path, f"it was cut off: its last {float(missing):.1f} s are missing")
        info = VideoInfo(max(last - first, Fraction(0)), interval, aspect, False, height)
        if info.duration > MAX_SECONDS:  # the last frame alone may be declared to last for years
            raise unusable_video(path, f"it lasts {info.duration / 3600:.0f} hours", DropReason.BEYOND_LIMITS)
        return info


def _first_shape(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[Fraction, float, int]:
    """Return the first frame's time, and its aspect ratio and height as shown; the frame itself is freed."""
    frame, first = first_frame(path, container, container.decode(stream))
    transpose = display_transform(frame)[0]
    aspect = stored_aspect(path, frame, stream)
    return first, float(1 / aspect if transpose else aspect), frame.width if transpose else frame.height


def last_packet(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[Fraction, Fraction]:
    """Return the last frame's show time and end time, in seconds on the stream's own clock."""

    def last_of(packets):
        last = end = None
        for packet in packets:
            ticks = packet.dts if packet.pts is None else packet.pts
            if not packet.size or packet.is_corrupt or packet.is_discard or ticks is None:
                continue
            last = ticks if last is None else max(last, ticks)
            end = last + (packet.duration or 0) if last == ticks else end
        return last, end

    last = end = None
    # A container with an index is read from its last group of pictures on.
    length = stream.duration or (container.duration and int(container.duration / (av.time_base * stream.time_base)))
    if length:
        try:
            container.seek((stream.start_time or 0) + length, stream=stream)
            last, end = last_of(container.demux(stream))
        except av.FFmpegError:
            last = None
    if last is None:
        container.seek(stream.start_time or 0, stream=stream)
        last, end = last_of(container.demux(stream))
    if last is None:
        raise unusable_video(path, "none of its packets can be read")
    return last * stream.time_base, end * stream.time_base


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
        UnusableVideo: the file cannot be decoded, ends before the window does, or is beyond the limits.
        InputError: the file is an image and num_frames is not 1, or the system fails to read it.
    """
    wanted = [to_fraction(start) + n / to_fraction(fps) for n in range(num_frames)]
    window = np.empty((num_frames, 3, height, width), dtype=np.uint8)
    with open_video(path) as (container, stream):
        if is_image(container) and num_frames != 1:
            raise InputError(f"{path}: an image is one frame, but num_frames is {num_frames}; give a video")
        # The reach is one interval longer than in `VideoInfo.frames_at`: some decoders never output the last frame.
        reach = frame_interval(stream) * 3 / 2
        filled = 0
        for count, frame in nearest_frames(timed_frames(container, stream, wanted[0]), wanted, reach):
            if frame.is_corrupt:
                raise unusable_video(path, f"the frame {float(wanted[filled]):.2f} s after the first is damaged")
            stored_aspect(path, frame, stream)  # checked for every frame: sizes may change within a file
            rgb = to_rgb(frame, stream.sample_aspect_ratio or 1, height, width)
            window[filled : filled + count] = rearrange(rgb, "h w c -> c h w")
            filled += count
    if filled < num_frames:
        raise unusable_video(path, f"it ends before {float(wanted[filled]):.2f} s, within a window that needs it")
    return torch.from_numpy(window)


def timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream, start: Fraction, search: bool = True
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yield (seconds from the file's first frame, frame) in order of time, from a frame at or before `start` on.

    Args:
        container, stream: see `open_video`.
        start: in seconds from the file's first frame.
        search: seek to a key frame before `start`, if the container's times allow it.
    """
    decoder = container.decode(stream)
    frame, first = first_frame(container.name, container, decoder)
    target = first + start - SEEK_MARGIN
    if search and target > first and container.format.name not in GUESSED_TIMES_FORMATS:
        container.seek(floor(target / stream.time_base), stream=stream)  # to the key frame before
        decoder = container.decode(stream)
        frame = next(decoder, None)
        landed = None if frame is None else frame_time(container, frame)
        if landed is None or landed > first + start:
            # A container without an exact index, such as MPEG-TS, is decoded from the beginning.
            with open_video(container.name) as (again, same_stream):
                yield from timed_frames(again, same_stream, start, search=False)
            return
    interval = frame_interval(stream)
    time = None
    while frame is not None:
        shown = frame_time(container, frame)
        # Decoders output frames in show order, so a time that does not increase is wrong.
        time = shown - first if shown is not None and (time is None or shown - first > time) else time + interval
        yield time, frame
        frame = next(decoder, None)


def nearest_frames(
    timed: Iterable[tuple[Fraction, av.VideoFrame]], wanted: Sequence[Fraction], reach: Fraction
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Find the nearest frame for each of some increasing times.

    Args:
        timed: (time, frame) in order of time, the first at or before `wanted[0]`.
        wanted: times in seconds.
        reach: seconds after its time for which the last frame is still the nearest.

    Yields:
        (number of consecutive wanted times, the frame that is nearest to them). Times beyond the reach get none.
    """
    position = 0
    before, frame_before = None, None
    for time, frame in timed:
        if before is not None:
            served = position
            while served < len(wanted) and wanted[served] - before <= time - wanted[served]:
                served += 1
            if served > position:
                yield served - position, frame_before
            position = served
            if position == len(wanted):
                return
        before, frame_before = time, frame
    served = position
    while before is not None and served < len(wanted) and wanted[served] <= before + reach:
        served += 1
    if served > position:
        yield served - position, frame_before


def to_rgb(frame: av.VideoFrame, sample_aspect_ratio: Fraction | int, height: int, width: int) -> np.ndarray:
    """Convert a decoded frame to (H, W, 3) uint8 RGB: upright, resized to cover height × width, centre-cropped."""
    transpose, flip_vertically, flip_horizontally = display_transform(frame)
    h, w = (width, height) if transpose else (height, width)  # the crop before rotation
    shown_height, shown_width = frame.height, frame.width * sample_aspect_ratio
    scale = max(Fraction(h) / shown_height, Fraction(w) / shown_width)
    covering_height, covering_width = max(h, round(shown_height * scale)), max(w, round(shown_width * scale))
    # For files that do not name their colour matrix, players take BT.709 for HD; swscale always takes BT.601.
    unnamed_hd = frame.colorspace == UNSPECIFIED_COLORSPACE and frame.height > 576 and not frame.format.is_rgb
    rgb = frame.reformat(
        width=covering_width,
        height=covering_height,
        format="rgb24",
        src_colorspace=Colorspace.ITU709 if unnamed_hd else None,
        interpolation=INTERPOLATION,
        threads=1,
    ).to_ndarray()  # (covering_height, covering_width, 3)
    top, left = (covering_height - h) // 2, (covering_width - w) // 2
    rgb = rgb[top : top + h, left : left + w]
    rgb = rearrange(rgb, "h w c -> w h c") if transpose else rgb
    rgb = rgb[::-1] if flip_vertically else rgb
    return rgb[:, ::-1] if flip_horizontally else rgb
