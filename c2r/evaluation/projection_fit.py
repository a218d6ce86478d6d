"""Fit the control's projection on a run's clips: pairs of looks of one place, and figures on held-out files.

Three sets of files: the directions are fitted on one half of the training files, their number is chosen on the other
half, and the held-out files, which neither has seen, give the certificate.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from c2r import InputError
from c2r.bars import progress_bar
from c2r.data.clips import Clip
from c2r.data.mixture import Mixture
from c2r.data.settings import ClipSettings
from c2r.data.video_info import UnusableVideo
from c2r.data.workers import Heartbeat
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.projection_figures import (
    ALTERED,
    COARSE,
    PAIR,
    Pair,
    Pairs,
    agreement,
    figures_of,
    projected,
    require_pairs,
)
from c2r.models.control_projection import (
    FIT,
    FittedProjection,
    LookScatter,
    load_projection,
    most_directions,
    orthonormal,
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
#: Least correlation between the looks of a place at which a direction is kept: half of its variance is common to both.
MIN_AGREEMENT = 0.5
#: (F, 3, H, W) in [0, 1] -> (F, places, Dd)
Features = Callable[[torch.Tensor], torch.Tensor]


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
        if not path.is_file():
            raise InputError(f"{path}: was just written, but is not here; put --output_dir on a shared file system")
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
        num_directions: to use; None: as many as agree between looks.
        watchdog: gets a beat for each clip.

    Raises:
        InputError: a domain has too few files or too few that can be read, the features do not vary, or no direction
            agrees between looks.
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
        mean, directions = mean.float(), directions[: most_directions(len(mean))].float()
        require_pairs(chosen_by)
        agreements = [figure.mean for figure in agreement(projected(chosen_by, mean, directions))]
        used = num_directions or choose_number(agreements)
        numbers = numbers_to_try(len(directions), used)
        figures = figures_of(mean, directions, numbers, chosen_by, held_out)
        directions = orthonormal(directions)
        unprojected = figures.pop(None)
        _log_figures(unprojected, figures, agreements, used)
        lowest = figures[used]["agreement"]
        if lowest.high < MIN_AGREEMENT:
            logger.warning(
                "the control's projection: on held-out files the looks of a place correlate only by %.2f [%.2f, %.2f] "
                "in one direction: the look may leak; watch leak_share_coarse, or give a lower --control_directions",
                *lowest,
            )
        shares = scatter.shares(directions).clamp(min=0).float()
    datasets = [dataset.folder for mixture in (real, cg) for dataset in mixture.datasets]
    return FittedProjection(mean, directions, shares, used, figures, unprojected, dinov3, datasets)


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
                "the control's projection: %d files of a domain are %s, fewer than %d: the figures are uncertain; "
                "add some",
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


def numbers_to_try(available: int, used: int) -> list[int]:
    """Return the numbers of directions that figures are computed for: powers of two, all, and the one that is used."""
    powers = {2**power for power in range(20) if 2**power < available}
    return sorted(powers | {available, used})


def choose_number(agreements: Sequence[float]) -> int:
    """Return how many of the first directions agree between looks.

    Args:
        agreements: of each direction.

    Raises:
        InputError: the first one does not.
    """
    number = next((k for k, value in enumerate(agreements) if value < MIN_AGREEMENT), len(agreements))
    if number == 0:
        raise InputError(
            f"--control_projection {FIT}: in two looks DINOv3's features of a place have little in common (the best "
            f"direction's correlation is {agreements[0]:.3f}, {MIN_AGREEMENT:g} is needed), so that no projection "
            "shows the place alone; leave it out, or give --control_directions to try all the same"
        )
    return number


def _log_figures(unprojected, figures, agreements, used):
    logger.info(
        "the control's directions: correlation of the last one between looks, by which their number is chosen (up to "
        f"the first below {MIN_AGREEMENT:g}); then, on held-out files with 90 % intervals: agreement, the lowest "
        "correlation (near 1 is good); how often a probe tells CG from real by a place and by a whole clip, and which "
        "look it is (near 0.5 is good); and how often it tells the place in the frame (near 1 is good):"
    )
    titles = ("agreement", "CG or real: a place", "CG or real: a clip", "which look", "place in the frame")
    logger.info("  %11s %7s" + " %20s" * len(titles), "directions", "last", *titles)
    for number, row in {"unprojected": unprojected, **figures}.items():
        shown = [row[name] for name in ("agreement", "cg_or_real", "cg_or_real_clip", "look", "place")]
        cells = [f"{figure.mean:.3f} [{figure.low:.2f}, {figure.high:.2f}]" for figure in shown]
        value = f"{agreements[number - 1]:.3f}" if number in figures else ""
        mark = "  <- used" if number == used else ""
        logger.info("  %11s %7s" + " %20s" * len(cells) + "%s", number, value, *cells, mark)
