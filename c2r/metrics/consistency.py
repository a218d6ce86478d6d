"""Consistency of a generated video over time: warped error. No network."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from c2r.data.images import luminance
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against
from c2r.metrics.structure import to_bytes


@dataclass(frozen=True)
class WarpError:
    """Difference of each frame from the next one, warped back by optical flow; `warp_error`."""

    name: str = "warp_error"
    higher_is_better: bool | None = False
    against: Against = "itself"
    unit: str = "of [0, 1]"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __call__(self, clip: EvaluatedClip) -> float | None:
        return warp_error(clip.video)


def warp_error(video: torch.Tensor) -> float | None:
    """Compare each frame with the next one, warped back by the optical flow between them, where it is visible.

    For each pair, E² is the mean squared difference over visible pixels and channels; the result is the root of the
    mean E² over pairs. A pixel is visible if its flow forward and the flow back from where it leads cancel:
    |f + b|² ≤ 0.01·(|f|² + |b|²) + 0.5, and it does not lead out of the frame.

    A still video has no error: read it beside a measure of structure.

    Args:
        video: (F, 3, H, W) floats in [0, 1].

    Returns:
        in [0, 1]; None if no pixel of any pair is visible, as with one frame.

    Source: Lai et al. 2018 (ECCV, arXiv 1808.00449), eq. 7; visibility of Sundaram et al. 2010 (ECCV), eq. 5; flow
    by dense inverse search, Kroeger et al. 2016 (ECCV).
    """
    import cv2

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    height, width = video.shape[-2:]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    greys = (to_bytes(luminance(frame[None]))[0, 0] for frame in video)  # (H, W)
    frames = (frame.permute(1, 2, 0).float().cpu().numpy() for frame in video)  # (H, W, 3)
    errors = []
    for (grey, frame), (next_grey, next_frame) in pairwise(zip(greys, frames)):
        forward, back = flow.calc(grey, next_grey, None), flow.calc(next_grey, grey, None)  # (H, W, 2) each: x, y
        x, y = columns + forward[..., 0], rows + forward[..., 1]
        back = cv2.remap(back, x, y, cv2.INTER_LINEAR)
        visible = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        lengths = (forward**2).sum(-1) + (back**2).sum(-1)
        visible &= ((forward + back) ** 2).sum(-1) <= 0.01 * lengths + 0.5
        if visible.any():
            warped = cv2.remap(next_frame, x, y, cv2.INTER_LINEAR)
            errors.append(float(((frame - warped)[visible] ** 2).mean(dtype=np.float64)))
    return float(np.sqrt(np.mean(errors))) if errors else None
