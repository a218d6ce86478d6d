"""The frames of a video with their times: in order, from any time on, without the combs of interlacing."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.frame import PictureType

from c2r.data.containers import DECODE_TIMES_FORMATS, is_image, open_video
from c2r.data.drop_reasons import DropReason
from c2r.data.png_chunks import require_small_chunks
from c2r.data.video_info import MAX_PIXELS, to_fraction, unusable_video

# These containers do not store a show time for every frame. FFmpeg's guess differs after a seek, so they are decoded
# from the beginning.
GUESSED_TIMES_FORMATS = {"avi", "mpeg"}
# Seconds by which a seek aims too early: key frames are found by decode time, which runs ahead of show time, and the
# frames around an open group of pictures need the group before.
SEEK_MARGIN = Fraction(1, 2)
# Containers that are broadcast, recorded or repaired piece by piece, so that packets may be missing.
MATROSKA = "matroska,webm"
LOSSY_FORMATS = {"mpegts", MATROSKA}
# What the decoders say of a frame whose reference is missing, in their messages for debugging. Screen recorders and
# converters leave equal frames out of Matroska files, so a gap alone is no loss there.
LOST_REFERENCE = {
    "h264": ("Frame num gap", "reference picture missing", "Missing reference picture"),
    "hevc": ("Could not find ref",),
}
# A gap between frames is a hole after this many regular frames, if it is a whole number of intervals within the
# tolerance. Containers store milliseconds.
REGULAR_FRAMES, HOLE_TOLERANCE = 3, Fraction(1, 10)
#: Frames by which the decoders' order may differ from the order of showing: the most that H.264 and HEVC allow.
MAX_DELAY = 16
#: FFmpeg's own decoders leave the alpha of these out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class Damage:
    """The part of a video that cannot be trusted: from the first damage on, until a key frame after the last one.

    Decoders guess what is lost, and go on from their guess. They mark at most the first such frame.
    """

    def __init__(self) -> None:
        self._first: Fraction | None = None
        self._last: Fraction | None = None
        self._lost: list[Fraction] = []
        self._lost_references: list[Fraction] = []

    def add(self, time: Fraction) -> None:
        """Note that data is lost at this time, on the stream's own clock."""
        self._first = time if self._first is None else min(self._first, time)
        self._last = time if self._last is None else max(self._last, time)

    def lose(self, time: Fraction) -> None:
        """Note that a frame could not be decoded."""
        self.add(time)
        self._lost.append(time)

    def lose_reference(self, time: Fraction) -> None:
        """Note that the frame of this time is predicted from a frame that is missing."""
        self._lost_references.append(time)

    def is_between(self, before: Fraction, time: Fraction) -> bool:
        """Return True if a frame between these times could not be decoded."""
        return any(before < lost < time for lost in self._lost)

    def lacks_reference(self, before: Fraction, time: Fraction, reach: Fraction) -> bool:
        """Return True if a frame at most `reach` seconds outside these times is predicted from a missing one."""
        return any(before - reach < lost < time + reach for lost in self._lost_references)

    def covers(self, frame: av.VideoFrame, time: Fraction) -> bool:
        """Return True if a frame cannot be trusted; call it for all frames in order of time."""
        if frame.is_corrupt:
            self.add(time)
        elif frame.key_frame and self._last is not None and time > self._last:
            self._first = self._last = None
        return self._first is not None and time >= self._first


def decoded_frames(
    container: av.container.InputContainer, stream: av.VideoStream, damage: Damage | None = None
) -> Iterator[av.VideoFrame]:
    """Decode from the container's position on; interlaced frames are made whole, and each `pts` is a show time.

    Args:
        container, stream: see `open_video`.
        damage: gets the times of packets that are incomplete or cannot be decoded. None: the latter raise.

    Yields:
        the frames in show order. From the first interlaced frame on, a frame is given when the next one is decoded.
    """
    decoder = None
    if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in ALPHA_DECODERS:
        decoder = cast(av.VideoCodecContext, av.CodecContext.create(ALPHA_DECODERS[stream.codec_context.name], "r"))
        decoder.options, decoder.thread_count = {"max_pixels": str(MAX_PIXELS)}, 1
        for tag in ("color_range", "color_primaries", "color_trc", "colorspace"):  # the container's
            setattr(decoder, tag, getattr(stream.codec_context, tag))

    sign = LOST_REFERENCE.get(stream.codec_context.name) if damage and container.format.name == MATROSKA else None

    def frames():
        incomplete = started = False
        for packet in container.demux(stream):
            if stream.codec_context.name == "png":
                require_small_chunks(container.name, io.BytesIO(bytes(packet)))
            # The mark may stand one packet too early: the parser has already read the start of the next one.
            incomplete, previous = packet.is_corrupt and bool(packet.size), incomplete
            if damage and (incomplete or previous) and packet.pts is not None:
                damage.add(packet.pts * stream.time_base)
            try:
                if sign is not None:
                    with _messages() as messages:
                        decoded = packet.decode()
                    if packet.pts is not None and any(text.startswith(sign) for _, _, text in messages):
                        damage.lose_reference(packet.pts * stream.time_base)
                else:
                    decoded = packet.decode() if decoder is None else decoder.decode(packet)
            except av.InvalidDataError:
                if damage is None or not started or packet.pts is None:
                    raise
                damage.lose(packet.pts * stream.time_base)
                continue
            for frame in decoded:
                started = True
                if container.format.name in DECODE_TIMES_FORMATS:
                    frame.pts = frame.dts
                yield frame

    return deinterlaced(frames())


