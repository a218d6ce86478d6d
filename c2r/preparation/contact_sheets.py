"""Contact sheets of a dataset's clips, for people who check what a command has found."""

from pathlib import Path

import numpy as np
from einops import rearrange

from c2r.data.buckets import Bucket
from c2r.data.clips import Clip, Clips, DatasetFile
from c2r.data.contact_sheet import draw_contact_sheet, image_bytes
from c2r.data.failures import Failure, Window
from c2r.data.video import read_window
from c2r.data.video_info import UnusableVideo
from c2r.files import write_atomic

CLIPS_PER_SHEET = 16
#: Pixels of the longer side of a frame.
LONGER_SIDE = 240
MAX_CAPTION = 110


def write_contact_sheets(clips: Clips, fps: float, folder: Path) -> tuple[list[Path], list[Failure]]:
    """Write a picture for each bucket, with the first, middle and last frame of up to CLIPS_PER_SHEET clips.

    Args:
        clips: of one dataset on this machine.
        fps: frame rate of the clips.
        folder: PNG files are written into it.

    Returns:
        the pictures, and the clips that cannot be decoded, which are left out.
    """
    paths, failures = [], []
    for bucket in clips.buckets:
        of_bucket = clips.of_bucket(bucket)
        if not len(of_bucket):
            continue
        places = np.linspace(0, len(of_bucket) - 1, CLIPS_PER_SHEET).round().astype(int)
        columns: dict[str, list[np.ndarray]] = {"video": [], "control": []}
        captions = []
        for clip in of_bucket[np.unique(places)]:
            files = [file for file in (clip.target_file, clip.coarse_file) if file]
            try:
                rows = [_frames(file, clip, bucket, fps) for file in files]
            except UnusableVideo as error:
                window = Window(clip.start, bucket.num_frames, fps) if error.of_window else None
                failures += [
                    Failure(file, error.reason, str(error), window=window) for file in files if file.path in str(error)
                ]
                continue
            columns["video"].append(rows[0])
            columns["control"].append(rows[1] if len(rows) == 2 else np.full_like(rows[0], 255))
            captions.append(f"{clip.name} at {clip.start:.2f} s: {clip.text}"[:MAX_CAPTION])
        if all(clip.coarse_file is None for clip in of_bucket):
            del columns["control"]
        if captions:
            paths.append(folder / f"clips-{bucket}.png")
            write_atomic(paths[-1], image_bytes(draw_contact_sheet(columns, captions)))
    return paths, failures


def _frames(file: DatasetFile, clip: Clip, bucket: Bucket, fps: float) -> np.ndarray:
    """Return three frames (F, H, W, 3) uint8 of a clip, or its only one."""
    scale = LONGER_SIDE / max(bucket.height, bucket.width)
    height, width = round(bucket.height * scale), round(bucket.width * scale)
    count = min(3, bucket.num_frames)
    rate = fps * (count - 1) / (bucket.num_frames - 1) if count > 1 else fps
    return rearrange(read_window(file.path, clip.start, count, rate, height, width), "f c h w -> f h w c").numpy()
