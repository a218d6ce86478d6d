"""Measures of a CG look from the pixels of a clip: flat texture, uniform lighting, straight and repeated edges.

In theory every number rises with a CG look. `c2r.evaluation.monitor` finds out on real and CG clips which numbers do,
and gives each a weight. All are invariant to exposure and contrast: night and fog are not CG. Scales are in pixels or
shares of the height, so clips can be compared only at one size, the size of training.
"""

import math
from functools import cache
from itertools import pairwise

import torch
from torch.nn import functional as F

from c2r.data.images import blur, luminance

#: Sigmas, in pixels, of the blurs whose differences are the bands of fine, middle and coarse texture.
BAND_SIGMAS = (0.7, 1.4, 2.8)

#: Side of a cell in pixels. It is smaller than the usual distance between two edges, so that most cells lie within a
#: surface.
CELL = 8

#: No texture, and hardly visible texture, in units of the frame's contrast; one grey level is about 0.02.
FLAT, FAINT = 0.001, 0.01

#: Lighting and geometry of taller clips are measured at this height in pixels: their scales are shares of the height,
#: and large kernels would take minutes.
SMALL_HEIGHT = 96

LINE_ANGLES, ORIENTATION_BINS = 16, 18

TEXTURE = ("fine_slope", "middle_slope", "faint_detail", "dead_area")

LIGHTING = ("even_light", "even_rows", "weak_shade", "steady_shade")

GEOMETRY = ("line_density", "line_share", "repeated_orientation")


def shrink(images: torch.Tensor) -> torch.Tensor:
    """Average (F, 1, H, W) down to a height of SMALL_HEIGHT if it is taller."""
    height, width = images.shape[-2:]
    if height <= SMALL_HEIGHT:
        return images
    return F.adaptive_avg_pool2d(images, (SMALL_HEIGHT, max(1, round(width * SMALL_HEIGHT / height))))


def standardise(images: torch.Tensor) -> torch.Tensor:
    """Give each frame of (F, 1, H, W) mean 0 and standard deviation 1, or less if it has hardly any contrast."""
    deviation = images.std((1, 2, 3), keepdim=True).clamp(min=0.01)
    return (images - images.mean((1, 2, 3), keepdim=True)) / deviation


def gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the central differences of (F, 1, H, W) along x and along y, each (F, 1, H - 2, W - 2)."""
    along_x = (images[..., 1:-1, 2:] - images[..., 1:-1, :-2]) / 2
    along_y = (images[..., 2:, 1:-1] - images[..., :-2, 1:-1]) / 2
    return along_x, along_y


def texture(frames: torch.Tensor) -> torch.Tensor:
    """Measure how flat surfaces are between their edges. Grain lowers all numbers.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Returns:
        (4,) fp32, named TEXTURE: logarithm of the energy of the middle band relative to the fine one, and of the
        coarse band relative to the middle one, each the median over cells, since hard edges fill few cells; negative
        logarithm of the fine detail of the median cell relative to the frame's contrast; share of pixels with almost
        no gradient.
    """
    images = standardise(luminance(frames))
    levels = [images, *(blur(images, sigma) for sigma in BAND_SIGMAS)]
    bands = [F.avg_pool2d((a - b) ** 2, CELL).sqrt().flatten(1) for a, b in pairwise(levels)]  # (F, cells)
    # The larger FAINT in the numerator: a cell without detail in either band gets a steep slope, not an even one.
    slopes = [((coarse + FAINT) / (fine + FLAT)).log().median(1).values for fine, coarse in pairwise(bands)]
    faint = -(bands[0].median(1).values + FLAT).log()
    along_x, along_y = gradients(images)
    dead = (torch.hypot(along_x, along_y) < FAINT).float().mean((1, 2, 3))
    return torch.stack([*slopes, faint, dead]).mean(1)


def lighting(frames: torch.Tensor) -> torch.Tensor:
    """Measure how evenly a scene is lit.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Returns:
        (4,) fp32, named LIGHTING, negative logarithms of: the spread of the low-frequency log luminance; its spread
        within rows, to which a bright sky above a street does not contribute; its local spread; the variation of the
        local spread over places and time, which shadows cause.
    """
    logs = (shrink(luminance(frames)) + 0.03).log()  # ratios of light; 0.03 suppresses noise in black
    height = logs.shape[-2]
    light = blur(logs, height / 8)
    rows = light - light.mean(-1, keepdim=True)
    wide = blur(logs, height / 4)
    shade = blur((blur(logs, height / 24) - wide) ** 2, height / 6).sqrt()
    values = [
        light.std((1, 2, 3)).mean(),
        rows.std((1, 2, 3)).mean(),
        shade.mean(),
        shade.std() / shade.mean().clamp(min=1e-4),
    ]
    return -(torch.stack(values) + 1e-3).log()


@cache
def _line_kernels(length):
    """Return kernels that average along a line through the centre, (LINE_ANGLES, 1, length, length).

    The lines are drawn with bilinear weights.
    """
    kernels = torch.zeros(LINE_ANGLES, 1, length, length)
    centre = length // 2
    for i in range(LINE_ANGLES):
        angle = math.pi * i / LINE_ANGLES
        for step in torch.linspace(-centre, centre, 4 * length).tolist():
            x, y = centre + step * math.cos(angle), centre + step * math.sin(angle)
            left, top = min(int(x), length - 2), min(int(y), length - 2)
            for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
                for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
                    kernels[i, 0, row, column] += weight_x * weight_y
    return kernels / kernels.sum((2, 3), keepdim=True)


def geometry(frames: torch.Tensor) -> torch.Tensor:
    """Measure how straight, long and parallel edges are.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Returns:
        (3,) fp32, named GEOMETRY, of the gradient in units of the local contrast: logarithm of its mean after
        averaging along the best line, whose length is a sixth of the height; the share of the gradient that this
        averaging keeps, about 1 for lines and less for grain and curves; negative entropy of its orientation in nats.
    """
    images = blur(standardise(shrink(luminance(frames))), 1.0)  # removes grain
    height = images.shape[-2]
    # Divided by the local contrast: otherwise the lit windows of a night scene would outweigh everything else.
    local = images - blur(images, height / 6)
    images = local / (blur(local**2, height / 6).sqrt() + 0.1)
    along_x, along_y = gradients(images)
    energy = along_x**2 + along_y**2

    length = 2 * (height // 12) + 1
    kernels = _line_kernels(length).to(images)
    best = torch.zeros_like(energy)
    for i, kernel in enumerate(kernels):
        angle = math.pi * i / LINE_ANGLES
        across = along_y * math.cos(angle) - along_x * math.sin(angle)
        best = torch.maximum(best, F.conv2d(across, kernel[None], padding=length // 2).abs())
    lines = best.mean((1, 2, 3))
    share = lines / energy.sqrt().mean((1, 2, 3)).clamp(min=1e-3)

    orientation = torch.atan2(along_y, along_x).remainder(math.pi) / math.pi * ORIENTATION_BINS
    bins = orientation.long().clamp(max=ORIENTATION_BINS - 1).flatten(1)
    shares = torch.zeros(len(images), ORIENTATION_BINS, device=images.device)
    shares = shares.scatter_add(1, bins, energy.flatten(1)) / energy.sum((1, 2, 3)).clamp(min=1e-6)[:, None]
    entropy = -(shares * (shares + 1e-6).log()).sum(1)
    return torch.stack([(lines + 1e-3).log(), share, -entropy]).mean(1)
