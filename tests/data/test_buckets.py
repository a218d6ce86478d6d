"""Which bucket a file goes to, and what windows it gives."""

from argparse import ArgumentTypeError
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2r import InputError
from c2r.data.buckets import Bucket, buckets_of, cut_into_windows, parse_bucket
from c2r.data.clips import Clips
from c2r.data.manifest import read_manifest
from c2r.data.mixture import read_sources
from c2r.data.video import write_video
from tests.helpers.clips import clip, clips_of
from tests.helpers.videos import counter_frames

WIDE, TALL, SHORT, IMAGE = (
    Bucket(*shape) for shape in ((81, 480, 832), (81, 832, 480), (49, 480, 832), (1, 480, 832))
)
BUCKETS = [WIDE, TALL, SHORT, IMAGE]


def file(aspect, height=1080, is_image=False):
    return SimpleNamespace(aspect=aspect, height=height, is_image=is_image)


def test_a_bucket_is_read_as_it_is_written():
    assert parse_bucket("81x480x832") == WIDE
    assert str(WIDE) == "81x480x832"
    for wrong in ("81x480", "axbxc", "81,480,832", "-1x480x832"):
        with pytest.raises(ArgumentTypeError, match="no bucket; give frames, height and width"):
            parse_bucket(wrong)


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
def test_windows_are_of_the_bucket_that_fits(frames, info, expected):
    assert cut_into_windows(frames, info, BUCKETS) == expected


def test_an_image_needs_a_bucket_of_one_frame():
    assert cut_into_windows(1, file(16 / 9, is_image=True), BUCKETS[:3]) == []


@pytest.mark.parametrize(("height", "expected"), [(1080, 1), (720, 1), (719, 0), (200, 0)])
def test_of_several_sizes_the_largest_that_is_not_enlarged(height, expected):
    buckets = [Bucket(81, 360, 640), Bucket(81, 720, 1280)]
    assert cut_into_windows(81, file(16 / 9, height), buckets) == [(0, expected)]


@given(st.integers(1, 2000), st.floats(0.2, 5), st.integers(100, 3000), st.booleans())
def test_windows_do_not_overlap_nor_leave_the_file(frames, aspect, height, is_image):
    end = 0
    for first, number in cut_into_windows(frames, file(aspect, height, is_image), BUCKETS):
        assert first == end
        end = first + BUCKETS[number].num_frames
        assert (BUCKETS[number].num_frames == 1) == is_image
    assert end <= frames


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([Bucket(80, 480, 832)], r"--buckets 80x480x832: its num_frames must be 4k \+ 1; try 81"),
        ([Bucket(81, 470, 832)], r"--buckets 81x470x832: its height must be divisible by 16; try 464"),
        ([WIDE, WIDE], r"--buckets 81x480x832: is there twice"),
    ],
)
def test_bad_buckets_are_named_with_the_mend(buckets, message):
    with pytest.raises(InputError, match=message):
        buckets_of(SimpleNamespace(buckets=buckets, fps=16))


@pytest.fixture
def options():
    return SimpleNamespace(buckets=[Bucket(9, 48, 64), Bucket(5, 48, 64)], fps=16, cache_dir=None, max_dropped=None)


def write_folder(folder, rows):
    write_video(folder / "a.mp4", counter_frames(24), 16)
    write_video(folder / "b.mp4", counter_frames(9), 16)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{row},a\n" for row in rows))
    return folder


def test_a_file_is_cut_into_long_windows_and_a_short_one(tmp_path, options):
    manifest = read_manifest(write_folder(tmp_path, ["a.mp4", "b.mp4"]), "real", options)
    assert [(c.name, c.window, c.start, c.bucket.num_frames) for c in manifest.clips] == [
        ("a.mp4", 0, 0.0, 9),
        ("a.mp4", 1, 9 / 16, 9),
        ("a.mp4", 2, 18 / 16, 5),
        ("b.mp4", 0, 0.0, 9),
    ]


def test_a_file_is_too_short_for_the_buckets_of_its_own_shape(tmp_path, options):
    """Not for one of another shape: nothing is lost by resampling here."""
    write_video(tmp_path / "a.mp4", counter_frames(40), 16)
    write_video(tmp_path / "b.mp4", counter_frames(20), 16)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,a\nb.mp4,a\n")
    options.buckets = [Bucket(33, 48, 64), Bucket(17, 64, 48)]
    assert [(row.file, row.reason) for row in read_manifest(tmp_path, "real", options).dropped] == [
        ("b.mp4", "too short")
    ]


def test_more_lost_rows_than_allowed_end_the_run(tmp_path, options):
    write_folder(tmp_path, ["a.mp4", "b.mp4", "gone.mp4"])
    options.max_dropped = 0.34
    assert len(read_manifest(tmp_path, "real", options).dropped) == 1
    options.max_dropped = 0.33
    with pytest.raises(InputError, match=r"1 of 3 rows are dropped \(1 missing file\), more than --max_dropped 0.33"):
        read_manifest(tmp_path, "real", options)


def test_weights_of_several_datasets(tmp_path, options):
    for name in ("x", "y:2"):
        write_folder(tmp_path / name, ["a.mp4", "b.mp4"])
    sources = read_sources([f"{tmp_path}/x:0.5", f"{tmp_path}/y:2"], "real", options)
    assert sources.weights == ["0.5", "1"]  # the second is a folder of that name
    assert [clip.folder[-1] for clip in sources.clips] == ["x"] * 4 + ["2"] * 4
    assert sources.parts(sources.train) == [
        (len(sources.manifests[0].train), "0.5"),
        (len(sources.manifests[1].train), "1"),
    ]
    with pytest.raises(InputError, match="its weight must be above 0"):
        read_sources([f"{tmp_path}/x:0"], "real", options)
    with pytest.raises(InputError, match="names one twice"):
        read_sources([f"{tmp_path}/x", f"{tmp_path}/x:2"], "real", options)
    with pytest.raises(InputError, match="names one twice"):
        read_sources([f"{tmp_path}/x", f"{tmp_path}/y/../x/"], "real", options)


def test_a_port_is_no_weight(options, tmp_path):
    """The address is asked for, not another one with a weight."""
    options.cache_dir, options.video_cache_gb = str(tmp_path), 1
    with pytest.raises(InputError, match=r"^unknown://localhost:8000: "):
        read_sources(["unknown://localhost:8000"], "real", options)
    with pytest.raises(InputError, match=r"^unknown://localhost:8000/data: "):
        read_sources(["unknown://localhost:8000/data:2"], "real", options)


def test_first_windows_are_of_all_datasets_and_buckets_in_turn():
    first = clips_of(*(clip(f"a{i}", window) for i in range(4) for window in range(2)))
    second = clips_of(*(clip(f"b{i}", bucket=WIDE if i < 2 else TALL) for i in range(4)))
    both = Clips.concatenated([first, second])
    assert [c.name for c in both.first_windows(6)] == ["a0", "b0", "b2", "a1", "b1", "b3"]
    assert [(c.name, c.window) for c in both.first_windows()][-6:] == [
        *(("a2", 0), ("a3", 0)),
        *((f"a{i}", 1) for i in range(4)),
    ]
    assert [(c.name, c.window) for c in first.first_windows(5)] == [*((f"a{i}", 0) for i in range(4)), ("a0", 1)]
