"""Propose buckets for the videos of a dataset."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import mean, quantiles

from c2r.data.buckets import Bucket, cropped_share, nearest_buckets
from c2r.data.video_info import VideoInfo

#: Pixels of a frame, and frames of a clip, that Wan 2.1 of 1.3B was made for.
AREA, NUM_FRAMES = 480 * 832, 81
MAX_GROUPS = 4
#: Clips of fewer frames are left out rather than make all clips short.
SHORT = 17
#: Aspect ratios closer than this share one bucket: cropping takes at most about half of it.
CLOSE = log(1.1)


@dataclass(frozen=True)
class Crop:
    """The share of the picture that buckets of one size crop away from the videos that go to them."""

    videos: int
    mean: float
    worst: float


def propose_buckets(clips: Sequence[tuple[VideoInfo, int]]) -> list[Bucket]:
    """Propose a size for each group of aspect ratios, at most MAX_GROUPS, in one or two lengths.

    Args:
        clips: (shape of the video, frames at the frame rate of the clips) of each scene.
    """
    buckets = {
        Bucket(num_frames, *_size([info for info, _ in group]))
        for group in _groups([clip for clip in clips if not clip[0].is_image])
        for num_frames in _lengths([frames for _, frames in group])
    }
    return sorted(buckets, key=lambda bucket: (-bucket.aspect, -bucket.num_frames))


def crops(infos: Sequence[VideoInfo], buckets: Sequence[Bucket]) -> dict[tuple[int, int], Crop]:
    """Return {(height, width): what it crops away} for videos that go to buckets by the rule of `nearest_buckets`."""
    shares: dict[tuple[int, int], list[float]] = defaultdict(list)
    for info in infos:
        for bucket in nearest_buckets(info, buckets)[:1]:
            shares[bucket[1:]].append(cropped_share(bucket.aspect, info.aspect))
    return {size: Crop(len(found), mean(found), max(found)) for size, found in shares.items()}


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


def _size(infos: Sequence[VideoInfo]) -> tuple[int, int]:
    """Return the height and width that lose least of the videos' pixels by cropping and by being small."""
    # Half of the videos are at least as large as the one in the middle: only smaller ones are enlarged.
    middle = sorted(infos, key=lambda info: info.height**2 * info.aspect)[len(infos) // 2]
    limit = min(AREA, middle.height**2 * middle.aspect)
    aspect = exp(mean(log(info.aspect) for info in infos))

    def lost(size):
        height, width = size
        return cropped_share(width / height, aspect) + 1 - height * width / limit

    sizes = list(_sizes(limit, middle.height, middle.height * middle.aspect))
    return min(sizes, key=lost, default=(16, 16))


def _sizes(limit: float, max_height: float, max_width: float) -> Iterator[tuple[int, int]]:
    """Yield heights and widths divisible by 16 within a number of pixels and within a picture."""
    for height in range(16, int(max_height + 0.5) + 1, 16):
        for width in range(16, int(max_width + 0.5) + 1, 16):
            if height * width <= limit:
                yield height, width


def _lengths(frames: Sequence[int]) -> set[int]:
    """Return 4k + 1 frames, from 5 to NUM_FRAMES: a length of three of four clips, and one that fits the others too.

    If the two are close, the shorter serves all. Clips of fewer frames than SHORT have no say, unless they are more
    than a quarter.
    """
    counted = [count for count in frames if count >= SHORT]
    counted = counted if len(counted) >= 0.75 * len(frames) else list(frames)
    quarter = quantiles(counted, n=4, method="inclusive")[0] if len(counted) > 1 else counted[0]
    long, short = (max(5, min(NUM_FRAMES, (int(count) - 1) // 4 * 4 + 1)) for count in (quarter, min(counted)))
    return {short} if short >= 0.8 * long else {short, long}
