"""What the pixels of a clip tell of a CG look: flat texture, uniform lighting, straight and repeated edges.

Every number is one that theory lets rise with a CG look; `c2r.monitor` finds out on real and CG clips which of them
do, and how much each counts. All are invariant to exposure and contrast: night and fog are no CG. Scales are in pixels
or shares of the height, so clips are compared at one size only, the size of training. torch only.
"""

import math
from functools import cache
from itertools import pairwise

import torch
from torch.nn import functional as F

from c2r.data.images import blur, luminance

#: σ in pixels of the blurs whose differences are the bands of fine, middle and coarse texture.
BAND_SIGMAS = (0.7, 1.4, 2.8)

#: Pixels along one side of a cell: what is smaller than an edge's distance to the next is a surface's interior.
CELL = 8

#: In units of the frame's own contrast: below FLAT is no texture (a grey level is 0.02 or so), FAINT its measure.
FLAT, FAINT = 0.001, 0.01

#: Pixels: light and geometry of higher clips are measured at this height, since their scales are shares of it.
SMALL_HEIGHT = 96

LINE_ANGLES, ORIENTATION_BINS = 16, 18

TEXTURE = ("fine_slope", "middle_slope", "faint_detail", "dead_area")

LIGHTING = ("even_light", "even_rows", "weak_shade", "steady_shade")

GEOMETRY = ("line_density", "line_share", "repeated_orientation")


def small(images):
    """(F, 1, H, W) brought to SMALL_HEIGHT, if higher, by averaging."""
    height, width = images.shape[-2:]
    if height <= SMALL_HEIGHT:
        return images
    return F.adaptive_avg_pool2d(images, (SMALL_HEIGHT, max(1, round(width * SMALL_HEIGHT / height))))


def standardised(images):
    """(F, 1, H, W) with mean 0 and standard deviation 1 in each frame."""
    deviation = images.std((1, 2, 3), keepdim=True).clamp(min=0.01)
    return (images - images.mean((1, 2, 3), keepdim=True)) / deviation


def gradients(images):
    """Central differences along x and y of (F, 1, H, W): two of (F, 1, H - 2, W - 2)."""
    along_x = (images[..., 1:-1, 2:] - images[..., 1:-1, :-2]) / 2
    along_y = (images[..., 2:, 1:-1] - images[..., :-2, 1:-1]) / 2
    return along_x, along_y


def texture(frames):
    """TEXTURE: how flat surfaces are between their edges.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Returns:
        (4,) fp32: how steeply energy falls from the fine to the middle band and from the middle to the coarse one
        (natural logarithm, median over cells: hard edges fill few cells); how faint the fine detail of the median cell
        is against the frame's contrast (logarithm); share of pixels with almost no gradient. Grain lowers all.
    """
    images = standardised(luminance(frames))
    levels = [images, *(blur(images, sigma) for sigma in BAND_SIGMAS)]
    bands = [F.avg_pool2d((a - b) ** 2, CELL).sqrt().flatten(1) for a, b in pairwise(levels)]  # (F, cells)
    # FLAT above and FAINT below: a cell with no detail in either band counts as steep, not as even.
    slopes = [((coarse + FAINT) / (fine + FLAT)).log().median(1).values for fine, coarse in pairwise(bands)]
    faint = -(bands[0].median(1).values + FLAT).log()
    along_x, along_y = gradients(images)
    dead = (torch.hypot(along_x, along_y) < FAINT).float().mean((1, 2, 3))
    return torch.stack([*slopes, faint, dead]).mean(1)


def lighting(frames):
    """LIGHTING: how evenly a scene is lit.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Returns:
        (4,) fp32, negative logarithms of: the spread of the low-frequency log luminance; its spread within rows, since
        a sky over a street is no light; its local spread; how much the local spread changes from place to place and
        over time, as where shadows fall.
    """
    logs = (small(luminance(frames)) + 0.03).log()  # ratios of light; 0.03 keeps noise in black from counting
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
    """(LINE_ANGLES, 1, length, length): each the mean along a line through the centre, drawn by bilinear weights."""
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


def geometry(frames):
    """GEOMETRY: how straight, long and alike in direction edges are.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Returns:
        (3,) fp32, of the gradient in units of the local contrast: how much is left after it was averaged along the
        best line of a sixth of the height (logarithm), and which share (about 1 for lines, less for grain and curves);
        negative entropy of its orientation, in nats.
    """
    images = blur(standardised(small(luminance(frames))), 1.0)  # grain has no edges
    height = images.shape[-2]
    # Each place in units of its own contrast, or the lit windows of a night were all that counts.
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
