"""Buckets: the shapes in frames, height and width that clips are cut to; a batch holds clips of one bucket."""

from argparse import ArgumentTypeError
from math import inf, log
from typing import NamedTuple

from c2r import InputError


class Bucket(NamedTuple):
    """Pixel frames, height and width in pixels; written 81x480x832. A bucket of one frame takes images."""

    num_frames: int
    height: int
    width: int

    def __str__(self):
        return "x".join(map(str, self))

    @property
    def aspect(self) -> float:
        """Width / height."""
        return self.width / self.height

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """(T, h, w) of its latents."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8


def parse_bucket(text) -> Bucket:
    """A `Bucket` from "81x480x832"; for argparse."""
    parts = str(text).lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ArgumentTypeError(f"{text!r} is no bucket; give frames, height and width like 81x480x832")
    return Bucket(*map(int, parts))


def buckets_of(options) -> list[Bucket]:
    """The buckets that a command's options ask for: `buckets`, or the one of `num_frames`, `height` and `width`.

    Raises:
        InputError: a shape or rate that Wan's VAE and patches cannot take, or a bucket named twice.
    """
    named = getattr(options, "buckets", None)
    buckets = named or [Bucket(options.num_frames, options.height, options.width)]
    for bucket in buckets:
        for name, value in bucket._asdict().items():
            if name == "num_frames":  # the VAE's first frame stands alone, then it takes them by fours
                fits, nearest, rule = value >= 1 and value % 4 == 1, max(1, value // 4 * 4 + 1), "4k + 1"
            else:  # 8 of the VAE times 2 of the patches
                fits, nearest = value >= 16 and value % 16 == 0, max(16, round(value / 16) * 16)
                rule = "divisible by 16"
            if not fits:
                option = f"--buckets {bucket}: its {name}" if named else f"--{name} {value}:"
                raise InputError(f"{option} must be {rule}; try {nearest}")
        if buckets.count(bucket) > 1:
            raise InputError(f"--buckets {bucket}: is there twice; name it once")
    if not 0 < options.fps < inf:
        raise InputError(f"--fps {options.fps}: must be above 0 and finite")
    return buckets


def nearest_buckets(info, buckets) -> list[Bucket]:
    """The buckets whose aspect ratio is nearest to a file's; none for an image where none has one frame.

    Images go to buckets of one frame, and videos only where there are no others: then each frame is a clip.

    Args:
        info: has `aspect` and `is_image`, as `VideoInfo`.
        buckets: list of `Bucket`.
    """
    fitting = [bucket for bucket in buckets if (bucket.num_frames == 1) == info.is_image]
    if not fitting and not info.is_image:
        fitting = buckets

    def misfit(bucket):
        # Not diffusers' find_nearest_bucket: its measure grows with the bucket's size, so small ones would win.
        return round(abs(log(bucket.aspect / info.aspect)), 9)

    least = min(map(misfit, fitting), default=0)
    return [bucket for bucket in fitting if misfit(bucket) == least]


def cut_into_windows(frames, info, buckets) -> list[tuple[int, int]]:
    """The windows of a file: consecutive, without overlap, each in the bucket that fits best.

    Of the aspect ratios the nearest is taken, see `nearest_buckets`; of several sizes with this ratio the largest that
    the file fills without being enlarged, or else the smallest. Then as many windows of the longest bucket are cut as
    there are frames for, and what is left gives windows of the shorter ones.

    Args:
        frames: how many the file has at the rate of the clips.
        info: has `aspect`, `height` and `is_image`, as `VideoInfo`.
        buckets: list of `Bucket`.

    Returns:
        list of (first frame, number of the bucket); empty if no bucket takes the file.
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
