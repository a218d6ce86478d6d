"""Fit the control's projection on a run's clips: pairs of looks of one place, and figures on held-out files."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from c2r import InputError
from c2r.bars import progress_bar
from c2r.data.mixture import Mixture
from c2r.data.settings import ClipSettings
from c2r.encoding.dataset import ClipDataset
from c2r.models.control_projection import (
    Certificate,
    FittedProjection,
    LookScatter,
    load_projection,
    place_accuracy,
    probe_accuracy,
    project,
    read_certificate,
    save_projection,
)
from c2r.training.augmentation import augment_control_frames
from c2r.training.failing_together import failing_together
from c2r.training.seeds import seeded_generator

logger = logging.getLogger(__name__)

#: The file in a run's folder.
FILE = "control_projection.safetensors"
FIT = "fit"
#: The sample: clips of a domain to fit on and held-out ones, frames of a clip, places of a frame.
NUM_CLIPS, NUM_HELD_OUT, NUM_FRAMES, NUM_PLACES = 64, 32, 4, 64
#: Places of a look, on which probes are fitted.
NUM_PROBED = 2000
#: Most directions that are tried and stored.
MAX_DIRECTIONS = 512
#: As many directions are kept as leave a probe's accuracy in telling CG from real, and two looks, at most at this.
MAX_ACCURACY = 0.6

#: (F, 3, H, W) in [0, 1] -> (F, places, Dd)
Features = Callable[[torch.Tensor], torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # {kind: two looks (frames, places, Dd)}

# The kinds of pairs, each with the names of its two looks. A clip without a coarse version has no pair of the last.
ALTERED, PAIR, COARSE = "real and altered", "coarse and fine", "real and coarse"


def obtain_projection(
    given: str,
    output_dir: str | Path,
    num_directions: int | None,
    feature_dim: int,
    fit: Callable[[], FittedProjection],
    accelerator: Accelerator,
) -> FittedProjection:
    """Return the projection that a run starts with. Call it on every process; the main one fits it.

    Args:
        given: FIT, or a file.
        output_dir: the run's folder, which gets FILE: it also serves other runs.
        num_directions: replaces the number that the projection names.
        feature_dim: Dd.
        fit: fits a projection.
        accelerator: of the run.

    Raises:
        InputError: the file is none for this DINOv3, or has fewer directions.
    """
    path = Path(output_dir) / FILE
    with failing_together(accelerator, path):
        if accelerator.is_main_process:
            projection = fit() if given == FIT else load_projection(given, feature_dim)
            if num_directions is not None:
                projection.num_directions = require_directions(num_directions, len(projection.directions))
            save_projection(path, projection)
    accelerator.wait_for_everyone()
    with failing_together(accelerator, path):
        projection = load_projection(path, feature_dim)
    return projection


def certificate_of(output_dir: str | Path) -> dict[str, float] | None:
    """Return the figures of the projection that a run has stored; None if its file has been removed since."""
    path = Path(output_dir) / FILE
    return read_certificate(path) if path.is_file() else None


def require_directions(num_directions: int, available: int) -> int:
    """Return the number of directions, or raise InputError if there are fewer."""
    if num_directions > available:
        raise InputError(
            f"--control_directions {num_directions}: the projection has {available}; give at most {available}"
        )
    return num_directions


def fit_projection(
    real: Mixture, cg: Mixture, settings: ClipSettings, features: Features, seed: int, quiet: bool = False
) -> FittedProjection:
    """Fit a projection on training clips, choose its directions by held-out clips, and log the figures.

    Args:
        real, cg: the run's mixtures.
        settings: the settings that the clips are cut with.
        features: DINOv3 on frames.
        seed: of the alterations and the choice of places.
        quiet: show no bar.

    Raises:
        InputError: a domain has no clip for it.
    """
    train, held_out = (
        [(real_clips.first_windows(count), "real"), (cg_clips.first_windows(count), "cg")]
        for real_clips, cg_clips, count in (
            (real.train, cg.train, NUM_CLIPS),
            (real.held_out, cg.held_out, NUM_HELD_OUT),
        )
    )
    for sets, which in ((train, "to fit on"), (held_out, "held out")):
        for (clips, domain), mixture in zip(sets, (real, cg)):
            if not clips:
                raise InputError(
                    f"--control_projection fit: {mixture.name} has no {domain} clip {which}; add one, or leave it out"
                )
    total = sum(len(clips) for clips, _ in train + held_out)
    scatter: LookScatter | None = None
    seen: dict[str, list] = defaultdict(list)
    with progress_bar(total, "fitting the control's projection", "clip", shown=not quiet) as bar:
        for kind, one, other in _pairs_of(train, settings, features, seed, bar.update):
            scatter = scatter or LookScatter(one.shape[-1])
            scatter.add(kind, one.flatten(0, 1), other.flatten(0, 1))
            seen[kind].append((_few(one, len(train[0][0])), _few(other, len(train[0][0]))))
        assert scatter is not None
        tested: dict[str, list] = defaultdict(list)
        for kind, one, other in _pairs_of(held_out, settings, features, seed, bar.update):
            tested[kind].append((one, other))
    mean, directions = scatter.solve()
    return _choose(mean.float(), directions[:MAX_DIRECTIONS].float(), seen, tested)


def _pairs_of(sets, settings, features, seed, count) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (kind, one look, the other look) of each clip, both (frames, places, Dd) on the CPU."""
    for clips, domain in sets:
        dataset = ClipDataset(clips, settings)
        for i, clip in enumerate(clips):
            generator = seeded_generator(seed, "projection", clip.name, clip.window)
            looks = {PAIR: (dataset.control_frames, dataset.target_frames)}
            if domain == "real":
                looks = {ALTERED: (dataset.control_frames, None)}
                if clip.coarse_file is not None:
                    looks[COARSE] = (dataset.control_frames, dataset.coarse_frames)
            for kind, (read_one, read_other) in looks.items():
                one = _frames(read_one(i))
                other = augment_control_frames(one, generator) if read_other is None else _frames(read_other(i))
                one, other = features(one).float().cpu(), features(other).float().cpu()
                places = torch.randperm(one.shape[1], generator=generator)[:NUM_PLACES]
                yield kind, one[:, places], other[:, places]
            count()


