"""Figures of the control's projection: what probes tell on held-out files, by features that the branch sees."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student

from c2r import InputError
from c2r.evaluation.discriminants import FOLDS, Scorer, fit_probe, fit_probes, folds_of
from c2r.models.control_projection import FIT, Certificate, Figure, project

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


def figures_of(mean, directions, numbers, chosen_by: Pairs, held_out: Pairs):
    """Return {number of directions or None for the features as they are: certificate} and {…: worst accuracy}."""

    def projected(pairs):
        return {
            kind: [Pair(p.file, *(project(look, mean, directions) for look in (p.one, p.other))) for p in of_kind]
            for kind, of_kind in pairs.items()
        }

    coordinates = projected(chosen_by), projected(held_out)
    certificates: dict[int | None, Certificate] = {}
    worst: dict[int | None, float] = {}
    for number in (None, *numbers):
        samples = (chosen_by, held_out) if number is None else (_first(pairs, number) for pairs in coordinates)
        certificates[number], worst[number] = certify(*samples)
    # Directions hold those of fewer, and the features as they are hold all: what a probe finds there is here too.
    below, found = None, 0.0
    for number in (*numbers, None):
        found = worst[number] = max(worst[number], found)
        if below is not None:
            for name in ("cg_or_real", "cg_or_real_clip", "look"):
                certificates[number][name] = max(certificates[number][name], below[name])
        below = certificates[number]
    return certificates, worst


def _first(pairs, number):
    return {
        kind: [Pair(p.file, p.one[..., :number], p.other[..., :number]) for p in of_kind]
        for kind, of_kind in pairs.items()
    }


def certify(chosen_by: Pairs, held_out: Pairs) -> tuple[Certificate, float]:
    """Return the figures on held-out files, and the highest accuracy of a probe on folds of the other files.

    That accuracy leaves altered frames out: any feature of fine detail tells a blurred or posterised frame from its
    original, and no such frame is a look that the model could copy. The certificate's `look` has them.

    Args:
        chosen_by: pairs that the probes are fitted on.
        held_out: pairs of other files.
    """
    kinds = [kind for kind, pairs in chosen_by.items() if _num_files(pairs) > 1 and held_out.get(kind)]
    if not {ALTERED, PAIR} <= set(kinds):
        raise InputError(
            f"--control_projection {FIT}: too few clips could be read; restore the files that are named above"
        )
    place, place_worst = _probe(*(_domains(pairs, _of_places) for pairs in (chosen_by, held_out)))
    clip, clip_worst = _probe(*(_domains(pairs, _of_clip) for pairs in (chosen_by, held_out)))
    looks = {kind: _probe(*(_looks(pairs[kind]) for pairs in (chosen_by, held_out))) for kind in kinds}
    num_clips = min(len(chosen_by[kind]) for kind in (ALTERED, PAIR))
    # Accuracies of few clips are coarse: a whole clip's counts only where it is beyond chance, at a level of 5 %.
    if clip_worst < 0.5 + 1.645 * 0.5 / (2 * num_clips) ** 0.5:
        clip_worst = 0.5
    certificate = Certificate(
        cg_or_real=place,
        cg_or_real_clip=clip,
        look=max(figure for figure, _ in looks.values()),
        place=_place_figure([pair for kind in kinds for pair in held_out[kind]]),
    )
    return certificate, max(place_worst, clip_worst, *(looks[kind][1] for kind in kinds if kind != ALTERED))


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


def _probe(train: _Classes, held_out: _Classes) -> tuple[Figure, float]:
    """Return the held-out accuracy of the best probe, and that on folds of the files that it is fitted on."""
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
    return _figure(held_out_right, paired=held_out.files[0] == held_out.files[1]), accuracies[best]


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


def _figure(accuracies: Sequence[np.ndarray], paired: bool = False) -> Figure:
    """Return the mean of the classes' accuracies with its t interval over files.

    Args:
        accuracies: (files,) of each class.
        paired: the classes are two looks of the same files.
    """
    if paired:
        accuracies = [np.mean(accuracies, axis=0)]
    mean = float(np.mean([of_class.mean() for of_class in accuracies]))
    if min(map(len, accuracies)) < 2:
        return Figure(mean)
    error = np.sqrt(sum(x.var(ddof=1) / len(x) for x in accuracies)) / len(accuracies)
    half = float(error * student.ppf((1 + CONFIDENCE) / 2, min(map(len, accuracies)) - 1))
    return Figure(mean, max(0.0, mean - half), min(1.0, mean + half))
