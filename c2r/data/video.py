"""Video and image files in, uint8 RGB windows out (PyAV), and frames out to mp4.

Times are measured from a file's first shown frame, so that two files whose clocks start elsewhere agree.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image
from torch.utils.data import get_worker_info

from c2r import InputError

# These open other files or the network, and would lead out of the dataset folder: playlists, streams, files in parts.
LEADING_FORMATS = {"concat", "dash", "hls", "imf", "lavfi", "mlv", "rtp", "rtsp", "sap", "sdp", "vobsub"}
LEADING_FORMATS |= {"webm_dash_manifest"}
# swscale widens the bicubic kernel when it shrinks, so this does not alias; the flags keep chroma at full precision.
INTERPOLATION = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)
# Containers that do not store a show time for every frame: FFmpeg guesses, and after a seek it guesses otherwise. They
# are read from their beginning.
GUESSED_TIMES_FORMATS = {"avi", "mpeg"}
# AVI stores decode times only. Of frames in show order, without threads that hold some back, they are as good.
DECODE_TIMES_FORMATS = {"avi"}
# A file may declare what it likes. One frame of 8192x8192 fills 200 MB, or 537 MB where it has 16 bits and alpha; and
# of a file of more than a day the windows would fill the memory, whether there are frames in them or not.
MAX_PIXELS = 8192 * 8192
# Files are looked into by several threads: frames above this size by one at a time, or they would add up to gigabytes.
LARGE_PIXELS = 4096 * 4096
_one_large_frame = threading.Lock()
MAX_SECONDS = 24 * 3600
# A picture is resized until it covers the window: of one much wider or higher, all would be made large to be cropped
# away, gigabytes where a header declares pixels of 10000:1. Scrolls and panoramas are within 32:1.
MAX_ASPECT = 32
OPEN_OPTIONS = {
    "protocol_whitelist": "file",  # no network, whatever a file says
    # Refused before they are opened: then the other files would be open already.
    "format_whitelist": ",".join(sorted(set(av.formats_available) - LEADING_FORMATS)),
    "pattern_type": "none",  # FFmpeg would take a "%03d" in an image's name for a numbered series
    "max_pixels": str(MAX_PIXELS),  # for the decoders: refused before room is made
}
UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED
# After a seek, decoding starts this many seconds early: a key frame is found by decode time, which runs before show
# time, and the frames around an open group of pictures need the one before.
SEEK_MARGIN = Fraction(1, 2)


@dataclass(frozen=True)
class VideoInfo:
    """What the manifest needs to know of a file.

    `last` is the time of the last frame in seconds from the first one, `interval` the mean time between two frames,
    `aspect` the shown width / height (pixel shape and rotation applied), `height` that height in pixels. An image has
    `last` = 0.
    """

    last: Fraction
    interval: Fraction
    aspect: float
    is_image: bool
    height: int

    @property
    def rate(self) -> float:
        """Frames per second."""
        return float(1 / self.interval)

    @property
    def duration(self) -> float:
        """Seconds from the first frame's start to the last frame's end."""
        return float(self.last + self.interval)

    @property
    def native_frames(self) -> int:
        """How many frames the file has at its own rate."""
        return round(self.last / self.interval) + 1

    def frames_at(self, fps) -> int:
        """How many frames the file gives at `fps`: sample n, at n / fps, counts until half an interval after the last
        frame, the reach of "nearest". The half also absorbs containers that round times to milliseconds."""
        if self.is_image:
            return 1
        return int((self.last + self.interval / 2) * exact(fps)) + 1


def exact(seconds) -> Fraction:
    """A float of a time or rate as the fraction that was meant: sums of fractions have no drift and no false ties."""
    return Fraction(seconds).limit_denominator(100_000)


class UnusableVideo(InputError):
    """A file that gives no frames; `reason` is one of "unreadable", "no video stream", "beyond the limits"."""

    def __init__(self, message, reason="unreadable"):
        super().__init__(message)
        self.reason = reason


def unusable(path, detail, reason="unreadable") -> UnusableVideo:
    detail = " ".join(str(detail).split()) or "unknown decoder error"
    return UnusableVideo(f"{path}: cannot be decoded ({detail}); repair or re-encode it, or take its row out", reason)


@contextmanager
def open_video(path, file=None) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file, local or an object, and its main picture stream (not cover art); decoder errors become one line."""
    try:
        with av.open(file or str(path), options=OPEN_OPTIONS) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise unusable(path, "it has no video stream", "no video stream")
            if stream.codec_context is None:
                raise unusable(path, "no decoder knows its video stream")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                raise unusable(path, f"frames of {width}x{height} pixels", "beyond the limits")
            # A frame may still be larger than its container says: then the decoder refuses it before it makes room.
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            # In a data loader's worker the workers are the parallelism.
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
            raise unusable(path, f"it declares more than {MAX_PIXELS} pixels", "beyond the limits") from error
        raise unusable(path, getattr(error, "strerror", None) or error) from error


