"""What is measured and altered alike in frames: luminance and blur. torch only."""

import math

import torch
from torch.nn import functional as F

#: Rec. 709 luma of linear RGB, here taken for the stored values: a weight of the channels, no photometry.
LUMA = (0.2126, 0.7152, 0.0722)


def luminance(frames):
    """(F, 3, H, W) floats in [0, 1] -> (F, 1, H, W) fp32."""
    return (frames.float() * frames.new_tensor(LUMA, dtype=torch.float32).view(1, 3, 1, 1)).sum(1, keepdim=True)


def blur(images, sigma):
    """Gaussian blur of each channel of (F, C, H, W), σ in pixels, edges replicated."""
    channels, reach = images.shape[1], max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    weight = (kernel / kernel.sum()).repeat(channels, 1, 1, 1)  # (C, 1, 1, K)
    images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), weight, groups=channels)
    return F.conv2d(F.pad(images, (0, 0, reach, reach), mode="replicate"), weight.mT, groups=channels)
