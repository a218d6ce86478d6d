"""Videos of each scene side by side."""

import tracemalloc

import numpy as np
import pytest

from c2r.data.clips import DatasetFile
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.scoring.measuring import Source
from c2r.scoring.scenes import ClipFormat, Scene
from c2r.scoring.side_by_side import write_side_by_side

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
    names, files = write_side_by_side(sources, scenes, FORM, tmp_path / "clips")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == ["control", "one", "two", "truth"]
    for name, greys in (("whole", (50, 100, 150, 200)), ("without", (60, 100, 150, 0))):
        frames = read_window(files[name], 0.0, 9, 8.0, 64, 4 * 96).float()
        found = frames.unflatten(-1, (4, 96)).mean((1, 2, 4))  # (F, 4)
        expected = [[grey + frame * (grey > 0) for grey in greys] for frame in range(9)]
        np.testing.assert_allclose(found, expected, atol=3)
    assert peak < 4 * 9 * 64 * 4 * 96 * 3  # bytes of the frames, of which floats would take four each
