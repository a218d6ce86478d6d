"""Scenes of a dataset: which rows are read, their names, and what they are measured on."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from c2r import InputError
from c2r.data.video_writer import write_video
from c2r.scoring.scenes import ClipFormat, check_scenes, find_videos, other_controls, read_scenes
from tests.helpers.commands import SIZE
from tests.helpers.datasets import noise_video

FORM = ClipFormat(5, 32, 48, 8.0)


def write_rows(folder, *rows, columns=("file_name", "control_name", "text")):
    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def read(folder, max_clips=None, sequence_fps=None):
    return read_scenes(str(folder), folder / ".cache", sequence_fps, max_clips)


@pytest.fixture
def videos(tmp_path):
    """A folder with v0.mp4 to v3.mp4, of 10 frames."""
    for i in range(4):
        write_video(tmp_path / f"data/v{i}.mp4", noise_video(i), SIZE["fps"])
    return tmp_path / "data"


def test_a_scene_without_a_true_video_has_the_name_of_its_control(videos):
    write_rows(videos, ("v0.mp4", "v1.mp4", "rain"), ("", "v2.mp4", "dusk"), ("v3.mp4", "", "snow"))
    scenes = read(videos)
    assert [scene.name for scene in scenes] == ["v0", "v2", "v3"]
    assert [scene.truth is None for scene in scenes] == [False, True, False]
    assert [scene.control is None for scene in scenes] == [False, False, True]
    assert scenes[1].read(scenes[1].truth, FORM) is None
    assert [scene.name for scene in read(videos, max_clips=2)] == ["v0", "v2"]
    write_rows(videos, ("", "", "rain"))
    with pytest.raises(InputError, match=r"row 1 of its metadata: missing file \(the row names none\)"):
        read(videos)


def test_the_rows_of_validation_are_measured_alone(videos):
    write_rows(videos, ("v0.mp4", "v1.mp4", "rain"))
    (videos / "validation").mkdir()
    shutil.copy(videos / "v2.mp4", videos / "validation/held.mp4")
    write_rows(videos / "validation", ("held.mp4", "v3.mp4", "dusk"))
    (scene,) = read(videos)
    assert (scene.name, scene.prompt) == ("validation/held", "dusk")


def test_a_row_may_begin_within_its_videos(videos):
    write_rows(videos, ("v0.mp4", "v1.mp4", "rain", "0.5"), columns=("file_name", "control_name", "text", "start"))
    (scene,) = read(videos)
    whole = ClipFormat(10, 32, 48, 8.0)
    later = scene.read(scene.truth, FORM)
    write_rows(videos, ("v0.mp4", "v1.mp4", "rain"))
    (from_start,) = read(videos)
    np.testing.assert_array_equal(later, from_start.read(from_start.truth, whole)[4:9])
    check_scenes([scene], FORM)
    with pytest.raises(InputError, match="gives 6 frames at 8 fps, but clips have 9"):
        check_scenes([scene], ClipFormat(9, 32, 48, 8.0))


def test_a_sequence_has_the_name_of_its_folder(videos):
    (videos / "shots/07").mkdir(parents=True)
    for number, frame in enumerate(noise_video(0)):
        Image.fromarray(frame).save(videos / f"shots/07/frame_{number:04d}.png")
    write_rows(videos, ("shots/07", "v1.mp4", "rain"))
    (scene,) = read(videos, sequence_fps=8)
    assert scene.name == "shots/07"
    check_scenes([scene], FORM)
    with pytest.raises(InputError, match="sequence without a rate"):
        read(videos)


def test_another_control_is_that_of_the_next_scene_with_another_file(videos):
    write_rows(videos, ("v0.mp4", "v2.mp4", "rain"), ("v1.mp4", "v2.mp4", "dusk"), ("v3.mp4", "v0.mp4", "snow"))
    scenes = read(videos)
    assert [other.name for other in other_controls(scenes)] == ["v3", "v3", "v0"]


def test_videos_from_elsewhere_have_the_name_of_truth_or_control(videos, tmp_path):
    write_rows(videos, ("v0.mp4", "v1.mp4", "rain"))
    for name in ("v1.webm", "v0.mkv"):
        (tmp_path / name).touch()
        assert find_videos(str(tmp_path), read(videos)) == {"v0": tmp_path / name}


def test_much_cropping_is_warned_of(videos, caplog):
    write_video(videos / "tall.mp4", np.zeros((10, 96, 32, 3), np.uint8), 8)
    write_rows(videos, ("v0.mp4", "v1.mp4", "rain"), ("", "tall.mp4", "dusk"))
    with caplog.at_level("WARNING"):
        check_scenes(read(videos), FORM)
    assert "tall: 78 % of its picture is cropped away at 32x48, the most of all scenes" in caplog.text
