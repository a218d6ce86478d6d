"""Write frames to mp4 files (PyAV)."""

import uuid
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace

from c2r.data.colour import INTERPOLATION
from c2r.data.video_info import to_fraction
from c2r.files import digest


def write_video(path: str | Path, frames: torch.Tensor | np.ndarray, fps: float) -> None:
    """Write an mp4 that any player shows (H.264, yuv420p, BT.709 with colour tags).

    A killed process leaves no incomplete file of this name.

    Args:
        path: the .mp4 to write; its folder is made.
        frames: (F, H, W, 3) RGB, uint8 in [0, 255] or floats in [0, 1]; H and W even.
        fps: frames per second.

    Raises:
        ValueError: the frames have another shape or dtype, or floats are not in [0, 1].
    """
    frames = np.asarray(frames)
    if np.issubdtype(frames.dtype, np.floating):
        if not (np.all(frames >= 0) and np.all(frames <= 1)):  # NaN is neither
            raise ValueError("frames of floats must be in [0, 1]")
        frames = (frames * 255).round().astype(np.uint8)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"yuv420p needs an even height and width, not {height}x{width}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    key = digest(path.name)[:16]
    for leftover in path.parent.glob(f".{key}.*.partial.mp4"):
        leftover.unlink()  # of a killed process
    # A name that nobody can have prepared as a link to another file.
    partial = path.with_name(f".{key}.{uuid.uuid4().hex}.partial.mp4")
    try:
        with av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
            # x264's mbtree reads beyond the ends of small pictures: the same frames would give other files each time.
            options = {"crf": "16", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=to_fraction(fps), options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            # 1 is BT.709 in all three: AVCOL_SPC_BT709, AVCOL_PRI_BT709, AVCOL_TRC_BT709.
            stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
            stream.codec_context.color_range = ColorRange.MPEG
            for rgb in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=INTERPOLATION,
                    threads=1,
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
