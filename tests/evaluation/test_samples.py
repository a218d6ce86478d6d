"""Sample videos: what is written, and that training does not notice."""

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from c2r.data.buckets import Bucket
from c2r.data.video import read_window
from c2r.evaluation.samples import choose_samples
from tests.helpers.clips import clip, clips_of
from tests.helpers.commands import phase2, same, succeed, weights
from tests.helpers.forks import fork
from tests.helpers.sample_videos import difference, row_of


def test_scenes_come_from_many_files_and_captions_from_real_clips():
    scenes = clips_of(clip("a", 0, "cg"), clip("a", 1, "cg"), clip("b", 0, "cg"))
    captions = clips_of(clip("x", 1), clip("y", 0), clip("z", 0))
    samples = choose_samples(scenes, captions, 2)
    assert [(s.scene.name, s.scene.window, s.caption.name) for s in samples] == [("a", 0, "y"), ("b", 0, "z")]
    assert len(choose_samples(scenes, captions[:1], 4)) == 3
    assert all(s.caption is s.scene for s in choose_samples(scenes, None, 3))
    assert choose_samples(scenes[:0], None, 3) == []


def test_scenes_are_of_the_bucket_of_most_clips():
    tall = Bucket(5, 48, 32)
    scenes = clips_of(clip("a", 0, "cg"), clip("b", 0, "cg", bucket=tall), clip("c", 0, "cg", bucket=tall))
    assert [s.scene.name for s in choose_samples(scenes, None, 3)] == ["b", "c"]


@pytest.fixture(scope="module")
def sampled(first, tiny_models, small_datasets, tmp_path_factory):
    """Phase 2 of four steps that samples at 2 and 4."""
    out = tmp_path_factory.mktemp("samples") / "run"
    options = ["--max_train_steps=4", "--sample_steps=2"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", out, *options), by=fork)
    return out


def test_a_row_for_each_sample_at_each_sampling(sampled, small_datasets):
    folders = sorted(path.name for path in (sampled / "samples").glob("step-*"))
    assert folders == ["step-2", "step-4"]
    assert {path.name for path in (sampled / "samples/step-4").iterdir()} == {"0.mp4", "1.mp4", "sheet.png"}
    control, output, alone, truth = row_of(sampled / "samples/step-4/0.mp4")
    earlier = row_of(sampled / "samples/step-2/0.mp4")
    # The backbone's own is made once; H.264 lets the columns' neighbours through.
    assert difference(alone, earlier[2]) < difference(output, earlier[1])
    assert difference(alone, earlier[2]) < difference(output, alone)
    for name, column in (("c", control), ("f", truth)):
        videos = [read_window(small_datasets / f"cg/{name}{i}.mp4", 0.0, 5, 8, 32, 48) for i in range(3)]
        nearest, *others = sorted(difference(video, column) for video in videos)
        assert nearest < 10 < min(others)  # the colours of sharp blocks suffer in H.264


def test_samples_are_in_tensorboard(sampled):
    events = EventAccumulator(str(sampled / "logs"), size_guidance={"images": 0}).Reload()
    sheets = events.Images("samples/sheet")
    assert [event.step for event in sheets] == [2, 4]
    with Image.open(sampled / "samples/step-4/sheet.png") as sheet:
        assert sheet.size == (sheets[-1].width, sheets[-1].height)
    moving = events.Images("samples/0")[-1]
    assert moving.encoded_image_string.startswith(b"GIF89a")


def test_training_does_not_notice(sampled, first, tiny_models, small_datasets, tmp_path):
    options = ["--max_train_steps=4", "--num_samples=0"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options), by=fork)
    assert not (tmp_path / "samples").exists()
    assert same(weights(tmp_path / "final"), weights(sampled / "final"))


def test_a_dataset_of_scenes(first, tiny_models, small_datasets, tmp_path):
    options = ["--max_train_steps=1", f"--sample_dataset={small_datasets / 'cg'}", "--num_samples=3"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options), by=fork)
    assert {path.stem for path in (tmp_path / "samples/step-1").glob("*.mp4")} == {"0", "1", "2"}
