"""Proposed buckets and what they crop away."""

from fractions import Fraction

import pytest

from c2r.data.buckets import Bucket
from c2r.data.video_info import VideoInfo
from c2r.preparation.proposal import AREA, MAX_GROUPS, Crop, crops, propose_buckets


def clip(width, height, frames=81):
    return VideoInfo(Fraction(10), Fraction(1, 30), width / height, False, height), frames


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (1920, 1080, (480, 832)),
        (1080, 1920, (832, 480)),
        (3840, 2160, (480, 832)),
        (832, 480, (480, 832)),
        (640, 480, (480, 640)),
        (320, 240, (240, 320)),
        (200, 120, (112, 192)),
    ],
)
def test_a_bucket_is_near_the_videos_shape_and_does_not_enlarge_it(width, height, size):
    assert propose_buckets([clip(width, height)]) == [Bucket(81, *size)]


def test_landscape_portrait_and_square_have_a_bucket_each():
    clips = [clip(1920, 1080), clip(1080, 1920), clip(1080, 1080), clip(1280, 720)]
    wide, square, tall = propose_buckets(clips)
    assert (wide[1:], tall[1:]) == ((480, 832), (832, 480))
    assert 0.95 < square.aspect < 1.06


def test_many_shapes_share_few_buckets():
    clips = [clip(100 * n, 1000) for n in range(4, 30)]
    buckets = propose_buckets(clips)
    assert len(buckets) == MAX_GROUPS
    for bucket in buckets:
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert 0.8 * AREA < bucket.height * bucket.width <= AREA


@pytest.mark.parametrize(
    ("frames", "lengths"),
    [
        ([200, 300], [81]),
        ([50, 60, 70, 80], [49]),
        ([30, 60, 70, 80], [49, 29]),
        ([81] * 9 + [20], [81, 17]),
        ([81] * 9 + [3], [81]),
        ([18, 16, 10, 18], [13, 9]),
        ([7], [5]),
        ([2], [5]),
    ],
)
def test_lengths_are_those_of_most_clips_and_one_for_the_others(frames, lengths):
    buckets = propose_buckets([clip(832, 480, count) for count in frames])
    assert [bucket.num_frames for bucket in buckets] == lengths


def test_crops_are_shares_of_the_picture():
    buckets = [Bucket(81, 480, 832), Bucket(17, 480, 832), Bucket(81, 832, 480)]
    infos = [clip(832, 480)[0], clip(1664, 480)[0], clip(480, 832)[0]]
    assert crops(infos, buckets) == {
        (480, 832): Crop(2, pytest.approx(0.25), pytest.approx(0.5)),
        (832, 480): Crop(1, 0, 0),
    }
