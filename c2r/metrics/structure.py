"""Agreement of edges and of blurred frames. No network."""

from dataclasses import dataclass
from typing import Literal

import torch

from c2r.data.images import blur, luminance
from c2r.metrics.clip import EvaluatedClip

#: Thresholds of Canny's hysteresis for 8-bit luminance, those of OpenCV's own examples and of Cosmos-Transfer's.
CANNY_THRESHOLDS = (100, 200)
#: An edge within this many pixels, along x, y and diagonally, counts as found.
TOLERANCE = 1
#: Sigma of the blur before SSIM as a share of the height: 8 pixels at 480.
BLUR_SHARE = 1 / 60
#: Frames that SSIM is computed of at once.
CHUNK = 16


@dataclass(frozen=True)
class EdgeF1:
    """F1 of the edges of the generated video against those of the true or the coarse one; `edge_f1`."""

    against: Literal["truth", "control"] = "truth"
    higher_is_better: bool | None = True
    unit: str = "share"

    @property
    def name(self) -> str:
        return _name("edge_f1", self.against)

    def __call__(self, clip: EvaluatedClip) -> float | None:
        reference = getattr(clip, self.against)
        return None if reference is None else edge_f1(clip.video, reference)


@dataclass(frozen=True)
class BlurSSIM:
    """SSIM of blurred frames of the generated and the true or coarse video; `blur_ssim`."""

    against: Literal["truth", "control"] = "truth"
    higher_is_better: bool | None = True
    unit: str = "SSIM"

    @property
    def name(self) -> str:
        return _name("blur_ssim", self.against)

    def __call__(self, clip: EvaluatedClip) -> float | None:
        reference = getattr(clip, self.against)
        return None if reference is None else blur_ssim(clip.video, reference)


def _name(name, against):
    return name if against == "truth" else f"{name}_{against}"


def edge_f1(video: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Compare the edges that Canny finds in two videos.

    An edge pixel is found if the other video has one within TOLERANCE pixels. With P the share of the video's edge
    pixels that are found in the reference, and R the share of the reference's that are found in the video, over all
    frames, F1 = 2·P·R / (P + R).

    Args:
        video, reference: (F, 3, H, W) floats in [0, 1].

    Returns:
        F1 in [0, 1]; None if neither video has an edge.

    Source: Canny 1986; boundary precision and recall of Martin et al. 2004 (PAMI 26/5), with a dilation instead of
    their one-to-one matching; Edge F1 of Cosmos-Transfer1 (arXiv 2503.14492).
    """
    import cv2

    neighbourhood = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * TOLERANCE + 1, 2 * TOLERANCE + 1))
    found = ours = recalled = theirs = 0
    for frame, other in zip(grey_frames(video), grey_frames(reference)):
        edges, true = (cv2.Canny(grey, *CANNY_THRESHOLDS) for grey in (frame, other))
        ours += int((edges > 0).sum())
        theirs += int((true > 0).sum())
        found += int(((edges > 0) & (cv2.dilate(true, neighbourhood) > 0)).sum())
        recalled += int(((true > 0) & (cv2.dilate(edges, neighbourhood) > 0)).sum())
    if ours + theirs == 0:
        return None
    if found + recalled == 0:
        return 0.0
    precision, recall = found / ours, recalled / theirs
    return 2 * precision * recall / (precision + recall)


def blur_ssim(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Compute SSIM of the luminance after a Gaussian blur of BLUR_SHARE of the height: layout without detail.

    Args:
        video, reference: (F, 3, H, W) floats in [0, 1], H and W at least 11.

    Returns:
        mean over the frames, in [−1, 1]; 1 for equal frames.

    Source: SSIM of Wang et al. 2004 (IEEE TIP 13/4) with its window of sigma 1.5; of blurred frames as in
    Cosmos-Transfer1 (arXiv 2503.14492).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for chunk, other in zip(video.split(CHUNK), reference.split(CHUNK)):
        first, second = (blur(luminance(frames), BLUR_SHARE * frames.shape[-2]) for frames in (chunk, other))
        values.append(structural_similarity_index_measure(first, second, data_range=1.0, reduction="none"))
    return torch.cat([value.reshape(-1) for value in values]).mean().item()


def grey_frames(video: torch.Tensor):
    """Yield the luminance of each frame of (F, 3, H, W) floats in [0, 1] as (H, W) uint8 numpy arrays."""
    for frame in video:
        yield (luminance(frame[None])[0, 0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
