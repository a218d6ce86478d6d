"""Agreement of depth: that of a depth model on the generated video, with the renderer's or that of another video."""

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F
from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.networks import CHUNK, load_image_processor, load_network, process

#: Depth models of transformers whose output is known to be inverse depth, or depth where their config says "metric".
KINDS = {"depth_anything": DepthAnythingForDepthEstimation, "dpt": DPTForDepthEstimation}
#: Pixels with a surface that a frame needs, and the spread of inverse depth relative to its largest value, below which
#: there is nothing to compare.
MIN_PIXELS, MIN_SPREAD = 16, 1e-6


class DepthModel:
    """A network that estimates inverse depth: Depth Anything (V1, V2, relative or metric) or DPT (MiDaS 3).

    Args:
        name_or_path: a folder or hub name.
        device: where it runs.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: torch.device | str):
        self.model, self.folder = load_network(name_or_path, KINDS, device)
        self.processor = load_image_processor(self.folder)
        self.is_metric = getattr(self.model.config, "depth_estimation_type", "relative") == "metric"

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """Return the inverse depth of (F, 3, H, W) floats in [0, 1], as (F, H, W) fp32 on the CPU, in no unit."""
        depths = []
        for frames in video.split(CHUNK):
            inputs = process(self.processor, self.folder, frames)
            depth = self.model(inputs["pixel_values"].to(self.model.device)).predicted_depth  # (n, h, w)
            depth = F.interpolate(depth[:, None].float(), video.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            depths.append((1 / depth.clamp(min=1e-3) if self.is_metric else depth).cpu())
        return torch.cat(depths)


class DepthRMSE:
    """Error of the generated video's depth against that of the truth, of the coarse video or of the renderer.

    Its name is `depth_rmse`, `depth_rmse_control` or `depth_rmse_passes`; see the function `depth_rmse`.

    Args:
        inverse_depth: (F, 3, H, W) -> (F, H, W), a `DepthModel`; share one `Remembering` among measures.
        against: the other side. `passes` is the clip's `depth`.
    """

    higher_is_better: bool | None = False
    unit = "share of the spread"
    bounds = (0.0, 1.0)

    def __init__(
        self,
        inverse_depth: Callable[[torch.Tensor], torch.Tensor],
        against: Literal["truth", "control", "passes"] = "truth",
    ):
        self.inverse_depth, self.against = inverse_depth, against
        self.name = "depth_rmse" if against == "truth" else f"depth_rmse_{against}"

    def __call__(self, clip: EvaluatedClip) -> float | None:
        other = clip.depth if self.against == "passes" else getattr(clip, self.against)
        if other is None:
            return None
        reference = invert(other) if self.against == "passes" else self.inverse_depth(other)
        return depth_rmse(self.inverse_depth(clip.video), reference)


def invert(depth: torch.Tensor) -> torch.Tensor:
    """Return 1 / depth in fp32, nan where there is no surface: where depth is not finite or not above 0."""
    has_surface = depth.isfinite() & (depth > 0)
    return torch.where(has_surface, 1 / depth.float().where(has_surface, torch.ones(())), torch.nan).cpu()


def depth_rmse(inverse_depth: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Compute the error of inverse depth that remains after the best scale and shift of each frame.

    For each frame, with r the reference and d the estimate over the pixels that have a surface,
    E = min over a ≥ 0, b of RMS(a·d + b − r) / std(r), which is √(1 − ρ²), ρ the correlation of d and r, or 1 if ρ is
    negative. 0 is depth that agrees up to scale and shift, which a single image does not determine; 1 is no better
    than a flat wall.

    Args:
        inverse_depth: (F, H, W), the estimate.
        reference: (F, H, W), nan where there is no surface.

    Returns:
        the mean over the frames in which the reference varies, in [0, 1]; None if it varies in none.

    Source: scale and shift of Ranftl et al. 2022 (PAMI 44/3, arXiv 1907.01341), eqs. 3 and 4, fitted in inverse depth;
    divided by the spread, so that a near scene counts as much as a far one.
    """
    errors = []
    for estimate, true in zip(inverse_depth.cpu().double(), reference.cpu().double()):
        valid = true.isfinite() & estimate.isfinite()
        if int(valid.sum()) < MIN_PIXELS:
            continue
        estimate, true = estimate[valid], true[valid]
        if true.std() <= MIN_SPREAD * true.abs().max():
            continue
        estimate, true = estimate - estimate.mean(), true - true.mean()
        product = (estimate.square().sum() * true.square().sum()).sqrt()
        correlation = (estimate @ true / product).clamp(0, 1) if product > 0 else product  # a flat estimate: 0
        errors.append((1 - correlation**2).clamp(min=0).sqrt())
    return torch.stack(errors).mean().item() if errors else None
