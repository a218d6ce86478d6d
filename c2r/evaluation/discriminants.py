"""Scores fitted on features of real and of CG clips: 0 = like the real clips, 1 = like the CG clips."""

from collections.abc import Callable, Sequence
from math import nan

import torch

FOLDS = 5

#: Ridge penalty of the probe, relative to the mean squared length of a standardised feature vector.
RIDGE = 0.03

#: A difference of means counts only as far as it exceeds this number of its standard errors.
SHRINKAGE = 1.0

#: Largest distance of the two means that is credited to a feature, in standard deviations within the sets.
MAX_DEVIATIONS = 3.0

#: (l, k) features -> (l,) scores
Scorer = Callable[[torch.Tensor], torch.Tensor]


# w = max(0, Δ − s·e) / v, with Δ the difference of the means, e its standard error, v the variance within the sets
def fit_discriminant(real: torch.Tensor, cg: torch.Tensor) -> Scorer:
    """Fit a diagonal linear discriminant whose features are all known to rise with the CG look.

    A feature that falls, or that rises by chance, gets no weight.

    Args:
        real, cg: (n, k) and (m, k).

    Returns:
        scorer whose mean is 0 for `real` and 1 for `cg`; NaN if no feature rises.

    Source of the shrinkage: Tibshirani et al. 2002, Diagnosis of multiple cancer types by shrunken centroids.
    """
    variance = (real.var(0) * (len(real) - 1) + cg.var(0) * (len(cg) - 1)) / (len(real) + len(cg) - 2)
    difference = cg.mean(0) - real.mean(0)
    error = (variance * (1 / len(real) + 1 / len(cg))).sqrt()
    weights = (difference - SHRINKAGE * error).clamp(min=0)
    # Without a bound, a feature that hardly varies within the sets, such as digital black, would outweigh all others.
    weights = weights / torch.maximum(variance, (difference / MAX_DEVIATIONS) ** 2).clamp(min=1e-12)
    zero, one = real.mean(0) @ weights, cg.mean(0) @ weights
    return lambda clips: (clips @ weights - zero) / (one - zero)  # 0 / 0 if all weights are 0


# w = Xᵀ (X Xᵀ + λ)⁻¹ y, solved among the clips, since there are fewer clips than features
def fit_probe(real: torch.Tensor, cg: torch.Tensor) -> Scorer:
    """Fit a ridge regression of standardised features on 0 for `real` and 1 for `cg`; both sets weigh the same.

    Args:
        real, cg: (n, k) and (m, k).

    Returns:
        scorer. Its values are shrunken towards 0.5, and too good for the clips that it was fitted on.
    """
    clips = torch.cat([real, cg]).double()
    labels = torch.cat([-torch.ones(len(real)), torch.ones(len(cg))]).double()
    centre = (real.mean(0) + cg.mean(0)).double() / 2
    scale = (clips - centre).square().mean(0).sqrt() + 1e-6
    root = torch.cat([torch.full((len(x),), len(x) ** -0.5) for x in (real, cg)]).double()
    rows = (clips - centre) / scale * root[:, None]
    products = rows @ rows.T
    penalty = RIDGE * products.trace() * torch.eye(len(rows), dtype=torch.float64)
    weights = rows.T @ torch.linalg.solve(products + penalty / len(rows), labels * root)
    return lambda x: (((x.double() - centre) / scale) @ weights / 2 + 0.5).float()


def rescale(scorer: Scorer, held_out_real: torch.Tensor, held_out_cg: torch.Tensor) -> Scorer:
    """Rescale a scorer so that the means of its held-out scores become 0 and 1; NaN if they are in the wrong order."""
    zero, one = held_out_real.mean(), held_out_cg.mean()
    return lambda clips: (scorer(clips) - zero) / (one - zero if one > zero else nan)


def folds_of(files: Sequence[str]) -> torch.Tensor:
    """Return the fold of each clip, (n,). The clips of one file are in one fold; there are at most FOLDS folds."""
    names = sorted(set(files))
    return torch.tensor([names.index(file) % min(FOLDS, len(names)) for file in files])


def held_out_scores(
    fit: Callable[[torch.Tensor, torch.Tensor], Scorer],
    real: torch.Tensor,
    cg: torch.Tensor,
    real_folds: torch.Tensor,
    cg_folds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score each clip by a scorer that was fitted without the clips of its fold: (n,) and (m,)."""
    real_scores, cg_scores = torch.empty(len(real)), torch.empty(len(cg))
    for fold in range(FOLDS):
        scorer = fit(real[real_folds != fold], cg[cg_folds != fold])
        real_scores[real_folds == fold] = scorer(real[real_folds == fold])
        cg_scores[cg_folds == fold] = scorer(cg[cg_folds == fold])
    return real_scores, cg_scores


def accuracy_of(real_scores: torch.Tensor, cg_scores: torch.Tensor) -> float:
    """Return the share of scores on the right side of 0.5, the mean over both sets. NaN counts as half right."""
    correct = (
        (real_scores < 0.5) + 0.5 * real_scores.isnan(),
        (cg_scores > 0.5) + 0.5 * cg_scores.isnan(),
    )
    return sum(values.float().mean().item() for values in correct) / 2
