"""Length, rate and shape of a video or image, the limits of both, and the error for a file beyond them."""

import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from c2r import InputError
from c2r.data.drop_reasons import DropReason

# A file may declare any size. One frame of 8192x8192 pixels fills 200 MB; with 16 bits and alpha, 537 MB.
MAX_PIXELS = 8192 * 8192
# Several threads probe files; frames above this size are decoded one at a time, as together they would fill gigabytes.
LARGE_PIXELS = 4096 * 4096
one_large_frame = threading.Lock()
# The windows of a longer file would fill the memory, whether it holds frames or only declares them.
MAX_SECONDS = 24 * 3600
# A picture is resized until it covers the window, then cropped. A header that declares pixels of 10000:1 would make it
# gigabytes large; scrolls and panoramas are within 32:1.
MAX_ASPECT = 32
# Raise it when files give other pixels than before: everything encoded from the old ones is then encoded again.
PIXELS_VERSION = 2
# A window of 4k + 1 frames that shows at most k pictures is frozen: fewer than one in four of its frames is new.
FRAMES_PER_PICTURE = 4


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

    def is_frozen_at(self, fps: float) -> bool:
        """Return True if, at `fps`, fewer than one in FRAMES_PER_PICTURE of a video's frames is a new picture."""
        return not self.is_image and self.interval * to_fraction(fps) > FRAMES_PER_PICTURE

    def frames_at(self, fps: float) -> int:
        """Return the number of frames after resampling to `fps`; of a frozen video, only the first one counts.

        Sample n, at n / fps, counts until half an interval after the last frame, where the nearest frame is still the
        last one. The half also absorbs the rounding of containers that store milliseconds.
        """
        if self.is_image or self.is_frozen_at(fps):
            return 1
        return int((self.last + self.interval / 2) * to_fraction(fps)) + 1


def to_fraction(value: float) -> Fraction:
    """Convert a time or rate to the fraction that was meant: sums of fractions have no drift and no false ties."""
    return Fraction(value).limit_denominator(100_000)


class UnusableVideo(InputError):
    """A file, or one window of it, that gives no frames.

    Args:
        message: one line that names the file.
        reason: its category.
        of_window: True if other windows of the file may be good.
    """

    def __init__(self, message: str, reason: DropReason = DropReason.UNREADABLE, of_window: bool = False):
        super().__init__(message)
        self.reason, self.of_window = reason, of_window

    def __reduce__(self):  # data loader workers hand it over
        return type(self), (str(self), self.reason, self.of_window)


def unusable_video(
    path: str | Path, detail: object, reason: DropReason = DropReason.UNREADABLE, of_window: bool = False
) -> UnusableVideo:
    """Return the error to raise for a file, with a message of one line.

    Args:
        path: the file.
        detail: a description or a decoder's error.
        reason, of_window: see `UnusableVideo`.
    """
    detail = " ".join(str(detail).split()) or "unknown decoder error"
    problem, remedy = {
        DropReason.UNKNOWN_COLOURS: ("has colours that cannot be converted", "convert it to sRGB or BT.709"),
        DropReason.FROZEN: ("is frozen", "give a video that moves, or lower --fps"),
        DropReason.DAMAGED: ("is damaged", "repair or re-encode it"),
        DropReason.NOT_A_FILE: ("is not a file", "give a video or image"),
    }.get(reason, ("cannot be decoded", "repair or re-encode it"))
    return UnusableVideo(f"{path}: {problem} ({detail}); {remedy}, or remove its row", reason, of_window)


def require_shape(path: str | Path, width: int, height: int, pixel_aspect: Fraction | int = 1) -> Fraction:
    """Return width / height of a frame before rotation, with the shape of its pixels applied.

    Raises:
        UnusableVideo: the frame is beyond MAX_PIXELS or MAX_ASPECT.
    """
    if width * height > MAX_PIXELS:
        raise unusable_video(path, f"frames of {width}x{height} pixels", DropReason.BEYOND_LIMITS)
    aspect = Fraction(width, height) * pixel_aspect
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        detail = f"{width}x{height} pixels, shown {float(aspect):.3g} times as wide as high"
        raise unusable_video(path, detail, DropReason.BEYOND_LIMITS)
    return aspect
