"""Intervals of means over clips, and tests of paired differences.

The clip is the unit: the seeds of a clip are averaged before, since they share its scene and prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

#: Confidence of all intervals.
CONFIDENCE = 0.95

#: With fewer clips no interval is given: resamples of five clips often have no spread of their own.
MIN_CLIPS = 6

#: With fewer clips that differ from the most frequent value, no interval is given: their number is mostly chance.
MIN_DIFFERENT = 3

#: Resamples of the bootstrap.
RESAMPLES = 4000

#: Up to this number of clips all patterns of signs are enumerated; above it, this number of random ones is drawn.
MAX_ENUMERATED, RANDOM_SIGNS = 14, 20_000

#: A difference is beyond chance if its p-value, corrected by Holm, is at most this.
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; NaN where none can be given."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    def within(self, bounds: tuple[float, float]) -> "Interval":
        """Return the interval cut to the lowest and the highest value that the mean can have."""
        return Interval(self.mean, *(float(end) for end in np.clip((self.low, self.high), *bounds)))


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean and its studentised bootstrap interval, of confidence CONFIDENCE.

    The distribution of (mean − μ) / error is taken from resamples, each with an error of its own. The percentile
    interval, which has no such error, is too narrow for few clips.

    A resample of equal values has no error: its ratio is infinite, with the sign of the numerator. Leaving it out
    would cut off one tail, since with tied values such resamples lie on one side. A side whose quantile is infinite
    gets Student's bound.

    Args:
        values: (n,), one for each clip, independent.
        seed: of the resamples.

    Returns:
        without bounds for fewer than MIN_CLIPS values, or fewer than MIN_DIFFERENT that are not equal to most; with a
        mean of NaN for no values.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5.
    """
    clips = np.asarray(values, dtype=np.float64)
    count = len(clips)
    if count == 0:
        return Interval(math.nan)
    mean = float(clips.mean())
    if count < MIN_CLIPS or count - np.unique(clips, return_counts=True)[1].max() < MIN_DIFFERENT:
        return Interval(mean)
    error = float(_errors(clips[None])[0])
    drawn = clips[np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))]
    shifts, errors = drawn.mean(1) - mean, _errors(drawn)
    spread = errors > error * 1e-9
    ratios = np.where(shifts > 0, math.inf, np.where(shifts < 0, -math.inf, 0.0))
    ratios[spread] = shifts[spread] / errors[spread]
    ratios.sort()
    rank = int((RESAMPLES + 1) * (1 - CONFIDENCE) / 2)
    bound = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    low, high = (float(ratio) for ratio in (ratios[rank - 1], ratios[-rank]))
    low, high = low if math.isfinite(low) else -bound, high if math.isfinite(high) else bound
    return Interval(mean, mean - high * error, mean - low * error)


def _errors(samples):
    """(B, n) -> (B,): the standard error of each mean."""
    return samples.std(1, ddof=1) / math.sqrt(samples.shape[1])


def jackknife_interval(whole: float, left_out: Sequence[float], sizes: Sequence[int]) -> Interval:
    """Return the interval of a number that belongs to a set of clips as a whole, such as a distance of distributions.

    Resamples repeat clips, which moves such a distance; leaving clips out hardly does.

    Args:
        whole: of all clips.
        left_out: without each of the groups in turn; fewer than MIN_CLIPS give no interval.
        sizes: clips of each group, which may differ.

    Source: the delete-m_j jackknife of Busing, Meijer and van der Leeden 1999 (Statistics and Computing 9); for groups
    of one size it is that of Efron and Tibshirani 1993, section 11.2.
    """
    groups = len(left_out)
    if groups < MIN_CLIPS:
        return Interval(whole)
    without, ratios = np.asarray(left_out, dtype=np.float64), sum(sizes) / np.asarray(sizes)
    pseudo_values = ratios * whole - (ratios - 1) * without
    centre = groups * whole - ((1 - 1 / ratios) * without).sum()
    error = math.sqrt(float(((pseudo_values - centre) ** 2 / (ratios - 1)).mean()))
    half = error * float(student.ppf((1 + CONFIDENCE) / 2, groups - 1))
    return Interval(whole, whole - half, whole + half)


def sign_test(differences: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p-value of the mean of paired differences, by a permutation test.

    If two models do equally well on a clip, its difference is as likely with the other sign. No distribution is
    assumed. The smallest p-value of n clips is 2 / 2ⁿ, see `clips_needed`.

    Args:
        differences: (n,), one for each clip.
        seed: of the random signs of more than MAX_ENUMERATED clips.
    """
    clips = np.asarray(differences, dtype=np.float64)
    count = len(clips)
    if count == 0 or not clips.any():
        return 1.0
    if count <= MAX_ENUMERATED:
        signs = 1.0 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), (RANDOM_SIGNS, count))
        signs[0] = 1  # the observed signs are among the possible ones
    sums = np.abs(signs @ clips)
    return float((sums >= abs(clips.sum()) * (1 - 1e-9)).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: the chance of any false difference is at most SIGNIFICANCE.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = largest
    return corrected


def clips_needed(num_tests: int) -> int:
    """Return the smallest number of clips with which one of so many tests can find a difference beyond chance."""
    return math.ceil(math.log2(2 * num_tests / SIGNIFICANCE))
