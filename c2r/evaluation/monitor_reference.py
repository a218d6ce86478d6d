"""What the CG monitor compares samples with: clips of the run's own datasets as the VAE gives them back."""

from pathlib import Path

import torch
from accelerate.utils import gather_object

from c2r.data.manifest import clips_fingerprint
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.monitor import MIN_FILES, Reference, clip_features
from c2r.files import digest
from c2r.models.vae import decode_frames
from c2r.training.engine import failing_together

CLIPS_PER_DOMAIN = 32

# Raise it when the measures change: what older ones have measured is then made anew.
VERSION = 1


def choose_reference_clips(real_clips, cg_clips, bucket):
    """The clips that stand for each domain, from as many files as possible: {"real", "cg": list of `Clip`}.

    Args:
        real_clips, cg_clips: `Clips`.
        bucket: of the samples, so that like is compared with like.
    """
    both = {"real": real_clips, "cg": cg_clips}
    return {d: list(clips.of_bucket(bucket).first_windows(CLIPS_PER_DOMAIN)) for d, clips in both.items()}


def can_monitor(clips):
    """Whether there is enough to tell the domains apart by."""
    return all(len({clip.name for clip in group}) >= MIN_FILES for group in clips.values())


@torch.no_grad()
def measure_frames(frames, dinov3, device):
    """`clip_features` of a clip.

    Args:
        frames: (F, H, W, 3) uint8, array or tensor.
        dinov3: `DINOv3FeatureExtractor`.
        device: to work on.
    """
    frames = torch.as_tensor(frames).permute(0, 3, 1, 2).to(device).float() / 255  # (F, 3, H, W)
    return clip_features(frames, dinov3(frames[None])[0])


def reference_of(clips, pipeline, dinov3_sha256, args, accelerator, cache_dir, beat):
    """The reference of these clips, from the cache or measured now. Call it on every process.

    Args:
        clips: of `choose_reference_clips`, encoded.
        pipeline: of `sampling_pipeline`.
        dinov3_sha256: fingerprint of its DINOv3.
        args: the clips' shape and encoders.
        accelerator: each process measures its share.
        cache_dir: where it is kept.
        beat: called before each clip with what is done.

    Raises:
        InputError: no room or no right to write.
    """
    datasets = {domain: ClipDataset(group, args) for domain, group in clips.items()}
    key = [VERSION, dinov3_sha256, *(clips_fingerprint(group) for group in clips.values())]
    path = Path(cache_dir) / "monitor" / f"{digest([*key, *vars(datasets['cg'].settings).values()])}.safetensors"
    if all(gather_object([path.exists()])):
        return Reference.load(path)
    accelerator.print("CG monitor: measuring the clips that samples are compared with, once for these datasets")
    tasks = [(domain, i) for domain, group in clips.items() for i in range(len(group))]
    measured = []
    for domain, i in tasks[accelerator.process_index :: accelerator.num_processes]:
        beat("measuring what the CG monitor compares with")
        file = clips[domain][i].name
        frames = decode_frames(pipeline.vae, datasets[domain][i]["latents_mean"])
        measured.append((domain, i, file, measure_frames(frames, pipeline.dinov3, accelerator.device)))
        if domain == "cg":
            coarse = datasets[domain].control_frames(i).permute(0, 2, 3, 1)
            measured.append(("coarse", i, file, measure_frames(coarse, pipeline.dinov3, accelerator.device)))
    if accelerator.num_processes > 1:
        measured = gather_object(measured)
    # In one order, however many processes there were.
    measured.sort(key=lambda entry: entry[:2])
    reference = Reference.from_clips(
        **{
            d: [(file, values) for domain, _, file, values in measured if domain == d]
            for d in ("real", "cg", "coarse")
        }
    )
    with failing_together(accelerator, path):
        if accelerator.is_main_process:
            reference.save(path)
    return reference


def judge_samples(rows, samples, monitor, dinov3, accelerator):
    """What the monitor says of the outputs with control. Call it on every process.

    Args:
        rows: of `make_samples`, this process's.
        samples: all `Sample`s.
        monitor: `CGMonitor`.
        dinov3: `DINOv3FeatureExtractor`.
        accelerator: the run's.

    Returns:
        `CGLook`, the same on every process.
    """
    measured = [(n, measure_frames(row["with control"], dinov3, accelerator.device)) for n, row in rows.items()]
    if accelerator.num_processes > 1:
        measured = gather_object(measured)
    measured = [values for _, values in sorted(measured, key=lambda entry: entry[0])]
    return monitor.judge(measured, files=[sample.scene.name for sample in samples])
