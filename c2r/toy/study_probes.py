"""Predict a run of the study from its probe: can a short run tell the right share of CG?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import StatisticsError, fmean, linear_regression, variance

from c2r.toy.study_results import Result, markdown_table, values_of

PREDICTED_MEASURES = ("cg_look", "control_gain")
#: With fewer runs to fit to there is no analysis: a line through two points fits any noise.
MIN_FITTED = 3


@dataclass(frozen=True)
class Prediction:
    """The errors of probes that predict a measure of the whole runs.

    Attributes:
        measure: one of `PREDICTED_MEASURES`.
        slope, intercept: whole run = intercept + slope · probe.
        fitted, predicted: numbers of pairs of a probe and its whole run.
        error: root mean square error of the line on the predicted runs.
        error_of_mean: the same of the simplest guess, the mean of the fitted whole runs.
        seed_spread: standard deviation of whole runs of one ratio over seeds; NaN if no ratio has two. An error
            above it comes from more than chance of the seed.
    """

    measure: str
    slope: float
    intercept: float
    fitted: int
    predicted: int
    error: float
    error_of_mean: float
    seed_spread: float


def predict_from_probes(results: Sequence[Result], ratios: Sequence[float], measure: str) -> Prediction | None:
    """Fit a line on half of the pairs of a probe and its whole run, and predict the whole runs of the other half.

    A pair is in the fitted half if the sum of its ratio's index and its seed is even: both halves then have all
    ratios, and all seeds.

    Args:
        results: of the finished runs.
        ratios: the shares of CG; those without a probe are left out.
        measure: one of `MEASURES`.

    Returns:
        None if there are fewer than MIN_FITTED pairs to fit, none to predict, or only equal probes.
    """
    values = {(result.run, result.seed): result.values[measure] for result in results}
    halves: tuple[list[tuple[float, float]], ...] = ([], [])
    spreads = []
    for index, ratio in enumerate(ratios):
        for seed in sorted({result.seed for result in results}):
            probe, whole = values.get((f"probe cg {ratio:g}", seed)), values.get((f"cg {ratio:g}", seed))
            if probe is not None and whole is not None:
                halves[(index + seed) % 2].append((probe, whole))
        of_seeds = values_of(results, f"cg {ratio:g}", measure)
        if len(of_seeds) > 1 and values_of(results, f"probe cg {ratio:g}", measure):
            spreads.append(variance(of_seeds))
    fitted, predicted = halves
    if len(fitted) < MIN_FITTED or not predicted:
        return None
    try:
        slope, intercept = linear_regression(*zip(*fitted))
    except StatisticsError:  # all probes are equal
        return None
    mean = fmean(whole for _, whole in fitted)
    return Prediction(
        measure,
        slope,
        intercept,
        len(fitted),
        len(predicted),
        error=_root_mean_square(whole - intercept - slope * probe for probe, whole in predicted),
        error_of_mean=_root_mean_square(whole - mean for _, whole in predicted),
        seed_spread=math.sqrt(fmean(spreads)) if spreads else math.nan,
    )


def _root_mean_square(errors):
    return math.sqrt(fmean(error**2 for error in errors))


def probe_table(results: Sequence[Result], ratios: Sequence[float]) -> str | None:
    """Return a Markdown table of how well probes predict whole runs; None if there are too few runs."""
    found = [predict_from_probes(results, ratios, measure) for measure in PREDICTED_MEASURES]
    rows = [
        [
            prediction.measure,
            f"{prediction.intercept:.3f} {prediction.slope:+.2f} · probe".replace("-", "−"),
            f"{prediction.fitted} and {prediction.predicted}",
            *(f"{x:.4f}" for x in (prediction.error, prediction.error_of_mean, prediction.seed_spread)),
        ]
        for prediction in found
        if prediction is not None
    ]
    titles = ["measure", "line", "fitted and predicted runs", "error of the line", "error of the mean", "seed spread"]
    return markdown_table(titles, rows) if rows else None
