"""Figures of the control's projection on held-out files: accuracies of probes, and agreement between looks."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student

from c2r import InputError
from c2r.evaluation.discriminants import FOLDS, Scorer, fit_probe, fit_probes, folds_of
from c2r.models.control_projection import FIT, Certificate, Figure, coordinates_of, orthonormal

#: Ridge penalties of the probes, see `fit_probes`, and the features of one more probe, those whose means differ most.
#: The best probe on folds of files counts: with one penalty for all, a probe of many directions would fit the clips,
#: and miss what is plain in one of them.
RIDGES, NUM_SCREENED = (0.001, 0.03, 1.0), 16
#: Confidence of the intervals.
CONFIDENCE = 0.9

# The kinds of pairs, each with the names of its two looks. A clip without a coarse version has no pair of the last.
ALTERED, PAIR, COARSE = "real and altered", "coarse and fine", "real and coarse"


class Pair(NamedTuple):
    """Features of the same places of one clip in two looks, (frames, places, Dd)."""

    file: str
    one: torch.Tensor
    other: torch.Tensor


Pairs = dict[str, list[Pair]]  # {kind: one for each clip}


class _Classes(NamedTuple):
    """Clips of two classes that a probe tells apart: (rows, k) of each clip, and its file."""

    rows: tuple[list[torch.Tensor], list[torch.Tensor]]
    files: tuple[list[str], list[str]]


def figures_of(
    mean: torch.Tensor, directions: torch.Tensor, numbers: Sequence[int], chosen_by: Pairs, held_out: Pairs
) -> dict[int | None, Certificate]:
    """Return the certificate of each number of directions, and of the features as they are as that of None.

    Args:
        mean, directions: (Dd,) and (n, Dd), see `LookScatter.solve`.
        numbers: of directions, rising.
        chosen_by: pairs that the probes are fitted on.
        held_out: pairs of other files.
    """
    agreements = agreement(projected(held_out, mean, directions))
    coordinates = [projected(pairs, mean, orthonormal(directions)) for pairs in (chosen_by, held_out)]
    certificates: dict[int | None, Certificate] = {}
    below: Certificate | None = None
    for number in (*numbers, None):
        samples = [chosen_by, held_out] if number is None else [_first(pairs, number) for pairs in coordinates]
        certificate = certificates[number] = certify(samples[0], samples[1], min(agreements[:number]))
        # Directions hold those of fewer, and the features as they are hold all: what a probe finds there is here too.
        if below is not None:
            for name in ("cg_or_real", "cg_or_real_clip", "look"):
                certificate[name] = max(certificate[name], below[name])
        below = certificate
    return certificates


def projected(pairs: Pairs, mean: torch.Tensor, directions: torch.Tensor) -> Pairs:
    """Return the pairs with their coordinates, see `coordinates_of`, in place of their features."""
    return {
        kind: [Pair(p.file, *(coordinates_of(look, mean, directions) for look in (p.one, p.other))) for p in of_kind]
        for kind, of_kind in pairs.items()
    }


def _first(pairs, number):
    return {
        kind: [Pair(p.file, p.one[..., :number], p.other[..., :number]) for p in of_kind]
        for kind, of_kind in pairs.items()
    }


def agreement(pairs: Pairs) -> list[Figure]:
    """Return for each feature the correlation of a place in one look with itself in another, at least 0.

    It is the share of the feature's variance between places of a frame that both looks have in common; what a whole
    frame has in both looks, such as fog, is no agreement. Of the kinds of looks the one that agrees least counts.
    Altered frames are left out: fine detail of a blurred frame does not agree with its original, and no such frame is
    a look that the model could copy.
    """
    of_kinds = [_agreement(of_kind) for kind, of_kind in pairs.items() if kind != ALTERED]
    return [min(figures) for figures in zip(*of_kinds)]


def _agreement(pairs):
    files, *looks = zip(*pairs)
    one, other = (_standardised([_within_frames(features) for features in look]) for look in looks)
    products = torch.stack([(a * b).mean(0) for a, b in zip(one, other)])  # (clips, k)
    return [_figure([_file_means(of_feature.tolist(), files)]) for of_feature in products.T]


def _within_frames(features):
    """Return features (frames, places, k) less their mean over the frame, as rows."""
    return (features - features.mean(1, keepdim=True)).flatten(0, 1).double()


def _standardised(rows):
    """Divide the rows (n, k) of each clip, whose mean is 0, by the deviation over all clips."""
    deviation = torch.cat(rows).square().mean(0).sqrt()
    return [x / deviation.clamp(min=1e-12) for x in rows]


def certify(chosen_by: Pairs, held_out: Pairs, least_agreement: Figure) -> Certificate:
    """Return the figures of features on held-out files.

    Args:
        chosen_by: pairs that the probes are fitted on.
        held_out: pairs of other files.
        least_agreement: of the directions of the features.
    """
    kinds = [kind for kind, pairs in chosen_by.items() if _num_files(pairs) > 1 and held_out.get(kind)]
    require_pairs(kinds)
    return Certificate(
        cg_or_real=_probe(*(_domains(pairs, _of_places) for pairs in (chosen_by, held_out))),
        cg_or_real_clip=_probe(*(_domains(pairs, _of_clip) for pairs in (chosen_by, held_out))),
        look=max(_probe(*(_looks(pairs[kind]) for pairs in (chosen_by, held_out))) for kind in kinds),
        place=_place_figure([pair for kind in kinds for pair in held_out[kind]]),
        agreement=least_agreement,
    )


def require_pairs(kinds: Iterable[str]):
    """Raise InputError if pairs of a kind are missing that every run has."""
    if not {ALTERED, PAIR} <= set(kinds):
        raise InputError(
            f"--control_projection {FIT}: too few clips could be read; restore the files that are named above"
        )


def _num_files(pairs):
    return len({pair.file for pair in pairs})


def _of_places(look):
    """Return the features of (frames, places, k) and their squares, which see what equal means hide: texture."""
    rows = look.flatten(0, 1).double()
    return torch.cat([rows, rows.square()], 1)


def _of_clip(look):
    return _of_places(look).mean(0, keepdim=True)


def _domains(pairs, rows_of):
    """Return coarse controls and real clips: the first look of each is what the control branch sees in training."""
    kinds = [pairs[kind] for kind in (ALTERED, PAIR)]
    return _Classes(
        tuple([rows_of(pair.one) for pair in of_kind] for of_kind in kinds),
        tuple([pair.file for pair in of_kind] for of_kind in kinds),
    )


def _looks(pairs):
    files = [pair.file for pair in pairs]
    return _Classes(([_of_places(p.one) for p in pairs], [_of_places(p.other) for p in pairs]), (files, files))


def _probe(train: _Classes, held_out: _Classes) -> Figure:
    """Return the held-out accuracy of the probe that is best on folds of the files that it is fitted on."""
    by_class = list(zip(train.rows, (folds_of(files).tolist() for files in train.files)))
    right: list[list[list[float]]] = []  # of each clip: by probe and class
    for fold in range(FOLDS):
        inside, outside = (
            [[x for x, n in zip(rows, folds) if (n == fold) == is_inside] for rows, folds in by_class]
            for is_inside in (True, False)
        )
        scorers = fit_all_probes(*map(torch.cat, outside)) if any(inside) else []
        right = right or [[[], []] for _ in scorers]
        for number, scorer in enumerate(scorers):
            for c in (0, 1):
                right[number][c] += [_right(scorer, x, c) for x in inside[c]]
    accuracies = [sum(float(np.mean(of_class)) for of_class in of_probe) / 2 for of_probe in right]
    best = accuracies.index(max(accuracies))
    scorer = fit_all_probes(*map(torch.cat, train.rows))[best]
    held_out_right = [
        _file_means([_right(scorer, x, c) for x in rows], files)
        for c, (rows, files) in enumerate(zip(held_out.rows, held_out.files))
    ]
    return _figure(held_out_right, paired=held_out.files[0] == held_out.files[1])


def fit_all_probes(zero: torch.Tensor, one: torch.Tensor) -> list[Scorer]:
    """Fit each kind of probe on two classes, (n, k) and (m, k)."""
    spread = torch.cat([zero - zero.mean(0), one - one.mean(0)]).square().mean(0).sqrt() + 1e-9
    differences = (zero.mean(0) - one.mean(0)).abs() / spread
    chosen = differences.topk(min(NUM_SCREENED, len(differences))).indices
    screened = fit_probe(zero[:, chosen], one[:, chosen])
    return [*fit_probes(zero, one, RIDGES), lambda rows: screened(rows[:, chosen])]


def _right(scorer: Scorer, rows: torch.Tensor, number: int) -> float:
    """Return the share of rows of class 0 or 1 that are on its side; a score of 0.5 counts half."""
    scores = scorer(rows)
    right = scores > 0.5 if number else scores < 0.5
    return float((right.double() + 0.5 * (scores == 0.5)).mean())


def _place_figure(pairs):
    right = [place_accuracy(pair.one, pair.other) for pair in pairs]
    return _figure([_file_means(right, [pair.file for pair in pairs])])


def place_accuracy(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how often a place in one look is nearer to itself in the other look than another place of its frame is.

    Args:
        one, other: (frames, places, k), two looks in the same order. The other place is the next one in the order.

    Returns:
        share of places; a tie counts half, 0.5 is chance.
    """
    own = (one - other).double().square().sum(-1)
    wrong = (one - other.roll(1, 1)).double().square().sum(-1)
    return float(((own < wrong).double() + 0.5 * (own == wrong)).mean())


def _file_means(values, files):
    by_file = defaultdict(list)
    for value, file in zip(values, files):
        by_file[file].append(value)
    return np.array([np.mean(of_file) for of_file in by_file.values()])


def _figure(values: Sequence[np.ndarray], paired: bool = False) -> Figure:
    """Return the mean of the classes' accuracies, or of correlations, with its t interval over files.

    Args:
        values: (files,) of each class.
        paired: the classes are two looks of the same files.
    """
    if paired:
        values = [np.mean(values, axis=0)]
    mean = float(np.mean([of_class.mean() for of_class in values]))
    half = 1.0
    if min(map(len, values)) > 1:
        error = np.sqrt(sum(x.var(ddof=1) / len(x) for x in values)) / len(values)
        half = float(error * student.ppf((1 + CONFIDENCE) / 2, min(map(len, values)) - 1))
    return Figure(*(min(1.0, max(0.0, value)) for value in (mean, mean - half, mean + half)))