@contextmanager
def _messages() -> Iterator[list[tuple[int, str, str]]]:
    """Give the list that gets FFmpeg's messages of this thread: (level, sender, text)."""
    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.DEBUG)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=True) as messages:
            yield messages
    finally:
        av.logging.set_skip_repeated(skip_repeated)
        av.logging.set_level(level)


def deinterlaced(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield the frames; those flagged interlaced, woven of two moments, become pictures of one of them."""
    graph, layout = None, None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if layout != (layout := (frame.width, frame.height, frame.format.name)):
            yield from _rest_of(graph)
            graph = av.filter.Graph()
            graph.threads = 1
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            filter = graph.add("bwdif", mode="send_frame", deint="interlaced")
            graph.link_nodes(source, filter, graph.add("buffersink")).configure()
        graph.push(frame)
        yield from _available(graph)
    yield from _rest_of(graph)


def _available(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    with suppress(BlockingIOError, EOFError):
        while True:
            yield cast(av.VideoFrame, graph.pull())


def _rest_of(graph: av.filter.Graph | None) -> Iterator[av.VideoFrame]:
    if graph is not None:
        graph.push(None)
        yield from _available(graph)


def frame_time(frame: av.VideoFrame) -> Fraction | None:
    """Return a frame's show time in seconds on the stream's own clock; None if the container stores none."""
    return None if frame.pts is None else frame.pts * Fraction(frame.time_base)


def is_predicted(frame: av.VideoFrame) -> bool:
    """Return True if a frame is known to be predicted from others. Some decoders tell nothing of their frames."""
    return not frame.key_frame and frame.pict_type in (PictureType.P, PictureType.B)


def first_frame(
    path: str | Path, container: av.container.InputContainer, decoder: Iterator[av.VideoFrame]
) -> tuple[av.VideoFrame, Fraction]:
    """Return the first frame and its time in seconds on the stream's own clock (0 for an image)."""
    frame = next(decoder, None)
    if frame is None:
        raise unusable_video(path, "it holds no frame")
    time = Fraction(0) if is_image(container) else frame_time(frame)
    if time is None:
        raise unusable_video(path, "its frames carry no times, as in a raw stream: remux it into mp4 or mkv")
    return frame, time


def frame_interval(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction:
    """Return the mean seconds between frames: from the header, or if that names no rate, from all packets' times.

    Recorders write WebM without a rate; their clocks are some milliseconds early or late, so a line is fitted. The
    container is then left at its beginning. An image gets 1/25.
    """
    # FFmpeg guesses a missing rate of MKV and WebM from the first frames, but does not call it the base rate.
    has_rate = stream.average_rate and (container.format.name != MATROSKA or stream.average_rate == stream.base_rate)
    if has_rate or is_image(container):
        return header_interval(stream)
    container.seek(stream.start_time or 0, stream=stream)
    times = sorted(packet.pts for packet in container.demux(stream) if packet.size and packet.pts is not None)
    container.seek(stream.start_time or 0, stream=stream)
    if len(times) < 2 or times[-1] == times[0]:
        return header_interval(stream)
    if len(times) < 4:
        return Fraction(times[-1] - times[0], len(times) - 1) * stream.time_base
    (ticks, _), covariance = np.polyfit(np.arange(len(times)), np.array(times) - times[0], 1, cov=True)
    interval, error = (float(number * stream.time_base) for number in (ticks, covariance[0, 0] ** 0.5))
    whole = round(1 / interval)  # recorders aim at a whole number of frames per second
    return Fraction(1, whole) if whole and abs(1 / whole - interval) < 2 * error else to_fraction(interval)


def header_interval(stream: av.VideoStream) -> Fraction:
    """Return the mean seconds between frames as the header gives it, or a guess."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)


def last_packet(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[Fraction, Fraction]:
    """Return the last frame's show time and end time, in seconds on the stream's own clock."""

    def last_of(packets):
        last = end = None
        for packet in packets:
            ticks = packet.dts if packet.pts is None or by_decode_time else packet.pts
            if not packet.size or packet.is_discard or ticks is None:
                continue
            last = ticks if last is None else max(last, ticks)
            end = last + (packet.duration or 0) if last == ticks else end
        return last, end

    by_decode_time = container.format.name in DECODE_TIMES_FORMATS
    last = end = None
    # A container with an index is read from its last group of pictures on. One without is searched by decode time,
    # which runs ahead of show time.
    margin = floor((SEEK_MARGIN + MAX_DELAY * header_interval(stream)) / stream.time_base)
    length = stream.duration or (container.duration and int(container.duration / (av.time_base * stream.time_base)))
    if length:
        try:
            container.seek((stream.start_time or 0) + max(length - margin, 0), stream=stream)
            last, end = last_of(container.demux(stream))
        except av.FFmpegError:
            last = None
    if last is None:
        container.seek(stream.start_time or 0, stream=stream)
        last, end = last_of(container.demux(stream))
    if last is None:
        raise unusable_video(path, "none of its packets can be read")
    return last * stream.time_base, end * stream.time_base


def timed_frames(
    path: str | Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    start: Fraction,
    end: Fraction | None = None,
    search: bool = True,
    lost: list[Fraction] | None = None,
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yield (seconds from the file's first frame, frame) in order of time, from a frame at or before `start` on.

    Args:
        path, container, stream: see `open_video`.
        start: in seconds from the file's first frame.
        end: the last time of interest; None: the end of the file.
        search: seek to a key frame before `start`, if the container's times allow it.
        lost: gets the times at which data is lost; None: this raises.

    Raises:
        UnusableVideo: data is lost, and the frames from `start` to `end` are guessed from what is left.
    """
    interval = frame_interval(container, stream)
    damage = Damage()
    decoder = decoded_frames(container, stream, damage)
    frame, first = first_frame(path, container, decoder)
    target = first + start - SEEK_MARGIN
    if search and target > first and container.format.name not in GUESSED_TIMES_FORMATS:
        container.seek(floor(target / stream.time_base), stream=stream)  # to the key frame before
        damage = Damage()
        decoder = decoded_frames(container, stream, damage)
        frame = next(decoder, None)
        landed = None if frame is None else frame_time(frame)
        if frame is None or landed is None or landed > first + start or is_predicted(frame):
            # A container without an exact index, such as MPEG-TS, is decoded from the beginning. Decoders of older
            # codecs start at any frame, and predict from frames that they have not seen.
            with open_video(path, of_window=True) as (again, same_stream):
                yield from timed_frames(path, again, same_stream, start, end, search=False, lost=lost)
            return
    elif is_predicted(frame):
        damage.add(first)  # the file was cut before it

    def is_loss(frame, before, time):
        """Return True if a hole is one of lost frames, not of frames left out because nothing moves."""
        is_judged = container.format.name == MATROSKA and stream.codec_context.name in LOST_REFERENCE
        return not is_judged or frame.key_frame or damage.lacks_reference(before, time, MAX_DELAY * interval)

    time = None
    holes = Holes(interval if container.format.name in LOSSY_FORMATS else None)
    while frame is not None:
        before, shown = time, frame_time(frame)
        # Decoders output frames in show order, so a time that does not increase is wrong.
        time = shown - first if shown is not None and (before is None or shown - first > before) else before + interval
        is_after_hole = before is not None and (
            damage.is_between(first + before, first + time)
            or (holes.is_between(before, time) and is_loss(frame, first + before, first + time))
        )
        if is_after_hole:
            damage.add(first + before)
        # After a hole, the frames just before it may be guessed too: they are predicted from later ones.
        is_guessed = damage.covers(frame, first + time)
        is_wanted = start - interval < time and (end is None or time < end + interval)
        if (is_after_hole and time > start and (end is None or before < end)) or (is_guessed and is_wanted):
            if lost is None:
                detail = f"data is lost about {float(time):.2f} s after the first frame"
                raise unusable_video(path, detail, DropReason.DAMAGED, of_window=True)
            lost.append(time)
        yield time, frame
        frame = next(decoder, None)


class Holes:
    """Finds missing frames in a video that is otherwise regular: a whole number of intervals without a frame.

    Args:
        interval: seconds between frames; None: nothing is taken for a hole.
    """

    def __init__(self, interval: Fraction | None):
        self._interval, self._regular = interval, 0

    def is_between(self, before: Fraction, time: Fraction) -> bool:
        """Return True if frames are missing between two consecutive ones; call it for all frames in order of time."""
        if self._interval is None:
            return False
        steps = (time - before) / self._interval
        if abs(steps - round(steps)) > HOLE_TOLERANCE:
            self._interval = None  # a video of variable rate
        elif round(steps) == 1:
            self._regular += 1
        elif self._regular >= REGULAR_FRAMES:
            return True
        else:
            self._interval = None
        return False


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
