"""Propose buckets for the videos of a dataset."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import mean, quantiles

from c2r.data.buckets import Bucket, nearest_buckets
from c2r.data.video import VideoInfo

#: Pixels of a frame, and frames of a clip, that Wan 2.1 of 1.3B was made for.
AREA, NUM_FRAMES = 480 * 832, 81
MAX_GROUPS = 4
#: Clips of fewer frames are left out rather than make all clips short.
SHORT = 17
#: Aspect ratios closer than this share one bucket: cropping takes at most about half of it.
CLOSE = log(1.1)


@dataclass(frozen=True)
class Crop:
    """The share of the picture that a bucket crops away from the videos that go to it."""

    videos: int
    mean: float
    worst: float


def propose_buckets(clips: Sequence[tuple[VideoInfo, int]]) -> list[Bucket]:
    """Propose one bucket for each group of aspect ratios, at most MAX_GROUPS.

    Args:
        clips: (shape of the video, frames at the frame rate of the clips) of each scene.
    """
    buckets = [_bucket(group) for group in _groups([clip for clip in clips if not clip[0].is_image])]
    return sorted(set(buckets), key=lambda bucket: (-bucket.aspect, bucket))


def crops(infos: Sequence[VideoInfo], buckets: Sequence[Bucket]) -> dict[Bucket, Crop]:
    """Return what each bucket crops away from videos, which go to buckets by the rule of `nearest_buckets`."""
    shares: dict[Bucket, list[float]] = defaultdict(list)
    for info in infos:
        for bucket in nearest_buckets(info, buckets)[:1]:
            shares[bucket].append(_crop(bucket.aspect, info.aspect))
    return {bucket: Crop(len(found), mean(found), max(found)) for bucket, found in shares.items()}


def _crop(aspect, other):
    """Return the share of a picture outside the largest rectangle of another aspect ratio."""
    return 1 - min(aspect, other) / max(aspect, other)


def _groups(clips):
    """Group clips by aspect ratio: the nearest neighbours are merged until they are few and far apart."""
    by_aspect = defaultdict(list)
    for clip in clips:
        by_aspect[round(log(clip[0].aspect), 3)].append(clip)
    groups = [by_aspect[key] for key in sorted(by_aspect)]

    def gap(position):
        left, right = (mean(log(info.aspect) for info, _ in group) for group in groups[position : position + 2])
        return right - left

    while len(groups) > 1:
        nearest = min(range(len(groups) - 1), key=gap)
        if len(groups) <= MAX_GROUPS and gap(nearest) > CLOSE:
            break
        groups[nearest : nearest + 2] = [groups[nearest] + groups[nearest + 1]]
    return groups


def _bucket(group):
    infos = [info for info, _ in group]
    # Half of the videos are at least as large as the one in the middle: only smaller ones are enlarged.
    middle = sorted(infos, key=lambda info: info.height**2 * info.aspect)[len(infos) // 2]
    limit = min(AREA, middle.height**2 * middle.aspect)
    aspect = exp(mean(log(info.aspect) for info in infos))

    def lost(size):
        height, width = size
        return _crop(width / height, aspect) + 1 - height * width / limit

    sizes = list(_sizes(limit, middle.height, middle.height * middle.aspect))
    return Bucket(_num_frames([frames for _, frames in group]), *min(sizes, key=lost, default=(16, 16)))


def _sizes(limit: float, max_height: float, max_width: float) -> Iterator[tuple[int, int]]:
    """Yield heights and widths divisible by 16 within a number of pixels and within a picture."""
    for height in range(16, int(max_height + 0.5) + 1, 16):
        for width in range(16, int(max_width + 0.5) + 1, 16):
            if height * width <= limit:
                yield height, width


def _num_frames(frames):
    """Return 4k + 1 frames that three of four clips have, from 5 to NUM_FRAMES; very short clips do not count."""
    frames = [count for count in frames if count >= SHORT] or frames
    quarter = quantiles(frames, n=4, method="inclusive")[0] if len(frames) > 1 else frames[0]
    return max(5, min(NUM_FRAMES, (int(quarter) - 1) // 4 * 4 + 1))
