"""Error of depth: identities, a reference in float64, order on the toy, and depth models of the real classes."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.depth import DepthModel, DepthRMSE, depth_rmse, invert
from c2r.toy import city
from tests.helpers.metric_networks import save_depth_anything


def depth_of_scene(seed):
    times = np.arange(3, dtype=np.float32) / 8
    depth = torch.from_numpy(city._trace(city.make_scene(seed), times, 96, 160, offset=0.0).depth)
    return torch.where(depth < 1e3, depth, torch.inf)


def test_scale_and_shift_do_not_matter():
    reference = torch.rand(3, 20, 30)
    assert depth_rmse(7 * reference - 2, reference) == pytest.approx(0, abs=1e-6)
    estimate = torch.rand(3, 20, 30)
    error = depth_rmse(estimate, reference)
    scales, shifts = torch.rand(2, 3, 1, 1)
    assert depth_rmse((scales + 0.1) * estimate + shifts, 5 * reference + 1) == pytest.approx(error, abs=1e-6)


def test_a_flat_or_reversed_estimate_is_one():
    reference = torch.rand(3, 20, 30)
    assert depth_rmse(torch.zeros(3, 20, 30), reference) == 1
    assert depth_rmse(-reference, reference) == 1


def test_error_is_the_residual_of_the_best_fit():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(4, 20, 30, generator=generator)
    estimate = reference + 0.5 * torch.rand(4, 20, 30, generator=generator)
    reference[:, 3] = torch.nan
    errors = []
    for d, r in zip(estimate.double().numpy(), reference.double().numpy()):
        d, r = d[np.isfinite(r)], r[np.isfinite(r)]
        columns = np.stack([d, np.ones_like(d), -np.ones_like(d)], -1)  # a shift of either sign
        _, residual = nnls(columns, r)
        errors.append(residual / np.sqrt(len(r)) / r.std())
    assert depth_rmse(estimate, reference) == pytest.approx(np.mean(errors), rel=1e-6)


def test_places_without_a_surface_do_not_count():
    depth = torch.tensor([2.0, 4.0, torch.inf, torch.nan, 0.0, -1.0])
    assert invert(depth).nan_to_num(-1).tolist() == [0.5, 0.25, -1, -1, -1, -1]
    assert depth_rmse(torch.rand(2, 9, 9), invert(torch.full((2, 9, 9), torch.inf))) is None
    assert depth_rmse(torch.rand(2, 9, 9), torch.full((2, 9, 9), 0.3)) is None


def test_own_scene_is_below_another_and_another_below_none():
    inverse = [invert(depth_of_scene(seed)) for seed in range(4)]
    filled = [one.nan_to_num(0) for one in inverse]
    own = [depth_rmse(a.sqrt(), b) for a, b in zip(filled, inverse)]  # a model's depth bends that of the renderer
    other = [depth_rmse(filled[i - 1].sqrt(), inverse[i]) for i in range(4)]
    assert max(own) < min(other)
    assert max(other) < 1


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_depth_model_agrees_with_itself(kind, clips, tmp_path):
    model = DepthModel(save_depth_anything(tmp_path / kind, kind=kind), "cpu")
    video = clips[0].video.repeat(4, 1, 1, 1)  # more than one chunk
    inverse = model(video)
    assert inverse.shape == (12, 96, 160)
    torch.testing.assert_close(inverse[9:], model(video[9:]), rtol=1e-4, atol=1e-5)
    clip = EvaluatedClip("a", "", video, truth=video.clone(), depth=1 / inverse)
    for against in ("truth", "passes"):
        assert DepthRMSE(model, against)(clip) == pytest.approx(0, abs=1e-3)
    assert DepthRMSE(model, "control")(clip) is None


def test_metric_model_gives_depth_and_relative_model_its_inverse(clips, tmp_path):
    model = DepthModel(save_depth_anything(tmp_path / "metric", kind="metric"), "cpu")
    pixels = model.processor(images=[np.zeros((96, 160, 3), np.uint8)], return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2] % 14 == 0 == pixels.shape[-1] % 14
    depth = model.model(pixels).predicted_depth
    assert (depth >= 0).all()
    assert (depth <= 20).all()
    inverse = model(torch.zeros(1, 3, 96, 160))
    assert inverse.min() >= 1 / 20 - 1e-6
