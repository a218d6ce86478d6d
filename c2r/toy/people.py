"""Where are the people in a video? A measure of control that shares nothing with the models it judges."""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn


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


def people_correlation(found, truth):
    """Pearson correlation of two people maps of one clip, over all of its frames and cells.

    Args:
        found, truth: (F, h, w) float.

    Returns:
        float in [-1, 1]; 0 where one of the maps is constant.
    """
    a, b = found.flatten() - found.mean(), truth.flatten() - truth.mean()
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-6)).item()
