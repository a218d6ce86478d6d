"""Measure how often the intervals of c2r.evaluate hold the true mean, and how often equal sources differ by chance.

    python -m benchmarks.interval_coverage

Values of clips are drawn from known distributions, some with ties. The percentile bootstrap and Student's interval
stand beside the interval of an evaluation for comparison. Nearly equal values have no interval: `given` is the share
of the draws that have one, of which the coverage is computed. An interval of 95 % should cover 95 %, and a test at
0.05 find at most 5 %.
"""

import math

import numpy as np
from scipy import stats

from c2r.scoring.statistics import CONFIDENCE, SIGNIFICANCE, bootstrap_interval, sign_test

REPEATS = 1000
COUNTS = (6, 8, 16, 32)
#: {name: (draws n values, their mean)}
VALUES = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "beta(8, 2)": (lambda rng, n: rng.beta(8, 2, n), 0.8),
    "Bernoulli(0.8)": (lambda rng, n: (rng.random(n) < 0.8).astype(float), 0.8),
    "70 % zeros": (lambda rng, n: np.where(rng.random(n) < 0.7, 0.0, rng.exponential(size=n)), 0.3),
}
#: {name: draws n paired differences, as likely with the other sign}
DIFFERENCES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "Student, 2 degrees": lambda rng, n: rng.standard_t(2, size=n),
    "ones": lambda rng, n: rng.choice((-1.0, 1.0), n),
}


def percentile_interval(values, seed):
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))]
    return np.quantile(drawn.mean(1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))


def main():
    rng = np.random.default_rng(0)
    print(f"{'clips':>5}  {'values':14}  given  evaluation  percentile  Student")
    for count in COUNTS:
        for name, (draw, mean) in VALUES.items():
            covered, given = np.zeros(3), 0
            for seed in range(REPEATS):
                values = draw(rng, count)
                own = bootstrap_interval(values, seed)
                if math.isnan(own.low):
                    continue
                given += 1
                student = stats.t.interval(CONFIDENCE, count - 1, values.mean(), stats.sem(values))
                bounds = ((own.low, own.high), percentile_interval(values, seed), student)
                covered += [low <= mean <= high for low, high in bounds]
            own, percentile, student = covered / given
            print(f"{count:5}  {name:14}  {given / REPEATS:5.2f}  {own:10.3f}  {percentile:10.3f}  {student:7.3f}")
    print(f"\n{'clips':>5}  {'differences':20}  found at {SIGNIFICANCE}")
    for count in COUNTS:
        for name, draw in DIFFERENCES.items():
            found = np.mean([sign_test(draw(rng, count), seed) <= SIGNIFICANCE for seed in range(300)])
            print(f"{count:5}  {name:20}  {found:.3f}")


if __name__ == "__main__":
    main()
