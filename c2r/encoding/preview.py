"""A preview of the cache: contact sheets of clips decoded from it, beside their videos and controls."""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from c2r.data.buckets import Bucket
from c2r.data.clips import Clips
from c2r.data.contact_sheet import draw_contact_sheet, image_bytes
from c2r.data.settings import ClipSettings
from c2r.encoding.dataset import ClipDataset
from c2r.files import write_atomic
from c2r.models.parts import load_pipeline_part
from c2r.models.vae import decode_frames, encode_frames

#: dB by which a decoded clip may be worse than what the VAE makes of its video at once. The cached log-variance and a
#: batch of another size change the last bits alone; another clip, a shift or swapped colours cost more.
TOLERATED_LOSS = 1.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 arrays, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / np.maximum(error, 1e-10)))


def choose_clips(clips: Clips, count: int, pattern: str | None = None) -> dict[Bucket, Clips]:
    """Choose clips of each bucket that has any, of as many files as possible.

    Args:
        clips: all clips.
        count: largest number of clips of a bucket.
        pattern: of the names of the files, such as `berlin_*`; None: all files.
    """
    if pattern is not None:
        clips = clips[np.array([fnmatch(clip.name, pattern) for clip in clips], bool)]
    of_buckets = {bucket: clips.of_bucket(bucket).first_windows(count) for bucket in clips.buckets}
    return {bucket: chosen for bucket, chosen in of_buckets.items() if len(chosen)}


def write_preview(
    chosen: dict[Bucket, Clips], folder: str | Path, settings: ClipSettings, device: torch.device
) -> list[str]:
    """Write a contact sheet of each bucket.

    Args:
        chosen: see `choose_clips`; encoded.
        folder: PNG files are written into it.
        settings: the settings that the clips were encoded with.
        device: device to decode on.

    Returns:
        a line for each clip, with a mark if its PSNR is below what the VAE reaches, and one for each file.
    """
    lines = []
    vae = load_pipeline_part(settings.base_model, "vae", torch.float32).to(device)
    for bucket, clips in chosen.items():
        columns, captions = _contact_sheet(clips, settings, vae)
        path = Path(folder) / f"preview-{clips[0].domain}-{bucket}.png"
        write_atomic(path, image_bytes(draw_contact_sheet(columns, captions)))
        lines += [f"preview: {line}" for line in (*captions, path)]
    return lines


@torch.no_grad()
def _contact_sheet(clips, settings, vae):
    """Return the columns {title: list of (F, H, W, 3) uint8} and the captions of one contact sheet."""
    dataset = ClipDataset(clips, settings)
    columns, captions = {"video": [], "from the cache": [], "control": []}, []
    for index, clip in enumerate(clips):
        video = _channels_last(dataset.target_frames(index))
        decoded = decode_frames(vae, dataset[index]["latents_mean"])
        best = decode_frames(vae, encode_frames(vae, dataset.target_frames(index)[None].to(vae.device))[0][0])
        has_coarse = clip.coarse_file is not None
        control = _channels_last(dataset.coarse_frames(index)) if has_coarse else np.full_like(video, 255)
        columns["video"].append(video)
        columns["from the cache"].append(decoded)
        columns["control"].append(control)
        quality, level = psnr(decoded, video), psnr(best, video)
        mark = f"  LOW: this VAE reaches {level:.1f} dB" if quality < level - TOLERATED_LOSS else ""
        captions.append(
            f"{clip.name} #{clip.window}, {clip.domain}, {clip.bucket}, {quality:.1f} dB{mark}: {clip.text}"
        )
    if all(clip.coarse_file is None for clip in clips):
        del columns["control"]
    return columns, captions


def _channels_last(frames):
    return rearrange(frames, "f c h w -> f h w c").numpy()
