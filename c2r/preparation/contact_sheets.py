"""Contact sheets of a dataset's clips, for people who check what a command has found."""

from pathlib import Path

import numpy as np
from einops import rearrange

from c2r.data.buckets import Bucket
from c2r.data.clips import Clip, Clips, DatasetFile
from c2r.data.contact_sheet import draw_contact_sheet, image_bytes
from c2r.data.video import read_window
from c2r.files import write_atomic

CLIPS_PER_SHEET = 16
#: Pixels of the longer side of a frame.
LONGER_SIDE = 240
MAX_CAPTION = 110


def write_contact_sheets(clips: Clips, fps: float, folder: Path) -> list[Path]:
    """Write a picture for each bucket, with the first, middle and last frame of up to CLIPS_PER_SHEET clips.

    Args:
        clips: of one dataset on this machine.
        fps: frame rate of the clips.
        folder: PNG files are written into it.

    Returns:
        the files.
    """
    paths = []
    for bucket in clips.buckets:
        of_bucket = clips.of_bucket(bucket)
        if not len(of_bucket):
            continue
        places = np.linspace(0, len(of_bucket) - 1, CLIPS_PER_SHEET).round().astype(int)
        shown = list(of_bucket[np.unique(places)])
        columns = {"video": [_frames(clip.target_file, clip, bucket, fps) for clip in shown]}
        if all(clip.coarse_file for clip in shown):
            columns["control"] = [_frames(clip.coarse_file, clip, bucket, fps) for clip in shown]
        captions = [f"{clip.name} at {clip.start:.2f} s: {clip.text}"[:MAX_CAPTION] for clip in shown]
        path = folder / f"clips-{bucket}.png"
        write_atomic(path, image_bytes(draw_contact_sheet(columns, captions)))
        paths.append(path)
    return paths


def _frames(file: DatasetFile, clip: Clip, bucket: Bucket, fps: float) -> np.ndarray:
    """Return three frames (F, H, W, 3) uint8 of a clip, or its only one."""
    scale = LONGER_SIDE / max(bucket.height, bucket.width)
    height, width = round(bucket.height * scale), round(bucket.width * scale)
    count = min(3, bucket.num_frames)
    rate = fps * (count - 1) / (bucket.num_frames - 1) if count > 1 else fps
    return rearrange(read_window(file.path, clip.start, count, rate, height, width), "f c h w -> f h w c").numpy()
