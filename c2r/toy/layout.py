"""Where are the people and the edges in a video? Measures of control that share nothing with the models they judge."""

from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional as F

from c2r.toy import city

WEIGHTS = Path(__file__).parent / "weights"


class PeopleFinder(ModelMixin, ConfigMixin):
    """A small convolutional network on pixels, trained on the true renderings of the toy city.

    forward(frames (N, 3, H, W) in [-1, 1]) -> (N, H/8, W/8) logits: which share of each 8 x 8 cell shows a person.
    """

    cell = 8

    @register_to_config
    def __init__(self, channels: int = 24):
        super().__init__()
        c = channels
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, c, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv2d(c, c, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv2d(c, 2 * c, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.GELU()),
            nn.Conv2d(2 * c, 1, 1),
        )

    def forward(self, frames):
        return self.layers(frames)[:, 0]


@torch.no_grad()
def people_map(finder, video):
    """(F, 3, H, W) in [-1, 1] -> (F, H/8, W/8) in [0, 1]."""
    return finder(video).sigmoid()


def edge_map(video, cell=8):
    """How strong the edges of luminance are in each cell.

    Args:
        video: (F, 3, H, W), any range.
        cell: pixels along one side.

    Returns:
        (F, H/cell, W/cell), at least 0.
    """
    luminance = video.mean(1, keepdim=True)
    across = F.pad(luminance[..., 1:] - luminance[..., :-1], (0, 1))
    down = F.pad(luminance[..., 1:, :] - luminance[..., :-1, :], (0, 0, 0, 1))
    return F.avg_pool2d(torch.hypot(across, down), cell)[:, 0]


def correlations(found, truths):
    """How well each clip's map agrees with its own scene's, and with the other scenes'.

    Args:
        found, truths: lists of n maps, (F, h, w) float.

    Returns:
        (own, other): means of `correlation` over the scenes, and over all pairs of different ones.
    """
    table = [[correlation(a, b) for b in truths] for a in found]
    own = [table[i][i] for i in range(len(table))]
    other = [table[i][j] for i in range(len(table)) for j in range(len(table)) if i != j]
    return sum(own) / len(own), sum(other) / len(other)


def people_correlations(scenes, videos, fps):
    """How well the people of each video stand where its scene has them, and where another scene has them.

    The truth comes from the renderer; what is in the video, from a network that looks at pixels only.

    Args:
        scenes: list of `city.Scene`.
        videos: one (F, 3, H, W) float in [0, 255] for each.
        fps: frames per second.

    Returns:
        (own, other), see `correlations`.
    """
    finder = PeopleFinder.from_pretrained(WEIGHTS / "people_finder", torch_dtype=torch.float32)
    truths, found = [], []
    for scene, video in zip(scenes, videos):
        kinds = city.render(scene, (), len(video), fps, *video.shape[2:])["kinds"]
        truths.append(F.avg_pool2d(torch.from_numpy(kinds == city.PERSON).float()[:, None], finder.cell)[:, 0])
        found.append(people_map(finder, video / 127.5 - 1))
    return correlations(found, truths)


def correlation(found, truth):
    """Pearson correlation of two maps of one clip, over all of its frames and cells.

    Args:
        found, truth: (F, h, w) float.

    Returns:
        float in [-1, 1]; 0 where one of the maps is constant.
    """
    a, b = found.flatten() - found.mean(), truth.flatten() - truth.mean()
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-6)).item()
