"""A look at what the model will see: clips as they come back from the cache, beside their source and their control."""

from pathlib import Path

import numpy as np
import torch

from c2r.data.contact_sheet import draw_contact_sheet, encoded
from c2r.encoding.dataset import ClipDataset
from c2r.files import write_atomic
from c2r.models.parts import load_pipeline_part
from c2r.models.vae import decode_frames

# Clips of each bucket, spread over the dataset.
CLIPS_PER_BUCKET = 6

#: dB. Measured on 15 real clips of the toy: 23.5 to 35.6 if right, at most 14.9 where another clip comes back.
#: Shifts by 16 pixels (13.8 to 22.3) or an exchange of red and blue (11.8 to 33.4) may pass: they are for the eye.
LOW_PSNR = 20.0


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def choose_clips(clips):
    """Up to CLIPS_PER_BUCKET clips of each bucket, spread over the dataset: {bucket: `Clips`}, none empty."""
    chosen = {}
    for bucket in clips.buckets:
        of_bucket = clips.of_bucket(bucket)
        if len(of_bucket):
            places = np.linspace(0, len(of_bucket) - 1, CLIPS_PER_BUCKET).round().astype(int)
            chosen[bucket] = of_bucket[np.unique(places)]
    return chosen


def write_preview(chosen, folder, options, device):
    """Write a contact sheet for each bucket.

    Args:
        chosen: of `choose_clips`, encoded.
        folder: where PNG files go.
        options: see `ClipDataset`.
        device: to decode on.

    Returns:
        a line for each clip, those with a low PSNR marked, and one for each file.
    """
    lines = []
    vae = load_pipeline_part(options.pretrained_model_name_or_path, "vae", torch.float32).to(device)
    for bucket, of_bucket in chosen.items():
        dataset, captions, columns = ClipDataset(of_bucket, options), [], {}
        for i, clip in enumerate(of_bucket):
            source = dataset.source_frames(i).permute(0, 2, 3, 1).numpy()  # (F, H, W, 3)
            row = {"source": source, "from the cache": decode_frames(vae, dataset[i]["latents_mean"])}
            if clip.coarse_source is not None:
                row["control"] = dataset.coarse_frames(i).permute(0, 2, 3, 1).numpy()
            quality = psnr(row["from the cache"], source)
            low = f"  LOW: below {LOW_PSNR:g} dB" if quality < LOW_PSNR else ""
            captions.append(f"{clip.name} #{clip.window}, {clip.domain}, {bucket}, {quality:.1f} dB{low}: {clip.text}")
            lines.append(f"preview: {captions[-1]}")
            for title in ("source", "from the cache", "control"):
                blank = np.full_like(source, 255)
                columns.setdefault(title, []).append(row.get(title, blank))
        if all(clip.coarse_source is None for clip in of_bucket):
            del columns["control"]
        path = Path(folder) / f"preview-{of_bucket[0].domain}-{bucket}.png"
        write_atomic(path, encoded(draw_contact_sheet(columns, captions)))
        lines.append(f"preview: {path}")
    return lines
