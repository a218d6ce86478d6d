"""Scores fitted on features of real and of CG clips: 0 = like the real clips, 1 = like the CG clips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

import torch

FOLDS = 5

#: Permutations that an accuracy must exceed: it does by chance in 1 of 80 cases.
PERMUTATIONS = 79

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


@dataclass(frozen=True)
class HeldOut:
    """Scores of clips by scorers that were fitted without the clips of their files' fold: (n,) and (m,)."""

    real: torch.Tensor
    cg: torch.Tensor

    @property
    def accuracy(self) -> float:
        """The share of scores on the right side of 0.5, the mean over both sets. NaN counts as half right."""
        correct = (
            (self.real < 0.5) + 0.5 * self.real.isnan(),
            (self.cg > 0.5) + 0.5 * self.cg.isnan(),
        )
        return sum(values.float().mean().item() for values in correct) / 2

    def rescale(self, scorer: Scorer) -> Scorer:
        """Rescale a scorer so that the means of these scores become 0 and 1; NaN if they are in the wrong order.

        Its values for the clips that it was fitted on are too good to place other clips by.
        """
        zero, one = self.real.mean(), self.cg.mean()
        return lambda clips: (scorer(clips) - zero) / (one - zero if one > zero else nan)

    def rescaled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of both sets, rescaled."""
        scorer = self.rescale(lambda scores: scores)
        return scorer(self.real), scorer(self.cg)


def folds_of(files: Sequence[str]) -> torch.Tensor:
    """Return the fold of each clip, (n,). The clips of one file are in one fold; there are at most FOLDS folds."""
    names = sorted(set(files))
    return torch.tensor([names.index(file) % min(FOLDS, len(names)) for file in files])


def cross_validate(
    fit: Callable[[torch.Tensor, torch.Tensor], Scorer],
    real: torch.Tensor,
    cg: torch.Tensor,
    real_files: Sequence[str],
    cg_files: Sequence[str],
) -> HeldOut:
    """Score each clip by a scorer that was fitted without the clips of its fold.

    Args:
        fit: `fit_discriminant` or `fit_probe`.
        real, cg: (n, k) and (m, k).
        real_files, cg_files: the file of each clip. The clips of one file are in one fold; there are at most FOLDS.
    """
    real_folds, cg_folds = folds_of(real_files), folds_of(cg_files)
    real_scores, cg_scores = torch.empty(len(real)), torch.empty(len(cg))
    for fold in range(FOLDS):
        scorer = fit(real[real_folds != fold], cg[cg_folds != fold])
        real_scores[real_folds == fold] = scorer(real[real_folds == fold])
        cg_scores[cg_folds == fold] = scorer(cg[cg_folds == fold])
    return HeldOut(real_scores, cg_scores)


def exceeds_chance(
    accuracy: float,
    fit: Callable[[torch.Tensor, torch.Tensor], Scorer],
    real: torch.Tensor,
    cg: torch.Tensor,
    real_files: Sequence[str],
    cg_files: Sequence[str],
) -> bool:
    """Return True if no permutation of the files reaches this accuracy: a test at level 1 / (PERMUTATIONS + 1).

    Whole files change their domain. The same files are permuted in the same way each time.

    Args:
        accuracy: the held-out accuracy.
        fit, real, cg, real_files, cg_files: see `cross_validate`.
    """
    clips = torch.cat([real, cg])
    files = [f"real {file}" for file in real_files] + [f"cg {file}" for file in cg_files]
    names = sorted(set(files))
    num_real = len(set(real_files))
    generator = torch.Generator().manual_seed(0)
    for _ in range(PERMUTATIONS):
        chosen = {names[i] for i in torch.randperm(len(names), generator=generator)[:num_real].tolist()}
        rows = [[i for i, file in enumerate(files) if (file in chosen) == is_real] for is_real in (True, False)]
        (first, second), names_of = (clips[r] for r in rows), [[files[i] for i in r] for r in rows]
        if cross_validate(fit, first, second, *names_of).accuracy >= accuracy:
            return False
    return True


def file_means(values: torch.Tensor, files: Sequence[str]) -> torch.Tensor:
    """Return the mean of the (n,) values of each file's clips, in the order of the files' names."""
    rows = [[i for i, other in enumerate(files) if other == file] for file in sorted(set(files))]
    return torch.stack([values[r].mean() for r in rows])
