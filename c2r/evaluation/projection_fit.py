"""Fit the control's projection on a run's clips: pairs of looks of one place, and figures on held-out files.

Three sets of files: the directions are fitted on one half of the training files, their number is chosen on the other
half, and the held-out files, which neither has seen, give the certificate.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import t as student

from c2r import InputError
from c2r.bars import progress_bar
from c2r.data.clips import Clip
from c2r.data.mixture import Mixture
from c2r.data.settings import ClipSettings
from c2r.data.video_info import UnusableVideo
from c2r.data.workers import Heartbeat
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.discriminants import FOLDS, Scorer, fit_probe, fit_probes, folds_of
from c2r.models.control_projection import (
    FIT,
    MAX_DIRECTIONS,
    Certificate,
    Figure,
    FittedProjection,
    LookScatter,
    load_projection,
    project,
    save_projection,
)
from c2r.training.augmentation import augment_control_frames
from c2r.training.failing_together import failing_together
from c2r.training.seeds import seeded_generator

logger = logging.getLogger(__name__)

#: The file in a run's folder.
FILE = "control_projection.safetensors"
#: The sample: clips of a domain to fit and choose on, and held-out ones; frames of a clip; places of a frame.
NUM_TRAIN, NUM_HELD_OUT, NUM_FRAMES, NUM_PLACES = 96, 32, 4, 64
#: Places of a look, on which probes are fitted.
NUM_PROBED = 1000
#: Training files of a domain that are needed, and files of each set below which the figures are worth little.
MIN_FILES, FEW_FILES = 4, 8
#: The largest number of directions is taken up to which a probe's accuracy in telling CG from real, and two rendered
#: looks, is at most this.
MAX_ACCURACY = 0.6
#: Ridge penalties of the probes, see `fit_probes`, and the features of one more probe, those whose means differ most.
#: The best probe on folds of files counts: with one penalty for all, a probe of many directions would fit the clips,
#: and miss what is plain in one of them.
RIDGES, NUM_SCREENED = (0.001, 0.03, 1.0), 16
#: Confidence of the intervals.
CONFIDENCE = 0.9

#: (F, 3, H, W) in [0, 1] -> (F, places, Dd)
Features = Callable[[torch.Tensor], torch.Tensor]

# The kinds of pairs, each with the names of its two looks. A clip without a coarse version has no pair of the last.
ALTERED, PAIR, COARSE = "real and altered", "coarse and fine", "real and coarse"


class Pair(NamedTuple):
    """Features of the same places of one clip in two looks, (frames, places, Dd)."""

    file: str
    one: torch.Tensor
    other: torch.Tensor


Pairs = dict[str, list[Pair]]  # {kind: one for each clip}


def obtain_projection(
    given: str,
    output_dir: str | Path,
    feature_dim: int,
    num_directions: int | None,
    fit: Callable[[], FittedProjection],
    accelerator: Accelerator,
    watchdog: Heartbeat,
) -> FittedProjection:
    """Return the projection that a run starts with. Call it on every process; the main one fits it.

    Args:
        given: FIT, or a file.
        output_dir: the run's folder, which gets FILE: it also serves other runs.
        feature_dim: Dd.
        num_directions: of a file, replaces the number that it names.
        fit: fits a projection.
        accelerator, watchdog: of the run.

    Raises:
        InputError: it cannot be fitted, or the file is none for this DINOv3 or has no figures for this number.
    """
    path = Path(output_dir) / FILE
    projection, failure = None, None
    if accelerator.is_main_process:
        try:
            projection = fit() if given == FIT else load_projection(given, feature_dim, num_directions)
        except InputError as error:
            failure = error
    watchdog.wait_for_everyone()  # for any time, as long as the fit beats
    with failing_together(accelerator, path):
        if failure is not None:
            raise failure
        if projection is not None:
            save_projection(path, projection)
    with failing_together(accelerator, path):
        return load_projection(path, feature_dim)


def fit_projection(
    real: Mixture,
    cg: Mixture,
    settings: ClipSettings,
    features: Features,
    seed: int,
    dinov3: str,
    num_directions: int | None,
    watchdog: Heartbeat,
) -> FittedProjection:
    """Fit a projection on training clips, choose its number of directions, and log the figures.

    A clip that cannot be decoded is skipped and named.

    Args:
        real, cg: the run's mixtures.
        settings: the settings that the clips are cut with.
        features: DINOv3 on frames.
        seed: of the alterations and the choice of places.
        dinov3: its fingerprint.
        num_directions: to use; None: chosen by the figures.
        watchdog: gets a beat for each clip.

    Raises:
        InputError: a domain has too few files, the features do not vary, or the projection has fewer directions.
    """
    sets = _split_by_file(real, cg)
    read = _PairReader(settings, features, seed, watchdog)
    total = sum(len(clips) for domains in sets.values() for clips in domains.values())
    with progress_bar(total, "fitting the control's projection", "clip", shown=True) as bar:
        scatter: LookScatter | None = None
        for kind, pair in read.pairs(sets["fit"], NUM_PLACES, bar.update):
            scatter = scatter or LookScatter(pair.one.shape[-1])
            scatter.add(kind, pair.one, pair.other)
        chosen_by, held_out = (read.collect(sets[name], bar.update) for name in ("choice", "held out"))
    with watchdog.unjudged():
        try:
            if scatter is None:
                raise ValueError("no clip could be read")
            mean, directions = scatter.solve()
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise InputError(
                f"--control_projection {FIT}: cannot be fitted on the features of {real.name} and {cg.name}: "
                f"{error}; check --dinov3 and the videos"
            ) from error
        mean, directions = mean.float(), directions[:MAX_DIRECTIONS].float()
        numbers = numbers_to_try(len(directions), num_directions)
        figures, worst = _figures_of(mean, directions, numbers, chosen_by, held_out)
        unprojected, _ = figures.pop(None), worst.pop(None)
        used = num_directions or choose_number(worst)
        _log_figures(unprojected, figures, worst, used, num_directions)
    datasets = [dataset.folder for mixture in (real, cg) for dataset in mixture.datasets]
    return FittedProjection(mean, directions, used, figures, unprojected, dinov3, datasets)


def _split_by_file(real: Mixture, cg: Mixture) -> dict[str, dict[str, list[Clip]]]:
    """Return the clips of each domain to fit and to choose on, every second file each, and held-out ones."""
    sets: dict[str, dict[str, list[Clip]]] = {"fit": {}, "choice": {}, "held out": {}}
    for domain, mixture in (("real", real), ("cg", cg)):
        train, held_out = (
            list(clips.first_windows(count))
            for clips, count in ((mixture.train, NUM_TRAIN), (mixture.held_out, NUM_HELD_OUT))
        )
        files = list(dict.fromkeys(map(_file_of, train)))
        if len(files) < MIN_FILES or not held_out:
            raise InputError(
                f"--control_projection {FIT}: {mixture.name} has {len(files)} {domain} files to train on and "
                f"{len(held_out)} held-out clips, but {MIN_FILES} and 1 are needed; add some, or give the file of "
                "another run"
            )
        to_choose = set(files[1::2])
        sets["fit"][domain] = [clip for clip in train if _file_of(clip) not in to_choose]
        sets["choice"][domain] = [clip for clip in train if _file_of(clip) in to_choose]
        sets["held out"][domain] = held_out
    for name, domains in sets.items():
        fewest = min(len(set(map(_file_of, clips))) for clips in domains.values())
        if name != "fit" and fewest < FEW_FILES:
            logger.warning(
                "the control's projection: %d files of a domain are %s, fewer than %d: the figures are uncertain",
                *(fewest, {"choice": "to choose by", "held out": "held out"}[name], FEW_FILES),
            )
    return sets


def _file_of(clip):
    return f"{clip.folder}/{clip.name}"


class _PairReader:
    """Reads the features of pairs of looks; for the arguments see `fit_projection`."""

    def __init__(self, settings: ClipSettings, features: Features, seed: int, watchdog: Heartbeat):
        self.settings, self.features, self.seed, self.watchdog = settings, features, seed, watchdog

    def collect(self, domains: dict[str, list[Clip]], count: Callable[[], object]) -> Pairs:
        """Return the pairs of all clips, about NUM_PROBED places of each look, evenly over clips and frames."""
        fewest = min(map(len, domains.values()))
        num_places = min(NUM_PLACES, -(-NUM_PROBED // (NUM_FRAMES * fewest)))
        pairs: Pairs = defaultdict(list)
        for kind, pair in self.pairs(domains, num_places, count):
            pairs[kind].append(pair)
        return pairs

    def pairs(
        self, domains: dict[str, list[Clip]], num_places: int, count: Callable[[], object]
    ) -> Iterator[tuple[str, Pair]]:
        """Yield (kind, pair) for the clips of both domains, on the CPU; call `count` after each clip."""
        for domain, clips in domains.items():
            for clip in clips:
                self.watchdog.beat(f"fit of the control's projection, {clip.name}")
                try:
                    yield from self._pairs_of_clip(domain, clip, num_places)
                except UnusableVideo as error:
                    logger.warning("the control's projection is fitted without a clip: %s", error)
                count()

    def _pairs_of_clip(self, domain, clip, num_places):
        generator = seeded_generator(self.seed, "projection", clip.name, clip.window)
        dataset = ClipDataset([clip], self.settings)
        control = _some_frames(dataset.control_frames(0))
        if domain == "cg":
            others = {PAIR: _some_frames(dataset.target_frames(0))}
        else:
            others = {ALTERED: augment_control_frames(control, generator)}
            if clip.coarse_file is not None:
                others[COARSE] = _some_frames(dataset.coarse_frames(0))
        one = self.features(control).float().cpu()
        places = torch.randperm(one.shape[1], generator=generator)[:num_places]
        for kind, frames in others.items():
            other = self.features(frames).float().cpu()
            yield kind, Pair(_file_of(clip), one[:, places], other[:, places])


def _some_frames(frames):
    """Return NUM_FRAMES of (F, 3, H, W) uint8, evenly spaced, in [0, 1]."""
    chosen = torch.linspace(0, len(frames) - 1, min(NUM_FRAMES, len(frames))).round().long()
    return frames[chosen].float() / 255


# -------------------------------------------------------------------------------------------------------------- choice


def numbers_to_try(available: int, given: int | None) -> list[int]:
    """Return the numbers of directions that figures are computed for: powers of two, all, and the given one.

    Raises:
        InputError: fewer are available than given.
    """
    if given is not None and given > available:
        raise InputError(f"--control_directions {given}: the projection has {available}; give at most {available}")
    powers = {2**power for power in range(1, 20) if 2**power < available}
    return sorted(powers | {available} | ({given} if given is not None else set()))


def choose_number(worst: dict[int, float]) -> int:
    """Return the last number of directions before the first at which a probe tells too much; the fewest if all do.

    Args:
        worst: {number: accuracy of the best probe}, by rising number.
    """
    chosen = next(iter(worst))
    for number, accuracy in worst.items():
        if accuracy > MAX_ACCURACY:
            break
        chosen = number
    return chosen


def _log_figures(unprojected, figures, worst, used, given):
    logger.info(
        "accuracy on held-out files (0.5 is chance, 90 % intervals) by the number of the control's directions:"
    )
    titles = ("CG or real", "CG or real clip", "which look", "place in the frame")
    logger.info("  %11s %9s" + " %20s" * len(titles), "directions", "chosen by", *titles)
    for number, row in {"unprojected": unprojected, **figures}.items():
        cells = [f"{figure.mean:.3f} [{figure.low:.2f}, {figure.high:.2f}]" for figure in row.values()]
        accuracy = f"{worst[number]:.3f}" if number in worst else ""
        mark = "  <- used" if number == used else ""
        logger.info("  %11s %9s" + " %20s" * len(cells) + "%s", number, accuracy, *cells, mark)
    if given is None and worst[used] > MAX_ACCURACY:
        logger.warning(
            "no number of directions hides CG from real and one look from another (accuracy at most %g): the fewest "
            "are taken; give --control_directions to take more",
            MAX_ACCURACY,
        )


# ------------------------------------------------------------------------------------------------------------- figures


class _Classes(NamedTuple):
    """Clips of two classes that a probe tells apart: (rows, k) of each clip, and its file."""

    rows: tuple[list[torch.Tensor], list[torch.Tensor]]
    files: tuple[list[str], list[str]]


def _figures_of(mean, directions, numbers, chosen_by: Pairs, held_out: Pairs):
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