def _frames(frames):
    """Return a few frames of (F, 3, H, W) uint8, evenly spaced, in [0, 1]."""
    chosen = torch.linspace(0, len(frames) - 1, min(NUM_FRAMES, len(frames))).round().long()
    return frames[chosen].float() / 255


def _few(look, num_clips):
    """Return the places of a clip that probes are fitted on, (n, Dd)."""
    return look.flatten(0, 1)[: -(-NUM_PROBED // num_clips)]


def _choose(mean, directions, seen, tested):
    """Log the figures for each number of directions, and return the projection with the number that they choose."""
    train = {kind: tuple(map(torch.cat, zip(*looks))) for kind, looks in seen.items()}
    numbers = [2**power for power in range(1, 20) if 2**power < len(directions)] + [len(directions)]

    def coordinates(looks):
        return [project(look, mean, directions) for look in looks]

    train_k = {kind: coordinates(looks) for kind, looks in train.items()}
    tested_k = {kind: [coordinates(looks) for looks in pairs] for kind, pairs in tested.items()}
    unprojected = _figures(train, tested)
    tables = {k: _figures(train_k, tested_k, k) for k in numbers}
    allowed = [k for k in numbers if max(tables[k]["cg_or_real"], tables[k]["look"]) <= MAX_ACCURACY]
    best = max(allowed, default=numbers[0])
    logger.info("accuracy on held-out files (0.5 is chance) by the number of the control's directions:")
    logger.info("  %11s %11s %14s %18s", "directions", "CG or real", "which look", "place in the frame")
    for k, figures in {"unprojected": unprojected, **tables}.items():
        chosen = "  <- chosen" if k == best else ""
        logger.info("  %11s %11.3f %14.3f %18.3f%s", k, *figures.values(), chosen)
    if not allowed:
        logger.warning(
            "no number of directions hides CG from real and one look from another (accuracy at most %g): the fewest "
            "are taken; give --control_directions to take more",
            MAX_ACCURACY,
        )
    return FittedProjection(mean, directions, best, tables[best], unprojected)


def _figures(train, tested, k=None) -> Certificate:
    """Return the accuracies by the first k coordinates."""

    def of(looks):
        return [look[..., :k] for look in looks]

    held_out = {
        kind: [torch.cat([look.flatten(0, 1) for look in looks]) for looks in zip(*pairs)]
        for kind, pairs in tested.items()
    }
    controls = (ALTERED, PAIR)  # the first look of each is what the control branch sees in training
    common = [kind for kind in train if kind in held_out]
    looks = [probe_accuracy(of(train[kind]), of(held_out[kind])) for kind in common]
    places = [place_accuracy(*of(pair)) for kind in common for pair in tested[kind]]
    return Certificate(
        cg_or_real=probe_accuracy(*(of([sets[kind][0] for kind in controls]) for sets in (train, held_out))),
        look=sum(looks) / len(looks),
        place=sum(places) / len(places),
    )
