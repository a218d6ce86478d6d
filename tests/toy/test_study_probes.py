"""Runs of the study predicted from probes."""

import math

import numpy as np
import pytest

from c2r.toy.study_probes import PREDICTED_MEASURES, predict_from_probes, probe_table
from c2r.toy.study_results import MEASURES, Result
from c2r.toy.study_runs import RATIOS


def results_of(probes, wholes):
    """Return results of probes and whole runs, (ratios, seeds) each; nobody probes the last ratio."""
    found = []
    for index, ratio in enumerate(RATIOS):
        for seed in range(probes.shape[1]):
            whole = Result(f"cg {ratio:g}", seed, dict.fromkeys(MEASURES, wholes[index, seed]), seconds=1)
            probe = Result(f"probe cg {ratio:g}", seed, dict.fromkeys(MEASURES, probes[index, seed]), seconds=1)
            found += [whole, probe] if ratio < 1 else [whole]
    return found


def halves(seeds):
    """Return two masks (ratios, seeds) of the fitted and the predicted runs."""
    even = np.add.outer(np.arange(len(RATIOS)), np.arange(seeds)) % 2 == 0
    probed = (np.array(RATIOS) < 1)[:, None]
    return even & probed, ~even & probed


def test_a_line_is_found_exactly():
    probes = np.random.default_rng(1).normal(size=(5, 3))
    wholes = 0.25 + 1.5 * probes
    prediction = predict_from_probes(results_of(probes, wholes), RATIOS, "cg_look")
    fitted, predicted = halves(3)
    assert (prediction.fitted, prediction.predicted) == (6, 6) == (fitted.sum(), predicted.sum())
    np.testing.assert_allclose((prediction.slope, prediction.intercept), (1.5, 0.25))
    assert prediction.error < 1e-12
    guess = np.sqrt(((wholes[predicted] - wholes[fitted].mean()) ** 2).mean())
    np.testing.assert_allclose(prediction.error_of_mean, guess)
    np.testing.assert_allclose(prediction.seed_spread, np.sqrt(wholes[:4].var(1, ddof=1).mean()))


def test_the_line_is_that_of_least_squares_on_the_fitted_half_alone():
    rng = np.random.default_rng(2)
    probes, wholes = rng.normal(size=(2, 5, 4))
    prediction = predict_from_probes(results_of(probes, wholes), RATIOS, "control_gain")
    fitted, predicted = halves(4)
    slope, intercept = np.polyfit(probes[fitted], wholes[fitted], 1)
    np.testing.assert_allclose((prediction.slope, prediction.intercept), (slope, intercept))
    errors = wholes[predicted] - intercept - slope * probes[predicted]
    np.testing.assert_allclose(prediction.error, np.sqrt((errors**2).mean()))


def test_noise_is_predicted_no_better_than_by_the_mean():
    rng = np.random.default_rng(3)
    drawn = [predict_from_probes(results_of(*rng.normal(size=(2, 5, 3))), RATIOS, "cg_look") for _ in range(200)]
    line, mean = (np.mean([getattr(p, name) ** 2 for p in drawn]) for name in ("error", "error_of_mean"))
    assert line > mean
    # The mean of six values of variance 1 has the squared error 1 + 1/6; the seeds have the variance 1.
    assert mean == pytest.approx(7 / 6, abs=0.15)
    assert np.mean([p.seed_spread**2 for p in drawn]) == pytest.approx(1, abs=0.1)


def test_too_few_runs_give_no_prediction():
    probes = np.random.default_rng(4).normal(size=(5, 3))
    results = results_of(probes, 2 * probes)
    assert probe_table(results[:0], RATIOS) is None
    assert probe_table([r for r in results if "probe" not in r.run], RATIOS) is None
    assert probe_table([r for r in results if r.seed == 0], RATIOS) is None  # two runs to fit
    assert probe_table(results_of(np.ones((5, 3)), probes), RATIOS) is None  # equal probes
    without_probe = [r for r in results if r.run != "probe cg 0.5"]
    assert predict_from_probes(without_probe, RATIOS, "loss").fitted == 5
    assert not math.isnan(predict_from_probes(without_probe, RATIOS, "loss").seed_spread)


def test_the_table_has_a_line_for_each_measure():
    probes = np.random.default_rng(5).normal(size=(5, 3))
    lines = probe_table(results_of(probes, 2 * probes - 1), RATIOS).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(PREDICTED_MEASURES)
    assert all("| −1.000 +2.00 · probe | 6 and 6" in line and "| 0.0000 " in line for line in lines[2:])
