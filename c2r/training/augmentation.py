"""Photometric augmentation of control frames: it changes the look and keeps the geometry.

In phase 2 a real clip is its own control, so its features contain its look as well as its layout. If the look is
altered during training, the control branch can only use the layout.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from c2r.data.images import blur, luminance
from c2r.training.devices import to_device

#: Number of frames altered at once. It limits the memory and does not change the result.
CHUNK_SIZE = 16

#: (n, 3, H, W) in [0, 1] -> the same shape, with another look
Alteration = Callable[[torch.Tensor], torch.Tensor]


def augment_control_frames(frames: torch.Tensor, generator: torch.Generator, chance: float = 0.5) -> torch.Tensor:
    """Alter the look of one clip, in the same way for all its frames.

    Args:
        frames: (F, 3, H, W) float RGB in [0, 1], on any device.
        generator: on CPU; the same state gives the same result.
        chance: probability of each of KINDS; with 1 all are applied.

    Returns:
        (F, 3, H, W) in [0, 1], a new tensor.

    Raises:
        ValueError: the frames are not float or not (F, 3, H, W).
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.is_floating_point():
        raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}: expected (F, 3, H, W) floats in [0, 1]")
    # All parameters are drawn before the first frame is altered: a difference between frames would flicker.
    alterations = [draw(generator) for draw in KINDS.values() if torch.rand((), generator=generator) < chance]
    return torch.cat([_apply(alterations, chunk) for chunk in frames.split(CHUNK_SIZE)]).clone()


def _apply(alterations, frames):
    for alter in alterations:
        frames = alter(frames).clamp(0, 1)
    return frames


def flatten_light(frames: torch.Tensor, level: float) -> torch.Tensor:
    """Divide by the low-frequency luminance, which removes shadows, gradients of the sky and vignettes.

    Args:
        frames: (n, 3, H, W) in [0, 1].
        level: the luminance that replaces it.
    """
    coarse = F.adaptive_avg_pool2d(luminance(frames), (4, 6))
    light = F.interpolate(coarse, size=frames.shape[2:], mode="bilinear", align_corners=False)
    return frames * level / (light + 0.05)


def flatten_texture(frames: torch.Tensor, radius: int) -> torch.Tensor:
    """Apply a Kuwahara filter, which removes texture within surfaces and keeps the edges between them.

    Of the four squares that meet in a pixel, the one whose luminance varies least gives the pixel its mean.

    Args:
        frames: (n, 3, H, W) in [0, 1].
        radius: side of a square − 1, in pixels.

    Source: Kuwahara et al. 1976.
    """
    height, width = frames.shape[2:]
    size = radius + 1
    padded = F.pad(frames, (radius,) * 4, mode="replicate")
    means = F.avg_pool2d(padded, size, stride=1)  # (n, 3, H + radius, W + radius), at the square's top left corner
    variances = (
        F.avg_pool2d(luminance(padded) ** 2, size, stride=1) - F.avg_pool2d(luminance(padded), size, stride=1) ** 2
    )
    best, least = None, None
    for top in (0, radius):
        for left in (0, radius):
            mean, variance = (x[..., top : top + height, left : left + width] for x in (means, variances))
            best = mean if best is None else torch.where(variance < least, mean, best)
            least = variance if least is None else torch.minimum(variance, least)
    return best


def draw_colour(generator: torch.Generator) -> Alteration:
    """Draw a change of hue, saturation and the gains of the channels. Apart from the gains, grey stays grey."""
    angle = _uniform(generator, -torch.pi, torch.pi)
    saturation = _uniform(generator, 0.0, 1.6)
    gains = _uniform(generator, -0.35, 0.35, (3, 1)).exp()
    grey = torch.ones(3) / 3**0.5
    # Rodrigues' rotation about the grey axis: v cos θ + (g × v) sin θ + g (g·v)(1 − cos θ)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    onto_grey = torch.outer(grey, grey)
    rotation = angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * onto_grey
    mix = gains * (onto_grey + saturation * (rotation - onto_grey))  # (3, 3)
    return lambda frames: torch.einsum("ij,njhw->nihw", to_device(mix.to(frames.dtype), frames.device), frames)


def draw_gamma(generator: torch.Generator) -> Alteration:
    """Draw an exponent between 0.45 and 2.2."""
    gamma = _uniform(generator, -0.8, 0.8).exp().item()
    return lambda frames: frames.clamp(0, 1) ** gamma


def draw_flat_light(generator: torch.Generator) -> Alteration:
    """Draw the level of `flatten_light`, 0.4 to 0.6."""
    level = _uniform(generator, 0.4, 0.6).item()
    return lambda frames: flatten_light(frames, level)


def draw_flat_texture(generator: torch.Generator) -> Alteration:
    """Draw the radius of `flatten_texture`, 1 to 3 pixels."""
    radius = int(torch.randint(1, 4, (), generator=generator))
    return lambda frames: flatten_texture(frames, radius)


def draw_blur(generator: torch.Generator) -> Alteration:
    """Draw a Gaussian blur of 0.5 to 2 pixels."""
    sigma = _uniform(generator, 0.5, 2.0).item()
    return lambda frames: blur(frames, sigma)


def draw_posterise(generator: torch.Generator) -> Alteration:
    """Draw a reduction of each channel to 6 to 12 levels."""
    steps = int(torch.randint(5, 12, (), generator=generator))
    return lambda frames: (frames * steps).round() / steps


def _uniform(generator, low, high, size=()):
    return low + (high - low) * torch.rand(size, generator=generator)


#: The kinds of alteration, in the order in which they are applied.
KINDS: dict[str, Callable[[torch.Generator], Alteration]] = {
    "colour": draw_colour,
    "gamma": draw_gamma,
    "flat light": draw_flat_light,
    "flat texture": draw_flat_texture,
    "blur": draw_blur,
    "posterise": draw_posterise,
}