def _require_readable(path):
    """Raise InputError if the system fails to read a file through, as a lost disk or server does: such a fault says
    nothing of the video. One that may not be read is left to the decoder's verdict."""
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except PermissionError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); start again when it can be") from error


def _is_huge_picture(path, file=None):
    """Whether a picture that FFmpeg refuses is too large: FFmpeg does not say why. Reads the header alone."""
    try:
        if file is not None:
            file.seek(0)
        with Image.open(file or path) as image:
            return image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        return True
    except (OSError, ValueError, SyntaxError):  # no picture
        return False


def frame_time(container, frame) -> Fraction | None:
    """Show time in seconds on the stream's own clock; None where the container stores none."""
    ticks = frame.dts if container.format.name in DECODE_TIMES_FORMATS else frame.pts
    return None if ticks is None else ticks * Fraction(frame.time_base)


def first_frame(path, container, decoder):
    """The first frame and its time in seconds on the stream's own clock (an image's is 0)."""
    frame = next(decoder, None)
    if frame is None:
        raise unusable(path, "it holds no frame")
    time = Fraction(0) if is_image(container) else frame_time(container, frame)
    if time is None:
        raise unusable(path, "its frames carry no times, as in a raw stream: remux it into mp4 or mkv")
    return frame, time


def is_image(container) -> bool:
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def frame_interval(stream) -> Fraction:
    """Mean seconds between frames, from the header."""
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate else Fraction(1, 25)


def stored_aspect(path, frame, stream) -> Fraction:
    """Width / height of a frame as it is stored, before rotation, with the shape of its pixels."""
    aspect = Fraction(frame.width, frame.height) * (stream.sample_aspect_ratio or 1)
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        detail = f"{frame.width}x{frame.height} pixels, shown {float(aspect):.3g} times as wide as high"
        raise unusable(path, detail, "beyond the limits")
    return aspect


def display_transform(frame) -> tuple[bool, bool, bool]:
    """(transpose, flip vertically, flip horizontally), in this order, that bring a frame upright.

    Source: libavutil/display.h: (x', y') = (a·x + c·y, b·x + d·y), 16.16 fixed point, matrix (a, b, u, c, d, …).
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV cannot list side data of a kind that it has no name for, such as a photograph's EXIF; then it is asked
        # for the angle alone (degrees counter-clockwise).
        quarters = round(frame.rotation / 90) % 4
        return quarters % 2 == 1, quarters in (1, 2), quarters in (2, 3)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype="<i4")[:5].astype(np.int64)
    if abs(a) >= abs(b):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def probe(path, file=None) -> VideoInfo:
    """Length, rate and shape of a video or image, cheaply: the first frame is decoded and the last packets are read.

    The length comes from the last packets and not from the header: a header knows neither that the file was cut off,
    nor that the sound is longer than the picture.

    Args:
        path: of the file.
        file: a seekable binary file object that is read instead; the path is for messages then.

    Raises:
        UnusableVideo: the file is no video, is damaged, was cut off, or is beyond the limits.
    """
    with open_video(path, file) as (container, stream):
        stream.thread_type = "NONE"  # one frame is not worth starting threads for
        is_large = stream.codec_context.width * stream.codec_context.height > LARGE_PIXELS
        with _one_large_frame if is_large else nullcontext():
            first, aspect, height = _first_shape(path, container, stream)
        interval = frame_interval(stream)
        if is_image(container):
            return VideoInfo(Fraction(0), interval, aspect, True, height)
        # The container's length includes its sound; it says something about the picture only where there is no sound.
        length = stream.duration and stream.duration * stream.time_base
        if length is None and container.duration is not None and len(container.streams) == 1:
            length = Fraction(container.duration, av.time_base)
        last, end = last_packet(path, container, stream)
        missing = 0 if length is None else (stream.start_time or 0) * stream.time_base + length - end
        if missing > max(1, length / 10 if length else 0):
            raise unusable(path, f"it was cut off: its last {float(missing):.1f} s are missing")
        info = VideoInfo(max(last - first, Fraction(0)), interval, aspect, False, height)
        if info.duration > MAX_SECONDS:  # the last frame may be shown for years, too
            raise unusable(path, f"it lasts {info.duration / 3600:.0f} hours", "beyond the limits")
        return info


def _first_shape(path, container, stream) -> tuple[Fraction, float, int]:
    """Time of the first frame, and its aspect ratio and height as shown; the frame itself is not kept."""
    frame, first = first_frame(path, container, container.decode(stream))
    transpose = display_transform(frame)[0]
    aspect = stored_aspect(path, frame, stream)
    return first, float(1 / aspect if transpose else aspect), frame.width if transpose else frame.height


def last_packet(path, container, stream) -> tuple[Fraction, Fraction]:
    """Show time of the last frame, and the time when it ends, in seconds on the stream's clock."""

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
    # Only the last group of pictures is read, where the container can be searched.
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
        raise unusable(path, "none of its packets can be read")
    return last * stream.time_base, end * stream.time_base


