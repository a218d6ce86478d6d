"""Buckets: the shapes that clips are cut to. All clips of a batch are of one bucket."""

from collections.abc import Sequence
from math import log, sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from c2r.data.video_info import VideoInfo  # takes longer to import than all options


#: Share of a picture lost by cropping from which on it is warned of.
MUCH_CROPPED = 0.25


class Bucket(NamedTuple):
    """Number of frames, height and width in pixels; written 81x480x832. A bucket of one frame takes images."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def aspect(self) -> float:
        """Width / height."""
        return self.width / self.height

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """Latent frames, height and width (T, h, w) of a clip."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8


def parse_bucket(text: str) -> Bucket:
    """Return the bucket written as "81x480x832".

    Raises:
        ValueError: it is not written like this, or Wan cannot encode its shape.
    """
    parts = str(text).lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError("must be frames, height and width; write it like 81x480x832")
    values = []
    for name, check, part in zip(Bucket._fields, (check_num_frames, check_pixels, check_pixels), parts):
        try:
            values.append(check(part))
        except ValueError as error:
            raise ValueError(f"its {name} {error}") from None
    return Bucket(*values)


def check_num_frames(value: str | int) -> int:
    """Return a clip's number of frames if the VAE can encode it: one frame, then groups of four.

    Raises:
        ValueError: it is not 4k + 1; the message suggests a number.
    """
    frames = _whole_number(value)
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"must be 4k + 1; try {max(1, frames // 4 * 4 + 1)}")
    return frames


def check_pixels(value: str | int) -> int:
    """Return a clip's height or width if it divides into the transformer's patches: 8 for the VAE times 2.

    Raises:
        ValueError: it is not divisible by 16; the message suggests a number.
    """
    pixels = _whole_number(value)
    if pixels < 16 or pixels % 16:
        raise ValueError(f"must be divisible by 16; try {max(16, round(pixels / 16) * 16)}")
    return pixels


def _whole_number(value: str | int) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError("must be a whole number; write it in digits") from None


def cropped_share(aspect: float, other: float) -> float:
    """Return the share of a picture that is lost when it is cropped to another aspect ratio, in [0, 1)."""
    return 1 - min(aspect, other) / max(aspect, other)


def fitting_size(aspect: float, pixels: int) -> tuple[int, int]:
    """Return the height and width, divisible by 16, of about an aspect ratio and a number of pixels."""
    height = max(16, 16 * round(sqrt(pixels / aspect) / 16))
    return height, max(16, 16 * round(height * aspect / 16))


def nearest_buckets(info: "VideoInfo", buckets: Sequence[Bucket]) -> list[Bucket]:
    """Return the buckets whose aspect ratio is nearest to a file's.

    Images go to buckets of one frame; the result is empty if there is none. Videos go to the longer buckets; if all
    buckets have one frame, each frame of a video is a clip.
    """
    fitting = [bucket for bucket in buckets if (bucket.num_frames == 1) == info.is_image]
    if not fitting and not info.is_image:
        fitting = list(buckets)

    def mismatch(bucket):
        # Diffusers' find_nearest_bucket does not serve here: its measure grows with size, which favours small buckets.
        return round(abs(log(bucket.aspect / info.aspect)), 9)

    least = min(map(mismatch, fitting), default=0)
    return [bucket for bucket in fitting if mismatch(bucket) == least]


def cut_into_windows(frames: int, info: "VideoInfo", buckets: Sequence[Bucket]) -> list[tuple[int, int]]:
    """Cut a file into consecutive windows that do not overlap.

    All windows of a file have one height and width: among the buckets of the nearest aspect ratio (see
    `nearest_buckets`) the largest that does not enlarge the file, or the smallest if all do. Windows of the longest
    bucket come first; the remaining frames give windows of the shorter ones.

    Args:
        frames: the file's length, counted at the frame rate of the clips.
        info: the file's kind and shape.
        buckets: all buckets in use.

    Returns:
        (first frame, position in `buckets`) of each window; empty if no bucket takes the file.
    """

    def enlargement(bucket):
        return max(bucket.height / info.height, bucket.width / (info.height * info.aspect))

    fitting = [bucket for bucket in nearest_buckets(info, buckets) if bucket.num_frames <= frames]
    if not fitting:
        return []
    filled = [bucket for bucket in fitting if enlargement(bucket) <= 1]
    size = max(bucket[1:] for bucket in filled) if filled else min(bucket[1:] for bucket in fitting)
    windows, first = [], 0
    for bucket in sorted((bucket for bucket in fitting if bucket[1:] == size), reverse=True):
        count = (frames - first) // bucket.num_frames
        windows += [(first + i * bucket.num_frames, buckets.index(bucket)) for i in range(count)]
        first += count * bucket.num_frames
    return windows
