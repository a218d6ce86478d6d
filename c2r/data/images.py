"""Luminance and blur of frames. torch only."""

import math

import torch
from torch.nn import functional as F

#: Weights of the channels: Rec. 709 luma of linear RGB, applied to the stored values. Not photometrically exact.
LUMA = (0.2126, 0.7152, 0.0722)


def luminance(frames: torch.Tensor) -> torch.Tensor:
    """Return the luminance of (F, 3, H, W) floats in [0, 1] as (F, 1, H, W) fp32."""
    # Python numbers: a tensor of them would be copied to the device, and the host would wait for the copy.
    red, green, blue = (weight * channel for weight, channel in zip(LUMA, frames.float().unbind(1)))
    return (red + green + blue).unsqueeze(1)


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur each channel of (F, C, H, W) by a Gaussian of `sigma` pixels; edges are replicated."""
    channels, reach = images.shape[1], max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    weight = (kernel / kernel.sum()).repeat(channels, 1, 1, 1)  # (C, 1, 1, K)
    images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), weight, groups=channels)
    return F.conv2d(F.pad(images, (0, 0, reach, reach), mode="replicate"), weight.mT, groups=channels)