def read_window(path, start, num_frames, fps, height, width) -> torch.Tensor:
    """Decode one window of a video, resampled in time by nearest frame, resized to cover and centre-cropped.

    Args:
        path: a video of any container and codec, or an image (with num_frames = 1).
        start: seconds from the file's first frame.
        num_frames: F; frame n is the one shown nearest to start + n / fps, the earlier one where two are as near.
        fps: frames per second of the window, whatever the file's rate.
        height, width: H and W in pixels, after rotation by the file's metadata.

    Returns:
        (F, 3, H, W) uint8 RGB in [0, 255].

    Raises:
        UnusableVideo: the file cannot be decoded, ends before the window does, or is beyond the limits.
        InputError: an image is asked for several frames.
    """
    wanted = [exact(start) + n / exact(fps) for n in range(num_frames)]
    window = np.empty((num_frames, 3, height, width), dtype=np.uint8)
    with open_video(path) as (container, stream):
        if is_image(container):
            if num_frames != 1:
                raise InputError(f"{path}: an image is one frame, but num_frames is {num_frames}; give a video")
            wanted = wanted[:1]
        # The reach beyond the last frame is one interval more than `VideoInfo.frames_at` counts with: some decoders
        # keep a file's last frame to themselves.
        reach = frame_interval(stream) * 3 / 2
        filled, converted = 0, None
        for count, frame in nearest_frames(timed_frames(container, stream, wanted[0]), wanted, reach):
            if frame.is_corrupt:
                raise unusable(path, f"the frame {float(wanted[filled]):.2f} s after the first is damaged")
            stored_aspect(path, frame, stream)  # frames may change within a file
            converted = to_rgb(frame, stream.sample_aspect_ratio or 1, height, width)
            window[filled : filled + count] = converted.transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)
            filled += count
    if filled < num_frames:
        raise unusable(path, f"it ends before {float(wanted[filled]):.2f} s, within a window that needs it")
    return torch.from_numpy(window)


def timed_frames(container, stream, start, search=True) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(seconds since the file's first frame, frame) in order of time, from a frame at or before `start` on."""
    decoder = container.decode(stream)
    frame, first = first_frame(container.name, container, decoder)
    target = first + start - SEEK_MARGIN
    if search and target > first and container.format.name not in GUESSED_TIMES_FORMATS:
        container.seek(floor(target / stream.time_base), stream=stream)  # to the key frame before
        decoder = container.decode(stream)
        frame = next(decoder, None)
        landed = None if frame is None else frame_time(container, frame)
        if landed is None or landed > first + start:
            # The container has no exact index, as MPEG-TS: begin at the beginning.
            with open_video(container.name) as (again, same_stream):
                yield from timed_frames(again, same_stream, start, search=False)
            return
    interval = frame_interval(stream)
    time = None
    while frame is not None:
        shown = frame_time(container, frame)
        # Frames come in the order in which they are shown: where a clock stops or jumps back, the clock is wrong.
        time = shown - first if shown is not None and (time is None or shown - first > time) else time + interval
        yield time, frame
        frame = next(decoder, None)


def nearest_frames(timed, wanted, reach) -> Iterator[tuple[int, av.VideoFrame]]:
    """For increasing `wanted` times, the nearest frames as (how often in a row, frame).

    Args:
        timed: (time, frame) in order of time, the first at or before `wanted[0]`.
        wanted: times in seconds.
        reach: how long after its time the last frame still serves, in seconds.
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


def to_rgb(frame, sample_aspect_ratio, height, width) -> np.ndarray:
    """A decoded frame upright, resized to cover height × width and centre-cropped: (H, W, 3) uint8 RGB."""
    transpose, flip_vertically, flip_horizontally = display_transform(frame)
    h, w = (width, height) if transpose else (height, width)  # the crop as it lies in the stored frame
    shown_height, shown_width = frame.height, frame.width * sample_aspect_ratio
    scale = max(Fraction(h) / shown_height, Fraction(w) / shown_width)
    covering_height, covering_width = max(h, round(shown_height * scale)), max(w, round(shown_width * scale))
    # A file that does not name its colour matrix: HD is BT.709, as players take it; the rest is swscale's BT.601.
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
    rgb = rgb.transpose(1, 0, 2) if transpose else rgb
    rgb = rgb[::-1] if flip_vertically else rgb
    return rgb[:, ::-1] if flip_horizontally else rgb


def write_video(path, frames, fps):
    """Write an mp4 (H.264, yuv420p, BT.709, its colours tagged), that any player shows; complete or not at all.

    Args:
        path: the .mp4 to write; its folder is made.
        frames: (F, H, W, 3) uint8 RGB, tensor or array; H and W even.
        fps: frames per second.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"yuv420p needs an even height and width, not {height}x{width}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    with av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=exact(fps), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        stream.codec_context.color_range = ColorRange.MPEG
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=INTERPOLATION,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(path)
