"""Videos of each scene side by side."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from c2r import InputError
from c2r.data.clips import DatasetFile
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.scoring.measuring import Source
from c2r.scoring.scenes import ClipFormat, Scene
from c2r.scoring.side_by_side import colours_of, greys_of, remove_earlier_files, require_own_files, write_side_by_side

FORM = ClipFormat(9, 64, 96, 8.0)


@pytest.fixture
def scenes(tmp_path):
    """A scene with control and truth, and one without truth; their videos are grey, ever brighter."""

    def file(name, grey):
        ramp = np.arange(9).reshape(-1, 1, 1, 1) + np.full((1, 64, 96, 3), grey)
        write_video(tmp_path / name, ramp.astype(np.uint8), 8)
        return DatasetFile(str(tmp_path), name, 0, 0)

    whole = Scene("whole", "rain", 0.0, file("c.mp4", 50), file("t.mp4", 200), None, None)
    without = Scene("without", "rain", 0.0, file("d.mp4", 60), None, None, None)
    file("one.mp4", 100), file("two.mp4", 150)
    return whole, without


def test_control_generated_videos_and_truth_stand_in_order(scenes, tmp_path):
    sources = [Source(name, {scene.name: [tmp_path / f"{name}.mp4"] for scene in scenes}) for name in ("one", "two")]
    tracemalloc.start()
    names, files = write_side_by_side(sources, scenes, FORM, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == ["control", "one", "two", "truth"]
    for name, greys in (("whole", (50, 100, 150, 200)), ("without", (60, 100, 150, 0))):
        frames = read_window(files[name], 0.0, 9, 8.0, 64, 4 * 96).float()
        found = frames.unflatten(-1, (4, 96)).mean((1, 2, 4))  # (F, 4)
        expected = [[grey + frame * (grey > 0) for grey in greys] for frame in range(9)]
        np.testing.assert_allclose(found, expected, atol=3)
    assert peak < 4 * 9 * 64 * 4 * 96 * 3  # bytes of the frames, of which floats would take four each


def test_files_of_an_earlier_evaluation_are_replaced_or_removed_and_no_others(scenes, tmp_path):
    outside, clips = tmp_path / "elsewhere.mp4", tmp_path / "out/clips"
    for path in (outside, *(clips / f"{name}.mp4" for name in ("whole", "gone", "street/gone", "mine"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    (clips / "linked").symlink_to(tmp_path)
    with pytest.raises(
        InputError, match=r"out: clips/whole\.mp4 is there, but no results\.json names it, .*; move it"
    ):
        require_own_files(tmp_path / "out", scenes, {"gone"})
    earlier = {"whole", "gone", "street/gone", "linked/elsewhere", "../../elsewhere", "removed"}
    require_own_files(tmp_path / "out", scenes, earlier)
    remove_earlier_files(tmp_path / "out", scenes, earlier)
    assert {path.stem for path in clips.rglob("*.mp4")} == {"whole", "mine"}
    assert outside.exists()


def test_passes_of_the_renderer_are_shown_beside_the_truth(scenes, tmp_path):
    ids, depth = np.zeros((64, 96), np.uint16), np.full((64, 96), 60_000, np.uint16)
    ids[:, 32:64], ids[:, 64:] = 1, 2
    depth[:, 32:64], depth[:, 64:] = 1000, 30_000
    files = {}
    for kind, values in (("ids", ids), ("depth", depth)):
        (tmp_path / kind).mkdir()
        for number in range(9):
            Image.fromarray(values).save(tmp_path / kind / f"p_{number:04d}.png")
        files[kind] = DatasetFile(str(tmp_path), f"{kind}/p_%04d.png@8", 0, 0)
    scenes = replace(scenes[0], **files), scenes[1]
    sources = [Source("one", {scene.name: [tmp_path / "one.mp4"] for scene in scenes})]
    names, videos = write_side_by_side(sources, scenes, FORM, tmp_path)
    assert names == ["control", "one", "truth", "ids", "depth"]
    frames = read_window(videos["whole"], 0.0, 9, 8.0, 64, 5 * 96).float().unflatten(-1, (5, 3, 32))
    shown = frames[..., 4:-4].mean((0, 2, 5))  # (colour, column, third of its width)
    assert shown[:, 3, 0].max() < 5  # the background
    assert (shown[:, 3, 1] - shown[:, 3, 2]).abs().max() > 30
    np.testing.assert_allclose(shown[:, 4], [[55, 255, 158]] * 3, atol=6)
    assert read_window(videos["without"], 0.0, 9, 8.0, 64, 5 * 96)[..., 3 * 96 + 4 :].max() < 8


def test_ids_have_colours_apart_and_the_background_is_black():
    ids = np.array([0, 1, 2, 3, 256, 1 << 16, 0xFF, 0xFF00, 0xFF0000, 0x800000])  # also those that are colours
    colours = colours_of(ids.reshape(1, 1, -1))[0, 0].astype(int)
    assert colours.shape == (10, 3)
    assert colours[0].max() == 0
    apart = np.abs(colours[:, None] - colours).max(-1) + 255 * np.eye(10, dtype=int)
    assert apart.min() >= 30


def test_depth_without_a_surface_is_black():
    greys = greys_of(np.array([[[1.0, 3.0, np.inf]]], np.float32))
    assert greys[0, 0, :, 0].tolist() == [255, 55, 0]
    assert greys_of(np.full((1, 1, 2), np.inf)).max() == 0
