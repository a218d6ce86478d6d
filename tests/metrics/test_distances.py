"""Distances between sets: against scipy, torchmetrics and double loops, and their statistics."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from c2r.metrics import distances
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.distances import FrechetDistance, KernelDistance, frechet_distance


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def to_features(video):
    """Take a video's first row of pixels as the features of its frames, (F, D)."""
    return video[:, :, 0].flatten(1)


def clip_of(features, truth=None, name="a"):
    def video(rows):
        return rows.float().reshape(len(rows), 3, 1, -1)

    return EvaluatedClip(name, "", video(features), truth=None if truth is None else video(truth))


def kernel(x, y):
    return ((x @ y / len(x) + 1) ** 3).item()


def fill(measure, generated, true):
    for number, (features, truth) in enumerate(zip(generated, true)):
        measure.update(clip_of(features, truth, f"{number}.mp4"))
    return measure


@pytest.mark.parametrize("count", [(50, 40), (5, 40), (6, 5)])
def test_frechet_distance_is_that_of_the_matrix_root(count):
    x, y = draw(count[0], 12), 0.5 + 1.5 * draw(count[1], 12, seed=1)
    covariances = [np.cov(z.numpy(), rowvar=False) for z in (x, y)]
    shift = np.sum((x.mean(0) - y.mean(0)).numpy() ** 2)
    expected = shift + np.trace(sum(covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    # scipy's root of a singular product is off by the root of the rounding error
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6 if min(count) > 12 else 1e-4)


def test_frechet_distance_is_that_of_torchmetrics():
    x, y = draw(60, 12).float(), 0.3 + draw(70, 12, seed=1).float()

    class AsTheyAre(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)

    reference = FrechetInceptionDistance(feature=AsTheyAre(), normalize=True)
    reference.set_dtype(torch.float64)
    for features, real in ((y, True), (x, False)):
        reference.update(features.double()[..., None, None], real=real)
    assert frechet_distance(x.double(), y.double()) == pytest.approx(reference.compute().item(), rel=1e-4)


def test_frechet_distance_of_equal_and_of_shifted_sets():
    x = draw(50, 8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x + 2, x) == pytest.approx(4 * 8)
    assert frechet_distance(3 * (x - x.mean(0)), x - x.mean(0)) == pytest.approx(4 * x.var(0).sum().item())


def test_kernel_distance_to_separate_videos_is_that_of_torchmetrics():
    x, y = draw(9, 12).float(), 0.5 + draw(7, 12, seed=1).float()
    measure = KernelDistance(to_features, "kd")
    fill(measure, x[:, None], x[:, None])
    for row in y:
        measure.update_reference(clip_of(row[None]).video)
    kernels = [(a.double() @ b.double().T / 12 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    n, m = len(x), len(y)
    expected = (kernels[0].sum() - kernels[0].trace()) / (n * (n - 1)) - 2 * kernels[1].mean()
    expected += (kernels[2].sum() - kernels[2].trace()) / (m * (m - 1))
    assert measure.compute() == pytest.approx(expected.item())
    # torchmetrics takes equal numbers only
    assert measure.compute(range(7)) == pytest.approx(poly_mmd(y.double(), x[:7].double()).item())


@pytest.mark.parametrize("indices", [None, [0, 2, 2, 3, 3, 3]])
def test_kernel_distance_of_pairs_is_that_of_a_double_loop(indices):
    generated, true = draw(4, 3, 12).float().double(), 0.5 + draw(4, 3, 12, seed=1).float().double()
    measure = fill(KernelDistance(to_features, "kd"), generated, true)
    total, count = 0.0, 0
    for i in indices or range(4):
        for j in indices or range(4):
            if i != j:
                for a in range(3):
                    for b in range(3):
                        x, y, u, v = generated[i, a], generated[j, b], true[i, a], true[j, b]
                        total += kernel(x, y) + kernel(u, v) - kernel(x, v) - kernel(u, y)
                        count += 1
    true_float = pytest.approx(total / count, rel=1e-5, abs=1e-6)
    assert measure.compute(indices) == true_float


def test_a_set_has_no_distance_to_itself():
    features = draw(5, 4, 12)
    for measure, most in ((KernelDistance(to_features, "kd"), 1e-12), (FrechetDistance(to_features, "fd"), 1e-9)):
        fill(measure, features, features)
        assert measure.compute() == pytest.approx(0, abs=most)
        assert measure.compute([0, 0, 1, 3]) == pytest.approx(0, abs=most)


def test_kernel_distance_is_unbiased_for_few_clips_whose_frames_are_alike():
    values, biased = [], []
    for seed in range(300):
        clips = draw(2, 4, 1, 6, seed=seed) + 0.1 * draw(2, 4, 5, 6, seed=seed + 1000)
        values.append(fill(KernelDistance(to_features, "kd"), *clips).compute())
        biased.append(fill(FrechetDistance(to_features, "fd"), *clips).compute())
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert np.mean(biased) > 1  # why the documentation warns


def test_distances_rise_with_the_difference():
    for make in (KernelDistance, FrechetDistance):
        values = [
            fill(make(to_features, "d"), draw(6, 4, 12), shift + draw(6, 4, 12, seed=1)).compute()
            for shift in (0, 0.5, 1)
        ]
        assert values == sorted(values)


@pytest.mark.parametrize("make", [KernelDistance, FrechetDistance])
def test_clips_without_a_truth_count_only_against_separate_videos(make):
    generated, true = draw(4, 3, 12), 0.5 + draw(4, 3, 12, seed=1)
    measure, fewer = make(to_features, "d"), fill(make(to_features, "d"), generated[:3], true[:3])
    fill(measure, generated, [*true[:3], None])
    assert measure.compute() == pytest.approx(fewer.compute())
    for one in true:
        measure.update_reference(clip_of(one).video)
    with_all = measure.compute()
    assert with_all != fewer.compute()
    if make is FrechetDistance:
        expected = frechet_distance(*(x.float().double().flatten(0, 1) for x in (generated, true)))
        assert with_all == pytest.approx(expected)


@pytest.mark.parametrize("make", [KernelDistance, FrechetDistance])
def test_models_in_one_set_are_measured_apart(make):
    generated, true = draw(3, 4, 2, 12), draw(4, 2, 12, seed=1)
    both, alone = make(to_features, "d"), fill(make(to_features, "d"), generated[1], true)
    for model in generated[:2]:
        fill(both, model, true)
    assert both.compute(range(4, 8)) == pytest.approx(alone.compute())
    assert both.compute([5, 6, 7]) == pytest.approx(alone.compute([1, 2, 3]))
    assert both.compute([0, 0, 1]) == pytest.approx(fill(alone, generated[0], true).compute([4, 4, 5]))


def test_seeds_of_one_scene_are_no_independent_videos():
    values = []
    for seed in range(300):
        true, generated = draw(3, 1, 6, seed=seed), draw(2, 3, 1, 6, seed=seed + 1000)
        measure = KernelDistance(to_features, "kd")
        for model in generated:
            fill(measure, model, true)
        values.append(measure.compute())
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize("make", [KernelDistance, FrechetDistance])
def test_fewer_than_two_scenes_have_no_distance(make):
    measure = make(to_features, "d")
    assert measure.compute() is None
    fill(measure, draw(2, 3, 12), draw(2, 3, 12, seed=1))
    assert measure.compute([1, 1]) is None
    assert measure.compute() is not None
    measure.update_reference(clip_of(draw(3, 12)).video)
    assert measure.compute() is None


def test_distances_tell_looks_of_the_toy_apart(scenes, networks):
    from c2r.metrics.features import ImageFeatures

    features = ImageFeatures(networks["image_features"], "cpu")
    same, looks = KernelDistance(features, "kd"), KernelDistance(features, "kd")
    for name, one in zip("ab", scenes):
        same.update(EvaluatedClip(name, "", one["real"]))
        looks.update(EvaluatedClip(name, "", one["coarse"]))
    for one in scenes[2:]:
        same.update_reference(one["real"])
        looks.update_reference(one["real"])
    assert looks.compute() > same.compute()


@pytest.mark.parametrize(("make", "work"), [(KernelDistance, "kernel_means"), (FrechetDistance, "_Gaussian")])
def test_what_the_references_need_is_computed_once_for_all_sources(make, work, monkeypatch):
    """The features of truths are not computed at all; new references are noticed."""
    seen, spied = [], getattr(distances, work)

    class Spy:
        def __call__(self, *sets):
            seen.append(sum(len(one) for group in sets for one in group))
            return spied(*sets)

        def of(self, features):
            seen.append(len(features))
            return spied.of(features)

    monkeypatch.setattr(distances, work, Spy())
    looked_at = []

    def features(video):
        looked_at.append(video)
        return to_features(video)

    references, generated, true = draw(7, 2, 12), draw(6, 2, 12, seed=1), draw(6, 2, 12, seed=2)

    def measure(rows):
        one = make(features, "d")
        for row in references[:rows]:
            one.update_reference(clip_of(row).video)
        return fill(one, generated, true)

    kept = measure(6)
    assert len(looked_at) == 6 + 6
    first, second = kept.compute([0, 1, 2]), kept.compute([3, 4, 5])
    of_references = 2 * 6 * 2 if make is KernelDistance else 6 * 2  # frames: of both sides of the kernel
    assert seen.count(of_references) == 1
    assert second == pytest.approx(fill(measure(6), [], []).compute([3, 4, 5]))
    kept.update_reference(clip_of(references[6]).video)
    assert kept.compute([0, 1, 2]) == pytest.approx(measure(7).compute([0, 1, 2]))
    assert kept.compute([0, 1, 2]) != pytest.approx(first)
