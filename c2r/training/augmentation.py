"""Photometric augmentation of control frames: the look changes, the geometry stays where it is.

A real clip is its own control in phase 2, so its features carry its look as well as its layout. Trained on an altered
look, the control branch can only use the layout.
"""

import torch
from torch.nn import functional as F

from c2r.data.images import blur, luminance

#: Frames that are altered at once; bounds the memory, not the result.
CHUNK_SIZE = 16


def augment_control_frames(frames, generator, chance=0.5):
    """Alter the look of one clip by each of KINDS by chance, with the same draw for all its frames.

    Args:
        frames: (F, 3, H, W) float RGB in [0, 1], on any device.
        generator: CPU `torch.Generator`: the same state gives the same clip.
        chance: probability of each kind; with 1 all are applied.

    Returns:
        (F, 3, H, W) in [0, 1], a new tensor.

    Raises:
        ValueError: if the frames are not float or not (F, 3, H, W).
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.is_floating_point():
        raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}: expected (F, 3, H, W) floats in [0, 1]")
    # Everything is drawn before a frame is touched: nothing can differ from frame to frame, and flicker.
    alterations = [draw(generator) for draw in KINDS.values() if torch.rand((), generator=generator) < chance]

    def altered(chunk):
        for alter in alterations:
            chunk = alter(chunk).clamp(0, 1)
        return chunk

    return torch.cat([altered(chunk) for chunk in frames.split(CHUNK_SIZE)]).clone()


def _uniform(generator, low, high, size=()):
    return low + (high - low) * torch.rand(size, generator=generator)


def draw_colour(generator):
    """Hue, saturation and the channels' gains: a mix of the channels that keeps grey grey but for the gains."""
    angle = _uniform(generator, -torch.pi, torch.pi)
    saturation = _uniform(generator, 0.0, 1.6)
    gains = _uniform(generator, -0.35, 0.35, (3, 1)).exp()
    grey = torch.ones(3) / 3**0.5
    # Rodrigues' rotation about the grey axis: v cos θ + (g × v) sin θ + g (g·v)(1 − cos θ)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    onto_grey = torch.outer(grey, grey)
    rotation = angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * onto_grey
    mix = gains * (onto_grey + saturation * (rotation - onto_grey))  # (3, 3)
    return lambda frames: torch.einsum("ij,njhw->nihw", mix.to(frames), frames)


def draw_gamma(generator):
    """x^γ with γ from 0.45 to 2.2."""
    gamma = _uniform(generator, -0.8, 0.8).exp().item()
    return lambda frames: frames.clamp(0, 1) ** gamma


def draw_flat_light(generator):
    """Low-frequency luminance divided out: shadows, gradients of the sky and vignettes go."""
    level = _uniform(generator, 0.4, 0.6).item()

    def flatten(frames):
        coarse = F.adaptive_avg_pool2d(luminance(frames), (4, 6))
        light = F.interpolate(coarse, size=frames.shape[2:], mode="bilinear", align_corners=False)
        return frames * level / (light + 0.05)

    return flatten


def draw_flat_texture(generator):
    """Kuwahara filter: each pixel takes the mean of the least varied of the four squares that meet in it.

    Texture within a surface goes, edges between surfaces stay. Source: Kuwahara et al. 1976.
    """
    radius = int(torch.randint(1, 4, (), generator=generator))
    size = radius + 1

    def smooth(frames):
        height, width = frames.shape[2:]
        padded = F.pad(frames, (radius,) * 4, mode="replicate")
        means = F.avg_pool2d(padded, size, stride=1)  # (n, 3, H + radius, W + radius), by the square's first corner
        spread = (
            F.avg_pool2d(luminance(padded) ** 2, size, stride=1) - F.avg_pool2d(luminance(padded), size, stride=1) ** 2
        )
        best, least = None, None
        for top in (0, radius):
            for left in (0, radius):
                mean, variance = (x[..., top : top + height, left : left + width] for x in (means, spread))
                best = mean if best is None else torch.where(variance < least, mean, best)
                least = variance if least is None else torch.minimum(variance, least)
        return best

    return smooth


def draw_blur(generator):
    """Gaussian blur of 0.5 to 2 pixels."""
    sigma = _uniform(generator, 0.5, 2.0).item()
    return lambda frames: blur(frames, sigma)


def draw_posterise(generator):
    """6 to 12 levels in each channel."""
    steps = int(torch.randint(5, 12, (), generator=generator))
    return lambda frames: (frames * steps).round() / steps


#: Each draws its parameters from a generator and returns (n, 3, H, W) in [0, 1] -> the same shape; in the order in
#: which they are applied.
KINDS = {
    "colour": draw_colour,
    "gamma": draw_gamma,
    "flat light": draw_flat_light,
    "flat texture": draw_flat_texture,
    "blur": draw_blur,
    "posterise": draw_posterise,
}
