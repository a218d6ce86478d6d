"""Measures of control: people and edges of a video, compared with the positions that the renderer gave them.

They look at pixels alone and share nothing with the models that they judge.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional as F

from c2r.toy import city

WEIGHTS = Path(__file__).parent / "weights"


class PeopleFinder(ModelMixin, ConfigMixin):
    """A small convolutional network that finds people in pixels, trained on renderings of the toy city.

    forward(frames (N, 3, H, W) in [-1, 1]) -> (N, H/8, W/8) logits of the share of each 8 x 8 cell that is a person.
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

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.layers(frames)[:, 0]


@torch.no_grad()
def people_map(finder: PeopleFinder, video: torch.Tensor) -> torch.Tensor:
    """Return the share of each cell that shows a person: (F, 3, H, W) in [-1, 1] -> (F, H/8, W/8) in [0, 1]."""
    return finder(video).sigmoid()


def true_people_map(kinds: np.ndarray) -> torch.Tensor:
    """Return the share of each cell that is a person: (F, H, W) of `city.render` -> (F, H/8, W/8) in [0, 1]."""
    return F.avg_pool2d(torch.from_numpy(kinds == city.PERSON).float()[:, None], PeopleFinder.cell)[:, 0]


def edge_map(video: torch.Tensor, cell: int = 8) -> torch.Tensor:
    """Return the mean strength of the luminance edges in each cell.

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


def correlations(found: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Compare the map of each clip with the true map of its own scene and with those of the other scenes.

    Args:
        found, truths: one map (F, h, w) for each scene.

    Returns:
        mean `correlation` over the scenes, and over all pairs of different scenes.
    """
    table = [[correlation(a, b) for b in truths] for a in found]
    own = [table[i][i] for i in range(len(table))]
    other = [table[i][j] for i in range(len(table)) for j in range(len(table)) if i != j]
    return sum(own) / len(own), sum(other) / len(other)


def people_correlations(
    scenes: Sequence[city.Scene], videos: Sequence[torch.Tensor], fps: float
) -> tuple[float, float]:
    """Compare the positions of people in each video with those in its own scene and in the other scenes.

    The renderer gives the true positions; `PeopleFinder` finds those in the video.

    Args:
        scenes: the scene that each video should show.
        videos: one (F, 3, H, W) float in [0, 255] for each scene.
        fps: frames per second.

    Returns:
        see `correlations`.
    """
    finder = PeopleFinder.from_pretrained(WEIGHTS / "people_finder", torch_dtype=torch.float32)
    truths, found = [], []
    for scene, video in zip(scenes, videos):
        kinds = city.render(scene, (), len(video), fps, *video.shape[2:])["kinds"]
        truths.append(true_people_map(kinds))
        found.append(people_map(finder, video / 127.5 - 1))
    return correlations(found, truths)


def correlation(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the Pearson correlation of two maps (F, h, w) over all frames and cells; 0 if one map is constant."""
    a, b = found.flatten() - found.mean(), truth.flatten() - truth.mean()
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-6)).item()
