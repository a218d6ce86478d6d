"""The reference of the CG monitor, measured on clips of datasets: which clips are of one file, and what is kept."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from c2r.encoding.cache import encoder_fingerprint
from c2r.evaluation.monitor import MIN_FILES, CGMonitor
from c2r.evaluation.monitor_reference import count_files, judge_samples, reference_of
from c2r.evaluation.samples import Sample, sampling_pipeline
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.scoring.run_datasets import CGLooks, RunDatasets
from c2r.scoring.scenes import Scene
from tests.helpers.datasets import write_monitored_datasets
from tests.helpers.settings import clip_settings


@pytest.fixture(scope="module")
def measured(tiny_models, tmp_path_factory):
    """Two CG folders whose videos have the same names, and reference_of(dtype of DINOv3)."""
    folders = [write_monitored_datasets(tmp_path_factory.mktemp("data")) for _ in range(2)]
    accelerator, base_model = Accelerator(cpu=True), str(tiny_models / "pipeline")
    cg = [str(folder / "cg") for folder in folders]
    settings = clip_settings(base_model=base_model)
    datasets = RunDatasets.read([str(folders[0] / "real")], cg, 1, settings, accelerator)
    cache_dir = tmp_path_factory.mktemp("cache")

    def dinov3(dtype):
        return DINOv3FeatureExtractor.from_pretrained(tiny_models / "dinov3", dtype)

    def reference(dtype):
        with sampling_pipeline(base_model, 1.0, None, dinov3(dtype), accelerator.device) as pipeline:
            sha256 = encoder_fingerprint(tiny_models / "dinov3")
            clips = datasets.reference_clips
            return reference_of(clips, pipeline, sha256, settings, accelerator, cache_dir, lambda what: None)

    return SimpleNamespace(
        datasets=datasets,
        dinov3=dinov3(torch.float32),
        dinov3_path=str(tiny_models / "dinov3"),
        kept=lambda: len([*(cache_dir / "monitor").iterdir()]),
        reference=reference,
    )


@pytest.fixture(scope="module")
def same_names(measured):
    """Return a clip of each CG folder, whose files have the same name."""
    first, *others = measured.datasets.reference_clips["cg"]
    second = next(clip for clip in others if clip.name == first.name)
    assert first.folder != second.folder
    return first, second


def test_videos_of_one_name_in_two_folders_are_two_files(measured, same_names):
    clips = measured.datasets.reference_clips["cg"]
    assert count_files(clips) == len(clips) == 2 * MIN_FILES
    reference = measured.reference(torch.float32)
    assert sorted(reference.files["cg"]) == sorted({clip.target_file.path for clip in clips})
    assert reference.files["coarse"] == reference.files["cg"]


def test_samples_of_one_name_in_two_folders_are_two_scenes(measured, same_names):
    monitor = CGMonitor(measured.reference(torch.float32))
    accelerator, bucket = measured.datasets.accelerator, same_names[0].bucket
    frames = torch.randint(0, 256, (2, *bucket, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = {number: {"with control": video.numpy()} for number, video in enumerate(frames)}
    samples = [Sample(clip, clip) for clip in same_names]
    assert judge_samples(rows, samples, monitor, measured.dinov3, accelerator).look.count == 2

    scenes = [
        Scene(str(number), "a street", 0.0, clip.coarse_file, clip.target_file, None, None)
        for number, clip in enumerate(same_names)
    ]
    followed = {"model": {scene.name: scene for scene in scenes}}
    looks = CGLooks(measured.datasets, measured.dinov3_path, torch.float32, followed)
    for scene, video in zip(scenes, frames):
        looks("model", scene, video.permute(0, 3, 1, 2))
    assert looks.of_source("model").look.count == 2


def test_features_of_another_dtype_are_measured_again(measured):
    references = [measured.reference(dtype) for dtype in (torch.float32, torch.bfloat16)]
    exact, rounded = (reference.features["real"]["dinov3"] for reference in references)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.1, atol=0.1)
    assert torch.equal(measured.reference(torch.float32).features["real"]["dinov3"], exact)
    assert measured.kept() == 2
