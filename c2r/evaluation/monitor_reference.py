"""The reference of the CG monitor: clips of the run's own datasets, decoded from their cached latents."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange

from c2r.bars import progress_bar
from c2r.data.buckets import Bucket
from c2r.data.clips import Clip, Clips
from c2r.data.manifest import clips_fingerprint
from c2r.data.settings import ClipSettings
from c2r.encoding.cache import CacheSettings
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.monitor import MIN_FILES, CGLook, CGMonitor, Reference, clip_features
from c2r.evaluation.samples import Sample, SampleRows
from c2r.files import digest
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.vae import decode_frames
from c2r.pipeline import C2RPipeline
from c2r.training.failing_together import failing_together

logger = logging.getLogger(__name__)

#: Largest number of clips of a domain in a reference.
CLIPS_PER_DOMAIN = 32

#: Part of the name of a kept reference: increase it whenever the measures change.
VERSION = 2


def choose_reference_clips(real_clips: Clips, cg_clips: Clips, bucket: Bucket | None) -> dict[str, list[Clip]]:
    """Choose the clips that represent each domain, from as many files as possible.

    Args:
        real_clips, cg_clips: the clips to choose from.
        bucket: the samples' bucket, since clips are compared at one size only.

    Returns:
        {"real", "cg": list of clips}.
    """
    domains = {"real": real_clips, "cg": cg_clips}
    return {domain: list(clips.of_bucket(bucket).first_windows(CLIPS_PER_DOMAIN)) for domain, clips in domains.items()}


def can_monitor(reference_clips: dict[str, list[Clip]]) -> bool:
    """Return True if both domains have enough files to find out how the domains differ."""
    return all(count_files(clips) >= MIN_FILES for clips in reference_clips.values())


def count_files(clips: list[Clip]) -> int:
    """Return the number of files that clips are of."""
    return len({clip.target_file.path for clip in clips})


@torch.no_grad()
def measure_frames(
    frames: np.ndarray | torch.Tensor, dinov3: DINOv3FeatureExtractor, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the `clip_features` of (F, H, W, 3) uint8 frames."""
    frames = rearrange(torch.as_tensor(frames), "f h w c -> f c h w").to(device).float() / 255
    return clip_features(frames, dinov3(frames[None])[0])


def reference_of(
    reference_clips: dict[str, list[Clip]],
    pipeline: C2RPipeline,
    dinov3_sha256: str,
    settings: ClipSettings,
    accelerator: Accelerator,
    cache_dir: str | Path,
    beat: Callable[[str], None],
) -> Reference:
    """Read the reference of these clips from the cache, or measure the clips. Call it on every process.

    Args:
        reference_clips: from `choose_reference_clips`; they must be in the cache.
        pipeline: from `sampling_pipeline`.
        dinov3_sha256: fingerprint of the pipeline's DINOv3.
        settings: the settings that the clips are cut and encoded with.
        accelerator: each process measures its share.
        cache_dir: the cache folder in which the reference is kept.
        beat: called before each clip with a description of the work.

    Raises:
        InputError: the reference cannot be written.
    """
    # Folders, since files of one name in two folders are different files.
    files = {domain: [clip.target_file.path for clip in clips] for domain, clips in reference_clips.items()}
    name = [VERSION, dinov3_sha256, str(pipeline.dinov3.model.dtype), files]
    name += [clips_fingerprint(clips) for clips in reference_clips.values()]
    name += vars(CacheSettings.of(settings)).values()
    path = Path(cache_dir) / "monitor" / f"{digest(name)}.safetensors"
    if all(gather_object([path.exists()])):
        return Reference.load(path)

    tasks = [(domain, i) for domain, clips in reference_clips.items() for i in range(len(clips))]
    logger.info("CG monitor: measuring %d clips to compare the samples with, once for these datasets", len(tasks))
    datasets = {domain: ClipDataset(clips, settings) for domain, clips in reference_clips.items()}
    measured = []  # (domain, position, file, features)
    mine = tasks[accelerator.process_index :: accelerator.num_processes]
    with progress_bar(len(mine), "CG monitor", "clip", accelerator.process_index == 0) as bar:
        for domain, i in mine:
            beat("measuring the clips that the CG monitor compares with")
            file = files[domain][i]
            frames = decode_frames(pipeline.vae, datasets[domain][i]["latents_mean"])
            measured.append((domain, i, file, measure_frames(frames, pipeline.dinov3, accelerator.device)))
            if domain == "cg":
                coarse = rearrange(datasets[domain].control_frames(i), "f c h w -> f h w c")
                measured.append(("coarse", i, file, measure_frames(coarse, pipeline.dinov3, accelerator.device)))
            bar.update()
    if accelerator.num_processes > 1:
        measured = gather_object(measured)
    measured.sort(key=lambda entry: entry[:2])  # one order for any number of processes
    reference = Reference.from_clips(
        **{
            d: [(file, features) for domain, _, file, features in measured if domain == d]
            for d in ("real", "cg", "coarse")
        }
    )
    with failing_together(accelerator, path):
        if accelerator.is_main_process:
            reference.save(path)
    return reference


def judge_samples(
    rows: SampleRows,
    samples: list[Sample],
    monitor: CGMonitor,
    dinov3: DINOv3FeatureExtractor,
    accelerator: Accelerator,
) -> CGLook:
    """Judge the sample videos that all processes made with control. Call it on every process.

    Args:
        rows: the rows that `make_samples` returned on this process.
        samples: all samples, those of other processes included.
        monitor: judges the samples.
        dinov3: the DINOv3 of the monitor's reference.
        accelerator: the run's.

    Returns:
        the same on every process.
    """
    measured = [(n, measure_frames(row["with control"], dinov3, accelerator.device)) for n, row in rows.items()]
    if accelerator.num_processes > 1:
        measured = gather_object(measured)
    features = [features for _, features in sorted(measured, key=lambda entry: entry[0])]
    return monitor.judge(features, files=[sample.scene.target_file.path for sample in samples])
