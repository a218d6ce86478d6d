"""Cuts: at the right frame and time, at any frame rate, and no clip across one."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from c2r.data.video import UnusableVideo, probe, read_window
from c2r.preparation.scenes import find_cuts, parts_between
from tests.helpers.datasets import noise_video
from tests.helpers.scenes import read_scene, scene_frames
from tests.helpers.videos import encode_video

THRESHOLD = 3.0


def variable_times(count, seed=0):
    """Return the times of frames whose distances vary between 1/60 and 1/12 of a second, in whole milliseconds."""
    steps = np.random.default_rng(seed).choice([17, 33, 50, 83], count)
    return [int(time) / 1000 for time in np.cumsum(steps) - steps[0]]


@pytest.mark.parametrize(("name", "fps"), [("a.mp4", 16), ("a.mkv", 24), ("a.avi", 25), ("a.mp4", 30000 / 1001)])
def test_cuts_have_the_times_of_their_frames(name, fps, tmp_path):
    codec = {"codec": "mpeg4"} if name == "a.avi" else {}
    path = encode_video(tmp_path / name, scene_frames(20, 9, 31), fps=fps, **codec)
    cuts = find_cuts(str(path), THRESHOLD, [])
    rounding = 0.001 if name == "a.mkv" else 1e-9  # Matroska stores milliseconds
    assert cuts == [pytest.approx((n / fps, (n + 1) / fps), abs=rounding) for n in (19, 28)]


def test_cuts_of_a_variable_frame_rate_have_the_times_of_their_frames(tmp_path):
    times = variable_times(90)
    path = encode_video(tmp_path / "a.mp4", scene_frames(40, 15, 35), times=times)
    assert find_cuts(str(path), THRESHOLD, []) == [(times[39], times[40]), (times[54], times[55])]


@pytest.mark.parametrize("lengths", [(1, 30), (2, 30), (30, 1), (30, 2), (12, 1, 12)])
def test_scenes_of_single_frames_are_found(lengths, tmp_path):
    path = encode_video(tmp_path / "a.mp4", scene_frames(*lengths), fps=16)
    assert [round(16 * after) for _, after in find_cuts(str(path), THRESHOLD, [])] == np.cumsum(lengths)[:-1].tolist()


def test_motion_is_no_cut(tmp_path):
    path = encode_video(tmp_path / "a.mp4", noise_video(0, 40), fps=16)
    assert find_cuts(str(path), THRESHOLD, []) == []


def test_a_higher_threshold_finds_fewer_cuts(tmp_path):
    frames = scene_frames(10, 10)
    frames[5:10] = frames[5:10] // 2  # a change of light, within other changes
    frames[4] = frames[4] * 0.75
    path = encode_video(tmp_path / "a.mp4", frames, fps=16)
    assert len(find_cuts(str(path), 200.0, [])) < len(find_cuts(str(path), 1.1, []))


def test_cuts_of_an_image_sequence_have_the_times_of_its_rate(tmp_path):
    for n, frame in enumerate(scene_frames(7, 9), 1001):
        Image.fromarray(frame).save(tmp_path / f"s_{n}.png")
    assert find_cuts(f"{tmp_path}/s_%d.png@24", THRESHOLD, []) == [(6 / 24, 7 / 24)]


def test_a_damaged_video_is_unusable(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UnusableVideo, match=r"a\.mp4: cannot be decoded"):
        find_cuts(str(tmp_path / "a.mp4"), THRESHOLD, [])


def test_parts_meet_at_the_frames_after_the_cuts():
    assert parts_between([], Fraction(1, 16)) == [("", "")]
    cuts = [(19 / 16, 20 / 16), (28 / 16, 29 / 16)]
    assert parts_between(cuts, Fraction(1, 16)) == [("", "1.25"), ("1.25", "1.8125"), ("1.8125", "")]


def test_a_part_ends_earlier_if_the_frame_after_it_is_late():
    ((_, end), (start, _)) = parts_between([(1.0, 2.0)], Fraction(1, 10))
    assert start == "2.0"
    assert float(end) - 1 / 20 == pytest.approx(1.5)  # from here on the frame after the cut is nearer


@pytest.mark.parametrize("seed", range(3))
def test_frames_of_a_part_are_of_one_scene(seed, tmp_path):
    times = variable_times(120, seed)
    path = encode_video(tmp_path / "a.mp4", scene_frames(33, 40, 47), times=times)
    info = probe(path)
    for fps in (10, 16, 50):
        for scene, (start, end) in enumerate(parts_between(find_cuts(str(path), THRESHOLD, []), info.interval)):
            # The first and last times that readers take from a part.
            first = int(np.ceil(float(start or 0) * fps))
            last = int((float(end) - float(info.interval) / 2) * fps) if end else info.frames_at(fps) - 1
            assert set(read_scene(read_window(path, first / fps, last - first + 1, fps, 48, 64))) == {scene}
