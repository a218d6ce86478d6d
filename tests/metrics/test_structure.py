"""Edges and blurred frames: identities, a reference in float64, and order on the toy."""

import math
from itertools import permutations

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.structure import BLUR_SHARE, CANNY_THRESHOLDS, CONTRAST, BlurSSIM, EdgeF1, blur_ssim, edge_f1


def square(left, size=64, side=24):
    video = torch.full((2, 3, size, size), 0.2)
    video[:, :, 20 : 20 + side, left : left + side] = 0.8
    return video


def equalise_contrast(video):
    """Return (F, H, W) float64, computed apart."""
    grey = np.tensordot(video.double().numpy(), [0.2126, 0.7152, 0.0722], ([1], [0]))
    mean, deviation = (f(grey, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
    return np.clip((grey - mean) / np.maximum(deviation, 0.01) * CONTRAST + 0.5, 0, 1)


def test_edges_of_equal_videos_agree(scenes):
    for one in scenes:
        assert edge_f1(one["real"], one["real"]) == 1


def test_edges_ignore_exposure_and_contrast(scenes):
    for one in scenes:
        assert edge_f1(0.4 * one["real"] + 0.3, one["real"]) > 0.97


def test_edges_have_a_tolerance_of_one_pixel():
    assert edge_f1(square(20), square(21)) == 1
    assert edge_f1(square(20), square(25)) < 0.6


def test_edges_of_flat_videos():
    flat = torch.full((2, 3, 64, 64), 0.5)
    assert edge_f1(flat, flat) is None
    assert edge_f1(flat, square(20)) == 0 == edge_f1(square(20), flat)


def test_edge_f1_is_that_of_distances_to_edges(scenes):
    first, second = scenes[0]["cg"], scenes[0]["real"]
    counts = np.zeros(4)
    for a, b in zip(equalise_contrast(first), equalise_contrast(second)):
        a, b = (cv2.Canny(np.rint(grey * 255).astype(np.uint8), *CANNY_THRESHOLDS) > 0 for grey in (a, b))
        near = [ndimage.distance_transform_cdt(~edges, "chessboard") <= 1 for edges in (a, b)]
        counts += [a.sum(), (a & near[1]).sum(), b.sum(), (b & near[0]).sum()]
    precision, recall = counts[1] / counts[0], counts[3] / counts[2]
    expected = 2 / (1 / precision + 1 / recall)
    assert edge_f1(first, second) == pytest.approx(expected, abs=0.01)  # fp32 may round a grey level differently


def test_blur_ssim_is_that_of_its_formula(scenes):
    first, second = scenes[0]["cg"], scenes[1]["real"]
    sigma = BLUR_SHARE * 96
    values = []
    for images in zip(equalise_contrast(first), equalise_contrast(second)):
        x, y = (ndimage.gaussian_filter(one, sigma, mode="nearest", radius=math.ceil(3 * sigma)) for one in images)
        mx, my, xx, yy, xy = (
            ndimage.gaussian_filter(one, 1.5, radius=5, mode="mirror") for one in (x, y, x * x, y * y, x * y)
        )
        c1, c2 = 0.01**2, 0.03**2
        top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
        values.append((top / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))).mean())
    assert blur_ssim(first, second) == pytest.approx(np.mean(values), abs=1e-4)


def test_blur_ssim_of_equal_videos_is_one_at_any_contrast(scenes):
    for one in scenes:
        assert blur_ssim(one["real"], one["real"]) == pytest.approx(1, abs=1e-4)
        assert blur_ssim(0.4 * one["real"] + 0.3, one["real"]) > 0.99


def test_own_scene_is_above_another_and_another_above_none(scenes):
    none = torch.full_like(scenes[0]["real"], 0.5) + 0.02 * torch.randn(scenes[0]["real"].shape)
    own, other, nothing = [], [], []
    for one in scenes:
        own.append((edge_f1(one["cg"], one["real"]), blur_ssim(one["cg"], one["real"])))
        nothing.append((edge_f1(none[:, :, :1, :1].expand_as(none), one["real"]), blur_ssim(none, one["real"])))
    for one, another in permutations(scenes, 2):
        other.append((edge_f1(another["cg"], one["real"]), blur_ssim(another["cg"], one["real"])))
    own, other, nothing = (np.array(values) for values in (own, other, nothing))
    assert own[:, 0].min() > other[:, 0].max()
    assert (own.mean(0) - other.mean(0) > [0.2, 0.05]).all()
    assert (other.mean(0) > nothing.mean(0)).all()


def test_measures_against_the_coarse_video_reward_the_cg_look(scenes):
    for measure in (edge_f1, blur_ssim):
        cg, real = ([measure(one[look], one["coarse"]) for one in scenes] for look in ("cg", "real"))
        assert np.mean(cg) > np.mean(real) + 0.05  # why docs/measures.md warns


def test_measures_take_the_side_that_their_name_says(clips):
    clip = clips[0]
    for measure in (EdgeF1, BlurSSIM):
        truth, control = measure(), measure("control")
        assert control.name == f"{truth.name}_control"
        assert truth(clip) != control(clip)
        assert truth(EvaluatedClip("a", "", clip.video, clip.control)) is None
        assert control(EvaluatedClip("a", "", clip.video, truth=clip.truth)) is None
