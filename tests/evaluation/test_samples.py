"""Sample videos: what is chosen and written, and that training does not depend on them."""

import logging
from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from c2r.data.buckets import Bucket
from c2r.data.video import read_window
from c2r.evaluation.sample_plan import plan_samples
from c2r.evaluation.samples import choose_samples
from tests.helpers.clips import clip, clips_of
from tests.helpers.commands import phase2, same, succeed, weights
from tests.helpers.forks import fork
from tests.helpers.sample_videos import difference, row_of

TALL = Bucket(5, 48, 32)


def test_scenes_come_from_many_files_and_captions_from_real_clips():
    scenes = clips_of(clip("a", 0, "cg"), clip("a", 1, "cg"), clip("b", 0, "cg"))
    captions = clips_of(clip("x", 1), clip("y", 0), clip("z", 0))
    samples = choose_samples(scenes, captions, 2)
    assert [(s.scene.name, s.scene.window, s.caption.name) for s in samples] == [("a", 0, "y"), ("b", 0, "z")]
    assert len(choose_samples(scenes, captions[:1], 4)) == 3
    assert all(s.caption is s.scene for s in choose_samples(scenes, None, 3))
    assert choose_samples(scenes[:0], None, 3) == []


def test_scenes_are_of_the_bucket_of_most_clips():
    scenes = clips_of(clip("a", 0, "cg"), clip("b", 0, "cg", bucket=TALL), clip("c", 0, "cg", bucket=TALL))
    assert [s.scene.name for s in choose_samples(scenes, None, 3)] == ["b", "c"]


def mixture(*names, domain="real", bucket=TALL):
    """A mixture of one clip per name; the first one is held out."""
    clips = clips_of(*(clip(name, domain=domain, bucket=bucket) for name in names))
    return SimpleNamespace(clips=clips, held_out=clips[:1], train=clips[1:])


def plan(real, cg=None, scenes=None, **options):
    train_cg = real.train[:0] if cg is None else cg.train
    return plan_samples(real, cg, scenes, real.train, train_cg, **{"count": 2} | options)


def test_a_plan_takes_held_out_clips_and_compares_with_clips_to_train_on():
    real, cg = (mixture(*(f"{d[0]}{i}" for i in range(9)), domain=d) for d in ("real", "cg"))
    planned = plan(real, cg)
    assert [(s.scene.name, s.caption.name) for s in planned.samples] == [("c0", "r0")]
    assert [c.name for c in planned.to_encode] == ["c0", "r0"]
    assert {sample.scene.bucket for sample in planned.samples} == {TALL}
    assert planned.monitored
    assert {d: [c.name for c in clips] for d, clips in planned.reference_clips.items()} == {
        "real": [f"r{i}" for i in range(1, 9)],
        "cg": [f"c{i}" for i in range(1, 9)],
    }
    scenes = mixture("s0", "s1", domain="cg")
    assert [s.scene.name for s in plan(real, cg, scenes).samples] == ["s0", "s1"]
    assert [(s.scene.name, s.caption.name) for s in plan(real).samples] == [("r0", "r0")]


def test_a_plan_without_enough_files_turns_the_monitor_off(caplog):
    caplog.set_level(logging.INFO)
    real, cg = mixture(*"rstuvwxyz"), mixture("c0", "c1", "c2", domain="cg")
    assert not plan(real, cg, quiet=True).monitored
    assert not plan(real, cg, count=0).monitored
    assert plan(real, cg, count=0).samples == []
    assert not plan(real).monitored
    assert not caplog.messages
    assert not plan(real, cg).monitored
    assert caplog.messages == [
        "CG monitor: off, so this run measures no CG look and never lowers --cg_ratio; it compares with training "
        "videos of the samples' size 5x48x32 and needs 8 real and 8 CG ones, but there are 8 and 2; add videos"
    ]


def test_a_plan_with_samples_of_too_few_videos_says_that_the_monitor_only_reports(caplog):
    caplog.set_level(logging.INFO)
    real, cg = (mixture(*(f"{d[0]}{i}" for i in range(9)), domain=d) for d in ("real", "cg"))
    scenes = mixture("s0", "s1", "s2", "s3", domain="cg")
    said = (
        "CG monitor: only reports, so this run gives no advice and never lowers --cg_ratio; its samples are of {} of "
        "the 4 videos that it needs; {}"
    )
    assert plan(real, cg, scenes, count=3).monitored
    assert plan(real, cg, count=4).monitored
    assert plan(real, cg, scenes, count=4).monitored
    assert caplog.messages == [
        said.format(3, "give --num_samples 4 or more"),
        said.format(1, "hold out more CG videos (in a folder validation/) or give --sample_dataset"),
    ]


@pytest.fixture(scope="module")
def sampled(first, tiny_models, small_datasets, tmp_path_factory):
    """A phase 2 of four steps that samples at steps 2 and 4."""
    out = tmp_path_factory.mktemp("samples") / "run"
    options = ["--max_train_steps=4", "--sample_steps=2"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", out, *options), by=fork)
    return out


def test_each_sampling_writes_a_row_per_sample(sampled, small_datasets):
    folders = sorted(path.name for path in (sampled / "samples").glob("step-*"))
    assert folders == ["step-2", "step-4"]
    assert {path.name for path in (sampled / "samples/step-4").iterdir()} == {"0.mp4", "1.mp4", "sheet.png"}
    control, output, without_control, truth = row_of(sampled / "samples/step-4/0.mp4")
    earlier = row_of(sampled / "samples/step-2/0.mp4")
    # The output without control is made once. It differs a little because H.264 mixes neighbouring columns.
    assert difference(without_control, earlier[2]) < difference(output, earlier[1])
    assert difference(without_control, earlier[2]) < difference(output, without_control)
    for name, column in (("c", control), ("f", truth)):
        videos = [read_window(small_datasets / f"cg/{name}{i}.mp4", 0.0, 5, 8, 32, 48) for i in range(3)]
        nearest, *others = sorted(difference(video, column) for video in videos)
        assert nearest < 10 < min(others)  # H.264 changes the colours of sharp blocks


def test_samples_are_in_tensorboard(sampled):
    events = EventAccumulator(str(sampled / "logs"), size_guidance={"images": 0}).Reload()
    sheets = events.Images("samples/sheet")
    assert [event.step for event in sheets] == [2, 4]
    with Image.open(sampled / "samples/step-4/sheet.png") as sheet:
        assert sheet.size == (sheets[-1].width, sheets[-1].height)
    moving = events.Images("samples/0")[-1]
    assert moving.encoded_image_string.startswith(b"GIF89a")


def test_training_does_not_depend_on_sampling(sampled, first, tiny_models, small_datasets, tmp_path):
    options = ["--max_train_steps=4", "--num_samples=0"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options), by=fork)
    assert not (tmp_path / "samples").exists()
    assert same(weights(tmp_path / "final"), weights(sampled / "final"))


def test_scenes_can_come_from_a_sample_dataset(first, tiny_models, small_datasets, tmp_path):
    options = ["--max_train_steps=1", f"--sample_dataset={small_datasets / 'cg'}", "--num_samples=3"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", tmp_path, *options), by=fork)
    assert {path.stem for path in (tmp_path / "samples/step-1").glob("*.mp4")} == {"0", "1", "2"}
