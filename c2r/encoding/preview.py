"""A preview of the cache: contact sheets of clips decoded from it, beside their videos and controls."""

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
from c2r.models.vae import decode_frames

CLIPS_PER_BUCKET = 6

#: dB below which a decoded clip is marked. Measured on 15 real clips of the toy: 23.5 to 35.6 for right clips, at most
#: 14.9 for wrong ones. A shift by 16 pixels (13.8 to 22.3) or swapped red and blue (11.8 to 33.4) may escape it: look
#: at the sheets.
LOW_PSNR = 20.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 arrays, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / np.maximum(error, 1e-10)))


def choose_clips(clips: Clips) -> dict[Bucket, Clips]:
    """Choose up to CLIPS_PER_BUCKET clips of each bucket that has any, spread over the dataset."""
    chosen = {}
    for bucket in clips.buckets:
        of_bucket = clips.of_bucket(bucket)
        if len(of_bucket):
            positions = np.linspace(0, len(of_bucket) - 1, CLIPS_PER_BUCKET).round().astype(int)
            chosen[bucket] = of_bucket[np.unique(positions)]
    return chosen


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
        a line for each clip, with a mark if its PSNR is low, and one for each file.
    """
    lines = []
    vae = load_pipeline_part(settings.base_model, "vae", torch.float32).to(device)
    for bucket, clips in chosen.items():
        columns, captions = _contact_sheet(clips, settings, vae)
        path = Path(folder) / f"preview-{clips[0].domain}-{bucket}.png"
        write_atomic(path, image_bytes(draw_contact_sheet(columns, captions)))
        lines += [f"preview: {line}" for line in (*captions, path)]
    return lines


def _contact_sheet(clips, settings, vae):
    """Return the columns {title: list of (F, H, W, 3) uint8} and the captions of one contact sheet."""
    dataset = ClipDataset(clips, settings)
    columns, captions = {"video": [], "from the cache": [], "control": []}, []
    for index, clip in enumerate(clips):
        video = _channels_last(dataset.target_frames(index))
        decoded = decode_frames(vae, dataset[index]["latents_mean"])
        has_coarse = clip.coarse_file is not None
        control = _channels_last(dataset.coarse_frames(index)) if has_coarse else np.full_like(video, 255)
        columns["video"].append(video)
        columns["from the cache"].append(decoded)
        columns["control"].append(control)
        quality = psnr(decoded, video)
        mark = f"  LOW: below {LOW_PSNR:g} dB" if quality < LOW_PSNR else ""
        captions.append(
            f"{clip.name} #{clip.window}, {clip.domain}, {clip.bucket}, {quality:.1f} dB{mark}: {clip.text}"
        )
    if all(clip.coarse_file is None for clip in clips):
        del columns["control"]
    return columns, captions


def _channels_last(frames):
    return rearrange(frames, "f c h w -> f h w c").numpy()
