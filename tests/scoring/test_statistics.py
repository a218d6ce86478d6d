"""Statistics of an evaluation: identities, agreement with SciPy, and coverage in a small simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from c2r.scoring.statistics import (
    MIN_CLIPS,
    SIGNIFICANCE,
    Interval,
    bootstrap_interval,
    clips_needed,
    holm,
    jackknife_interval,
    sign_test,
)


def test_an_interval_moves_and_scales_with_its_values():
    values = np.random.default_rng(0).normal(size=9)
    interval = bootstrap_interval(values)
    assert interval.low < interval.mean < interval.high
    assert interval.mean == pytest.approx(values.mean())
    moved, mirrored = bootstrap_interval(3 * values + 5), bootstrap_interval(-values)
    assert (moved.low, moved.high) == pytest.approx((3 * interval.low + 5, 3 * interval.high + 5))
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))
    assert bootstrap_interval(values) == interval  # the same clips give the same interval


def test_few_clips_have_a_mean_without_an_interval():
    assert bootstrap_interval([]).mean != bootstrap_interval([]).mean
    few = bootstrap_interval([1.0] * (MIN_CLIPS - 2) + [2.0])
    assert few.mean == pytest.approx(1.2)
    assert np.isnan([few.low, few.high]).all()


@pytest.mark.parametrize("values", [[0.25] * 8, [0, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0.5]])
def test_nearly_equal_clips_have_a_mean_without_an_interval(values):
    interval = bootstrap_interval(values)
    assert interval.mean == pytest.approx(np.mean(values))
    assert np.isnan([interval.low, interval.high]).all()


@pytest.mark.parametrize("zeros", [13, 29])
def test_a_side_on_which_resamples_have_no_spread_gets_students_bound(zeros):
    """(13/16)^16 = 3.6 % and (29/32)^32 = 4.3 % of the resamples hold zeros only, more than the tail of 2.5 %."""
    values = np.array([*[0.0] * zeros, 1.0, 1.5, 2.0])
    interval = bootstrap_interval(values)
    student = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert interval.high == pytest.approx(student[1])
    assert student[0] < interval.low < interval.mean


def test_an_interval_is_cut_to_what_its_number_can_be():
    interval = Interval(0.9, 0.7, 1.1).within((0, 1))
    assert (interval.low, interval.mean, interval.high) == (0.7, 0.9, 1)
    assert np.isnan(Interval(0.9).within((0, 1)).low)


@pytest.mark.parametrize(
    ("count", "draw"),
    [
        (8, lambda rng: (rng.random(8) < 0.8).astype(float) - 0.8),
        (32, lambda rng: (rng.random(32) < 0.8).astype(float) - 0.8),
        (32, lambda rng: np.where(rng.random(32) < 0.7, 0.0, rng.exponential(size=32)) - 0.3),
        (16, lambda rng: rng.normal(1.5, 1.0, 16).clip(-1, 2) - 1.304),  # computed from 10⁷ values
    ],
)
def test_intervals_cover_a_mean_of_tied_and_clamped_values_as_promised(count, draw):
    rng = np.random.default_rng(count)
    intervals = [bootstrap_interval(draw(rng), seed=i) for i in range(300)]
    covered = [interval.low <= 0 <= interval.high for interval in intervals if not np.isnan(interval.low)]
    assert np.mean(covered) >= 0.93


def test_intervals_cover_a_skewed_mean_as_promised():
    # 400 intervals of 8 clips: 92 to 97 % of them should hold the mean 1; Student's hold 89 % here, percentiles 84 %.
    rng = np.random.default_rng(3)
    intervals = [bootstrap_interval(rng.exponential(size=8), seed=i) for i in range(400)]
    covered = np.mean([interval.low <= 1 <= interval.high for interval in intervals])
    assert 0.92 <= covered <= 0.98


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(1).normal(size=10)
    left_out = [np.delete(values, i).mean() for i in range(10)]
    interval = jackknife_interval(values.mean(), left_out, [1] * 10)
    expected = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert np.isnan(jackknife_interval(1.0, left_out[: MIN_CLIPS - 1], [1] * (MIN_CLIPS - 1)).low)


def test_the_jackknife_weighs_groups_by_their_sizes():
    """Of a mean, the error is that of the groups' means, where a large group tells more than a small one."""
    values, sizes = np.random.default_rng(1).normal(size=21), [5, 1, 3, 2, 4, 1, 5]
    groups = np.split(np.arange(21), np.cumsum(sizes)[:-1])
    left_out = [np.delete(values, group).mean() for group in groups]
    interval = jackknife_interval(values.mean(), left_out, sizes)
    variances = [
        (values[group].mean() - values.mean()) ** 2 * size / (21 - size) for group, size in zip(groups, sizes)
    ]
    half = stats.t.ppf(0.975, 6) * np.sqrt(np.mean(variances))
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half))


@pytest.mark.parametrize("count", [5, 9])
def test_the_sign_test_agrees_with_scipy(count):
    differences = np.random.default_rng(count).normal(0.4, size=count)
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_test(differences) == pytest.approx(found.pvalue)
    assert sign_test(-differences) == pytest.approx(found.pvalue)
    assert sign_test(7 * differences) == pytest.approx(found.pvalue)


def test_random_signs_agree_with_all_of_them():
    differences = np.random.default_rng(4).normal(0.5, size=16)
    signs = np.array([*itertools.product((-1.0, 1.0), repeat=16)])
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert sign_test(differences) == pytest.approx(exact, abs=0.01)


def test_equal_sources_are_rarely_beyond_chance():
    assert sign_test([0.0] * 8) == 1.0
    rng = np.random.default_rng(5)
    found = [sign_test(rng.standard_t(2, size=8)) <= SIGNIFICANCE for _ in range(400)]
    assert np.mean(found) <= SIGNIFICANCE + 0.03


def test_holm_corrects_step_by_step():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("tests", [1, 9, 30])
def test_the_clips_needed_are_the_fewest_that_can_reach_significance(tests):
    needed = clips_needed(tests)
    p_values = [1.0] * (tests - 1)
    assert holm([sign_test(np.arange(1, needed + 1)), *p_values])[0] <= SIGNIFICANCE
    assert holm([sign_test(np.arange(1, needed)), *p_values])[0] > SIGNIFICANCE
