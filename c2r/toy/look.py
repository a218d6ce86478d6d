"""Measures of the look, from pixels alone: the weather and the walls that a video shows, and how sharp it is."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from c2r.toy import city

# Frames per second of the renderings that a video is compared with.
_FPS = 1.0


def recognise(scene: city.Scene, video: torch.Tensor, fps: float) -> tuple[str, str]:
    """Tell the weather and the material of the walls in a video of a scene.

    The scene is rendered under each weather with each material. The answer is the pair whose mean colours of the sky,
    the ground and the buildings, without people, are nearest to those of the video.

    Args:
        scene: the layout that the video has; its own weather and material do not matter.
        video: (F, 3, H, W) in [0, 255].
        fps: frames per second of the video.

    Returns:
        a key of `city.SKIES` and one of `city.MATERIALS`.
    """
    frames = video[:: max(1, round(fps / _FPS))]
    height, width = frames.shape[2:]
    pairs = list(product(city.SKIES, city.MATERIALS))
    found = None
    distances = []
    for sky, material in pairs:
        other = replace(scene, sky=sky, material=material)
        clip = city.render(other, ("real",), len(frames), _FPS, height, width)
        if found is None:
            found = _mean_colours(frames.movedim(1, -1).numpy(), clip["kinds"])
        distances.append(np.linalg.norm(_mean_colours(clip["real"], clip["kinds"]) - found))
    return pairs[int(np.argmin(distances))]


def _mean_colours(frames, kinds):
    """Return the square roots of the mean colours (3 kinds x RGB); a square root sets dark colours apart."""
    means = [frames[kinds == kind].mean(0) for kind in (city.SKY, city.GROUND, city.BUILDING) if (kinds == kind).any()]
    return np.sqrt(np.concatenate(means) / 255)


def gradient_energy(videos: Sequence[torch.Tensor]) -> float:
    """Return the mean squared difference of neighbouring pixels.

    Args:
        videos: each (F, 3, H, W), any range.

    Returns:
        in squared units of the range; blur lowers it.
    """
    energies = [video.diff(dim=-1).square().mean() + video.diff(dim=-2).square().mean() for video in videos]
    return torch.stack(energies).mean().item()
