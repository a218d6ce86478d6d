"""Measures of the look, from pixels alone: the weather and the walls that a video shows, and how sharp it is."""

from dataclasses import replace
from itertools import product

import numpy as np
import torch

from c2r.toy import city


def recognise_weather_and_walls(scene: city.Scene, video: torch.Tensor, fps: float) -> tuple[str, str]:
    """Tell the weather and the material of the walls in a video of a scene.

    The scene is rendered under each weather with each material. The answer is the pair whose mean colours of the sky,
    the ground and the buildings, without people, are nearest to those of the video. A wall of the right hue that is
    too pale may count as another material.

    Args:
        scene: the layout that the video has; its own weather and material do not matter.
        video: (F, 3, H, W) in [0, 255].
        fps: frames per second of the video.

    Returns:
        a key of `city.SKIES` and one of `city.MATERIALS`.
    """
    stride = max(1, round(fps))  # a frame a second is enough
    frames = video[::stride]
    num_frames, _, height, width = frames.shape
    rays = city.trace(scene, num_frames, fps / stride, height, width)

    def render(scene, looks):
        return city.render(scene, looks, num_frames, fps / stride, height, width, rays)

    kinds = render(scene, ())["kinds"]
    colours = _mean_colours(frames.movedim(1, -1).numpy(), kinds)
    distances = {}
    for pair in product(city.SKIES, city.MATERIALS):
        rendering = render(replace(scene, sky=pair[0], material=pair[1]), ("real",))["real"]
        distances[pair] = np.linalg.norm(_mean_colours(rendering, kinds) - colours)
    return min(distances, key=distances.__getitem__)


def _mean_colours(frames, kinds):
    """Return the square roots of the mean colours of each kind that is there, (kinds · 3,) in [0, 1].

    The square root sets dark colours apart.

    Args:
        frames: (F, H, W, 3) in [0, 255].
        kinds: (F, H, W), see `city.render`.
    """
    means = [frames[kinds == kind].mean(0) for kind in (city.SKY, city.GROUND, city.BUILDING) if (kinds == kind).any()]
    return np.sqrt(np.concatenate(means) / 255)


def gradient_energy(video: torch.Tensor) -> float:
    """Return the mean squared difference of neighbouring pixels: blur lowers it, noise and block edges raise it.

    Args:
        video: (F, 3, H, W), any range.

    Returns:
        in squared units of the range.
    """
    return (video.diff(dim=-1).square().mean() + video.diff(dim=-2).square().mean()).item()
