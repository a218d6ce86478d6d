"""Warped error: identities, a reference in float64, and order on the toy."""

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from c2r.data.images import blur
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.consistency import WarpError, warp_error


def moving(pixels, frames=4, seed=0):
    """Return a smooth random picture that moves to the right by a number of pixels for each frame."""
    torch.manual_seed(seed)
    picture = blur(torch.rand(1, 3, 64, 128), 2.0)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    return torch.cat([picture[..., 24 - pixels * k : 24 - pixels * k + 80] for k in range(frames)])


def test_a_still_video_has_no_error():
    assert warp_error(moving(0)) == 0


def test_one_frame_has_no_measure():
    assert warp_error(moving(0, frames=1)) is None


def test_movement_is_taken_out():
    video = moving(3)
    unwarped = (video[1:] - video[:-1]).square().mean().sqrt().item()
    assert warp_error(video) < 0.1 * unwarped


def test_flicker_is_its_own_size():
    video = 0.8 * moving(0) + 0.05
    video[1::2] += 0.1
    assert warp_error(video) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("mixed", [False, True])
def test_error_is_that_of_its_formula(mixed, scenes):
    video = torch.stack([one["real"][0] for one in scenes]) if mixed else scenes[1]["real"]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    greys = [np.rint(np.tensordot([0.2126, 0.7152, 0.0722], f.numpy(), 1) * 255).astype(np.uint8) for f in video]
    frames, (rows, columns) = video.double().numpy(), np.indices(video.shape[-2:]).astype(float)
    errors = []
    for k in range(len(video) - 1):
        forward, back = (flow.calc(greys[a], greys[b], None).astype(float) for a, b in ((k, k + 1), (k + 1, k)))
        places = [rows + forward[..., 1], columns + forward[..., 0]]
        back = np.stack([ndimage.map_coordinates(back[..., i], places, order=1) for i in (0, 1)], -1)
        warped = np.stack([ndimage.map_coordinates(channel, places, order=1) for channel in frames[k + 1]])
        inside = (places[0] >= 0) & (places[0] <= 95) & (places[1] >= 0) & (places[1] <= 159)
        agree = ((forward + back) ** 2).sum(-1) <= 0.01 * ((forward**2).sum(-1) + (back**2).sum(-1)) + 0.5
        errors.append(((frames[k] - warped) ** 2).mean(0)[inside & agree].mean())
    assert warp_error(video) == pytest.approx(np.sqrt(np.mean(errors)), rel=0.03)  # OpenCV warps to 1/32 pixel


def test_a_clip_is_more_consistent_than_pictures_of_many_places(scenes):
    mixed = torch.stack([one["real"][0] for one in scenes])
    assert all(WarpError()(EvaluatedClip("a", "", one["real"])) < 0.7 * warp_error(mixed) for one in scenes)
