"""Buckets: how they are written, which one a file goes to, and the windows that it is cut into; mixtures."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2r import InputError
from c2r.data.buckets import (
    Bucket,
    check_num_frames,
    check_pixels,
    cropped_share,
    cut_into_windows,
    fitting_size,
    parse_bucket,
)
from c2r.data.clips import Clips
from c2r.data.drop_reasons import DropReason
from c2r.data.manifest import read_manifest
from c2r.data.mixture import read_mixture
from c2r.data.video_writer import write_video
from tests.helpers.clips import clip, clips_of
from tests.helpers.settings import clip_settings
from tests.helpers.videos import counter_frames

WIDE, TALL, SHORT, IMAGE = (
    Bucket(*shape) for shape in ((81, 480, 832), (81, 832, 480), (49, 480, 832), (1, 480, 832))
)
BUCKETS = [WIDE, TALL, SHORT, IMAGE]


def file(aspect, height=1080, is_image=False):
    """Return the shape of a file, as in `VideoInfo`."""
    return SimpleNamespace(aspect=aspect, height=height, is_image=is_image)


def test_a_bucket_is_parsed_as_it_is_written():
    assert parse_bucket("81x480x832") == WIDE
    assert str(WIDE) == "81x480x832"
    for wrong in ("81x480", "axbxc", "81,480,832", "-1x480x832"):
        with pytest.raises(ValueError, match=r"^must be frames, height and width; write it like 81x480x832$"):
            parse_bucket(wrong)


def test_the_latent_grid_has_a_fourth_of_the_frames_and_an_eighth_of_the_pixels():
    assert WIDE.latent_grid == (21, 60, 104)
    assert IMAGE.latent_grid == (1, 60, 104)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_num_frames, "80", r"must be 4k \+ 1; try 81"),
        (check_num_frames, 83, r"must be 4k \+ 1; try 81"),
        (check_num_frames, 0, r"must be 4k \+ 1; try 1"),
        (check_num_frames, "8.5", r"must be a whole number; write it in digits"),
        (check_pixels, "470", r"must be divisible by 16; try 464"),
        (check_pixels, 473, r"must be divisible by 16; try 480"),
        (check_pixels, 488, r"must be divisible by 16; try 480"),
        (check_pixels, 0, r"must be divisible by 16; try 16"),
        (check_pixels, "wide", r"must be a whole number; write it in digits"),
        (parse_bucket, "80x480x832", r"its num_frames must be 4k \+ 1; try 81"),
        (parse_bucket, "81x470x832", r"its height must be divisible by 16; try 464"),
        (parse_bucket, "81x480x0", r"its width must be divisible by 16; try 16"),
    ],
)
def test_a_bad_shape_is_refused_with_a_better_one(check, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check(value)
    assert (check_num_frames("81"), check_num_frames(1), check_pixels("480")) == (81, 1, 480)


@pytest.mark.parametrize(
    ("frames", "info", "expected"),
    [
        (81, file(16 / 9), [(0, 0)]),
        (49, file(16 / 9), [(0, 2)]),
        (48, file(16 / 9), []),
        (300, file(16 / 9), [(0, 0), (81, 0), (162, 0), (243, 2)]),
        (300, file(9 / 16), [(0, 1), (81, 1), (162, 1)]),  # a short one would cut most of the picture away
        (1, file(16 / 9, is_image=True), [(0, 3)]),
    ],
)
def test_windows_are_of_the_bucket_that_fits_best(frames, info, expected):
    assert cut_into_windows(frames, info, BUCKETS) == expected


def test_an_image_needs_a_bucket_of_one_frame():
    assert cut_into_windows(1, file(16 / 9, is_image=True), BUCKETS[:3]) == []


@pytest.mark.parametrize(("height", "expected"), [(1080, 1), (720, 1), (719, 0), (200, 0)])
def test_the_largest_size_that_does_not_enlarge_the_file_is_chosen(height, expected):
    buckets = [Bucket(81, 360, 640), Bucket(81, 720, 1280)]
    assert cut_into_windows(81, file(16 / 9, height), buckets) == [(0, expected)]


@given(st.integers(1, 2000), st.floats(0.2, 5), st.integers(100, 3000), st.booleans())
def test_windows_neither_overlap_nor_exceed_the_file(frames, aspect, height, is_image):
    end = 0
    for first, number in cut_into_windows(frames, file(aspect, height, is_image), BUCKETS):
        assert first == end
        end = first + BUCKETS[number].num_frames
        assert (BUCKETS[number].num_frames == 1) == is_image
    assert end <= frames


SETTINGS = clip_settings(buckets=(Bucket(9, 48, 64), Bucket(5, 48, 64)), fps=16)


def write_folder(folder, rows):
    write_video(folder / "a.mp4", counter_frames(24), 16)
    write_video(folder / "b.mp4", counter_frames(9), 16)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{row},a\n" for row in rows))
    return folder


def test_a_file_is_cut_into_long_windows_and_a_short_one(tmp_path):
    manifest = read_manifest(write_folder(tmp_path, ["a.mp4", "b.mp4"]), "real", SETTINGS)
    assert [(c.name, c.window, c.start, c.bucket.num_frames) for c in manifest.clips] == [
        ("a.mp4", 0, 0.0, 9),
        ("a.mp4", 1, 9 / 16, 9),
        ("a.mp4", 2, 18 / 16, 5),
        ("b.mp4", 0, 0.0, 9),
    ]


def test_a_file_is_too_short_only_for_buckets_of_its_own_shape(tmp_path):
    """The reason is not resampling, although the file has enough frames for the bucket of the other shape."""
    write_video(tmp_path / "a.mp4", counter_frames(40), 16)
    write_video(tmp_path / "b.mp4", counter_frames(20), 16)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,a\nb.mp4,a\n")
    settings = replace(SETTINGS, buckets=(Bucket(33, 48, 64), Bucket(17, 64, 48)))
    dropped = read_manifest(tmp_path, "real", settings).dropped
    assert [(row.file, row.reason) for row in dropped] == [("b.mp4", DropReason.TOO_SHORT)]


def test_more_dropped_rows_than_allowed_end_the_run(tmp_path):
    write_folder(tmp_path, ["a.mp4", "b.mp4", "gone.mp4"])
    assert len(read_manifest(tmp_path, "real", replace(SETTINGS, max_dropped=0.34)).dropped) == 1
    with pytest.raises(InputError, match=r"1 of 3 rows are dropped \(1 missing file\), more than --max_dropped 0.33"):
        read_manifest(tmp_path, "real", replace(SETTINGS, max_dropped=0.33))


def test_a_mixture_has_a_weight_for_each_dataset(tmp_path):
    for name in ("x", "y:2"):
        write_folder(tmp_path / name, ["a.mp4", "b.mp4"])
    mixture = read_mixture([f"{tmp_path}/x:0.5", f"{tmp_path}/y:2"], "real", SETTINGS)
    assert mixture.weights == ["0.5", "1"]  # there is a folder named "y:2"
    assert [clip.folder[-1] for clip in mixture.clips] == ["x"] * 4 + ["2"] * 4
    first, second = mixture.datasets
    assert mixture.parts(mixture.train) == [(len(first.train), "0.5"), (len(second.train), "1")]
    with pytest.raises(InputError, match="its weight must be above 0"):
        read_mixture([f"{tmp_path}/x:0"], "real", SETTINGS)
    with pytest.raises(InputError, match="names one dataset twice"):
        read_mixture([f"{tmp_path}/x", f"{tmp_path}/x:2"], "real", SETTINGS)
    with pytest.raises(InputError, match="names one dataset twice"):
        read_mixture([f"{tmp_path}/x", f"{tmp_path}/y/../x/"], "real", SETTINGS)


def test_the_port_of_an_address_is_not_a_weight(tmp_path):
    settings = replace(SETTINGS, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"^unknown://localhost:8000: "):
        read_mixture(["unknown://localhost:8000"], "real", settings)
    with pytest.raises(InputError, match=r"^unknown://localhost:8000/data: "):
        read_mixture(["unknown://localhost:8000/data:2"], "real", settings)


def test_first_windows_alternate_between_datasets_and_buckets():
    first = clips_of(*(clip(f"a{i}", window) for i in range(4) for window in range(2)))
    second = clips_of(*(clip(f"b{i}", bucket=WIDE if i < 2 else TALL) for i in range(4)))
    both = Clips.concatenated([first, second])
    assert [c.name for c in both.first_windows(6)] == ["a0", "b0", "b2", "a1", "b1", "b3"]
    assert [(c.name, c.window) for c in both.first_windows()][-6:] == [
        *(("a2", 0), ("a3", 0)),
        *((f"a{i}", 1) for i in range(4)),
    ]
    assert [(c.name, c.window) for c in first.first_windows(5)] == [*((f"a{i}", 0) for i in range(4)), ("a0", 1)]


@pytest.mark.parametrize(
    ("aspect", "expected"), [(832 / 480, (480, 832)), (480 / 832, (832, 480)), (1.0, (624, 624)), (16 / 9, (480, 848))]
)
def test_a_fitting_size_keeps_the_picture_and_the_number_of_pixels(aspect, expected):
    height, width = fitting_size(aspect, 480 * 832)
    assert (height, width) == expected
    assert cropped_share(aspect, width / height) < 0.01
    assert cropped_share(2.0, 0.5) == cropped_share(0.5, 2.0) == 0.75
