"""Agreement of edges and of blurred frames. No network."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from c2r.data.images import blur, luminance
from c2r.metrics.clip import EvaluatedClip

#: Standard deviation that the luminance of each frame gets, and least one that is brought to it: exposure and contrast
#: are look, and with fixed thresholds fog has no edges.
CONTRAST, LEAST_CONTRAST = 0.25, 0.01
#: Thresholds of Canny's hysteresis for 8-bit luminance.
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
    bounds: tuple[float, float] = (0.0, 1.0)

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
    bounds: tuple[float, float] = (-1.0, 1.0)

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
    frames, F1 = 2·P·R / (P + R). Frames are brought to one contrast first, see `equalise_contrast`.

    Args:
        video, reference: (F, 3, H, W) floats in [0, 1].

    Returns:
        F1 in [0, 1]; None if neither video has an edge.

    Source: Canny 1986; boundary precision and recall of Martin et al. 2004 (PAMI 26/5), with a dilation instead of
    their one-to-one matching; Edge F1 of Cosmos-Transfer1 (arXiv 2503.14492), which leaves contrast as it is.
    """
    import cv2

    neighbourhood = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * TOLERANCE + 1, 2 * TOLERANCE + 1))
    found = ours = recalled = theirs = 0
    for frame, other in zip(video, reference):
        edges, true = (
            cv2.Canny(to_bytes(equalise_contrast(one[None]))[0, 0], *CANNY_THRESHOLDS) for one in (frame, other)
        )
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

    Frames are brought to one contrast first, see `equalise_contrast`.

    Args:
        video, reference: (F, 3, H, W) floats in [0, 1], H and W at least 11.

    Returns:
        mean over the frames, in [−1, 1]; 1 for equal frames.

    Source: SSIM of Wang et al. 2004 (IEEE TIP 13/4) with its window of sigma 1.5; of blurred frames as in
    Cosmos-Transfer1 (arXiv 2503.14492), which leaves contrast as it is.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for chunk, other in zip(video.split(CHUNK), reference.split(CHUNK)):
        first, second = (blur(equalise_contrast(frames), BLUR_SHARE * frames.shape[-2]) for frames in (chunk, other))
        value = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
        values.append(torch.as_tensor(value).reshape(-1))
    return torch.cat(values).mean().item()


def equalise_contrast(frames: torch.Tensor) -> torch.Tensor:
    """Give the luminance of each frame mean 0.5 and standard deviation CONTRAST, or less if it has hardly any.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Returns:
        (F, 1, H, W) fp32, cut to [0, 1].
    """
    grey = luminance(frames)
    deviation = grey.std((1, 2, 3), keepdim=True, correction=0).clamp(min=LEAST_CONTRAST)
    return ((grey - grey.mean((1, 2, 3), keepdim=True)) / deviation * CONTRAST + 0.5).clamp(0, 1)


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """Return floats in [0, 1] as uint8 numpy array of the same shape."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
