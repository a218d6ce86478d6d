"""Measure the videos of several sources on the same scenes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from c2r.bars import progress_bar
from c2r.data.video import read_window
from c2r.evaluation.monitor import SCORE_RANGE, CGLook
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Metric, SetMetric
from c2r.scoring.passes import read_pass
from c2r.scoring.scenes import ClipFormat, Scene
from c2r.scoring.statistics import (
    CONFIDENCE,
    MIN_CLIPS,
    Interval,
    bootstrap_interval,
    holm,
    jackknife_interval,
    sign_test,
)

if TYPE_CHECKING:
    from c2r.scoring.run_datasets import CGLooks

#: Groups that a distance of sets is computed without, for its interval; each costs one distance.
JACKKNIFE_GROUPS = 20

#: Why a measure has no value for any clip, by what it is measured against.
WITHOUT = {
    "truth": ": the dataset has no true videos (file_name)",
    "control": ": the dataset has no coarse videos (control_name)",
    "passes": ": the dataset has no such passes (id_name, depth_name), or nothing in them can be measured",
    "prompt": ": the dataset has no prompts (text)",
}

#: Name of the CG look among the measures.
CG_LOOK = "cg_look"


@dataclass(frozen=True)
class Source:
    """Videos of all scenes that were made in one way: by a model with a kind of control, or elsewhere.

    Attributes:
        name: for tables.
        videos: {scene: one file for each seed}.
        seeds: those of a scene's videos; None where a video was made elsewhere.
        model: name of the model; None where the videos were made elsewhere.
        control: kind of control, as the values of --control; None where the videos were made elsewhere.
    """

    name: str
    videos: dict[str, list[Path]]
    seeds: tuple[int | None, ...] = (None,)
    model: str | None = None
    control: str | None = None


@dataclass(frozen=True)
class Description:
    """Description of a measure, see `c2r.metrics.metric.Metric`."""

    name: str
    higher_is_better: bool | None
    against: str
    unit: str
    bounds: tuple[float, float]

    @classmethod
    def of(cls, metric: Metric | SetMetric) -> "Description":
        """Describe a measure."""
        return cls(metric.name, metric.higher_is_better, metric.against, metric.unit, metric.bounds)


@dataclass(frozen=True)
class Difference:
    """The paired difference of two sources by a measure, second − first.

    Attributes:
        interval: of its mean over the clips that both have.
        clips: their number.
        p_value: of `sign_test`, corrected by Holm over all differences.
    """

    measure: str
    first: str
    second: str
    interval: Interval
    clips: int
    p_value: float


@dataclass
class Scores:
    """The measures of all videos.

    Attributes:
        scenes: their names in order.
        measures: those that have a value for at least one clip, by name.
        values: {source: {measure: {scene: one value for each seed, None where there is none}}}.
        distances: {measure: {source: interval}}, of sets of videos.
        looks: {source: the monitor's judgement of its videos}; empty if there is none.
        skipped: {measure: why it is missing}.
        seeds: {source: see `Source`}.
        pairs: of sources that are compared, see `pairs_to_compare`.
    """

    scenes: list[str]
    measures: dict[str, Description] = field(default_factory=dict)
    values: dict[str, dict[str, dict[str, list[float | None]]]] = field(default_factory=dict)
    distances: dict[str, dict[str, Interval]] = field(default_factory=dict)
    looks: dict[str, CGLook] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def of_clips(self, source: str, measure: str) -> dict[str, float]:
        """Return {scene: mean over the seeds}, without the scenes that have no value."""
        means = {}
        for scene, values in self.values[source][measure].items():
            present = [value for value in values if value is not None]
            if present:
                means[scene] = sum(present) / len(present)
        return means

    def num_clips(self, source: str, measure: str) -> int:
        """Return the number of clips that `interval` is of."""
        if measure in self.distances:
            return len(self.scenes)
        if measure == CG_LOOK and source in self.looks:
            return self.looks[source].look.count
        return len(self.of_clips(source, measure))

    def interval(self, source: str, measure: str) -> Interval:
        """Return the mean of a measure over the clips, or a distance of sets, with its interval.

        That of the CG look is the monitor's own, which includes the error of the clips that it compares with.
        """
        if measure in self.distances:
            interval = self.distances[measure].get(source, Interval(math.nan))
        elif measure == CG_LOOK and source in self.looks:
            look = self.looks[source].look
            interval = Interval(look.mean, *look.interval(CONFIDENCE))
        else:
            interval = bootstrap_interval([*self.of_clips(source, measure).values()])
        return interval.within(self.measures[measure].bounds)

    def differences(self) -> list[Difference]:
        """Compare the sources of each pair by every measure of clips, on the clips that both have."""
        differences = []
        for measure, description in self.measures.items():
            if measure in self.distances:
                continue
            largest = description.bounds[1] - description.bounds[0]
            for first, second in self.pairs:
                before, after = self.of_clips(first, measure), self.of_clips(second, measure)
                paired = [after[scene] - before[scene] for scene in before if scene in after]
                if paired:
                    p_value = sign_test(paired)
                    interval = bootstrap_interval(paired).within((-largest, largest))
                    differences.append(Difference(measure, first, second, interval, len(paired), p_value))
        corrected = holm([difference.p_value for difference in differences])
        return [replace(difference, p_value=p_value) for difference, p_value in zip(differences, corrected)]


def pairs_to_compare(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Return the names (first, second) of the sources whose differences answer a question.

    Within a model: its own control against each other kind of control. Between models, and videos made elsewhere:
    those with their own control, or else of the first kind. Other pairs, such as two models without control, would
    only raise the number of clips that it takes to find any difference beyond chance.
    """
    makers: dict[str, list[Source]] = {}
    for source in sources:
        makers.setdefault(source.name if source.model is None else source.model, []).append(source)
    chief = [next((one for one in made if one.control == "own"), made[0]) for made in makers.values()]
    within = [
        (other.name, one.name) for one, made in zip(chief, makers.values()) for other in made if other is not one
    ]
    return within + [(first.name, second.name) for first, second in combinations(chief, 2)]


def measure_videos(
    sources: Sequence[Source],
    scenes: Sequence[Scene],
    form: ClipFormat,
    metrics: Sequence[Metric],
    set_metrics: Sequence[SetMetric],
    looks: "CGLooks | None",
    real_videos: Iterable[torch.Tensor] = (),
) -> Scores:
    """Compute all measures of all videos.

    Args:
        sources: the videos.
        scenes: of the dataset.
        form: to which all videos are read.
        metrics, set_metrics: from `make_metrics`.
        looks: measure the CG look; None: it is not measured.
        real_videos: (F, 3, H, W) uint8, the true set of distances of sets; without any, the scenes' true videos are.

    Raises:
        InputError: a file cannot be read.
    """
    scores = Scores(
        [scene.name for scene in scenes],
        seeds={source.name: source.seeds for source in sources},
        pairs=pairs_to_compare(sources),
    )
    measures = [Description.of(metric) for metric in metrics]
    if looks is not None:
        measures.append(Description(CG_LOOK, None, "itself", "0 real, 1 CG", SCORE_RANGE))
    scores.values = {s.name: {m.name: {} for m in measures} for s in sources}
    # {source: of each scene, the positions of its videos in the sets of set_metrics}
    positions: dict[str, list[list[int]]] = {source.name: [] for source in sources}
    updates = 0
    if set_metrics:
        for video in real_videos:
            for set_metric in set_metrics:
                set_metric.update_reference(video.float() / 255)
    total = sum(len(videos) for source in sources for videos in source.videos.values())
    with progress_bar(total, "measures", "video", shown=True) as bar:
        for scene in scenes:
            others = _read_scene(scene, form)
            for source in sources:
                values: dict[str, list[float | None]] = {measure.name: [] for measure in measures}
                positions[source.name].append([])
                for path in source.videos[scene.name]:
                    frames = read_window(path, 0.0, form.num_frames, form.fps, form.height, form.width)
                    clip = EvaluatedClip(scene.name, scene.prompt, frames.float() / 255, **others)
                    for metric in metrics:
                        values[metric.name].append(metric(clip))
                    if looks is not None:
                        look = looks(source.name, scene, frames)
                        values[CG_LOOK].append(look if math.isfinite(look) else None)
                    for set_metric in set_metrics:
                        set_metric.update(clip)
                    positions[source.name][-1].append(updates)
                    updates += 1
                    bar.update()
                for name, of_seeds in values.items():
                    scores.values[source.name][name][scene.name] = of_seeds
    for measure in measures:
        if any(scores.of_clips(source.name, measure.name) for source in sources):
            scores.measures[measure.name] = measure
        else:
            scores.skipped[measure.name] = "has no value for any clip" + WITHOUT.get(measure.against, "")
    if looks is not None:
        scores.looks = {source.name: looks.of_source(source.name) for source in sources}
    for set_metric in set_metrics:
        intervals = {name: _distance(set_metric, at) for name, at in positions.items()}
        if all(interval is None for interval in intervals.values()):
            scores.skipped[set_metric.name] = "too few scenes have a generated and a true video for a distance of sets"
            continue
        scores.measures[set_metric.name] = Description.of(set_metric)
        scores.distances[set_metric.name] = {n: interval for n, interval in intervals.items() if interval is not None}
    return scores


def _read_scene(scene, form):
    """Return what the videos of a scene are measured against, as arguments of `EvaluatedClip`."""
    videos = {"control": scene.read(scene.control, form), "truth": scene.read(scene.truth, form)}
    size = (form.num_frames, form.fps, form.height, form.width)
    for kind, file in (("ids", scene.ids), ("depth", scene.depth)):
        videos[kind] = None if file is None else read_pass(file.path, kind, scene.start, *size)
    return videos


def _distance(metric, positions):
    """Return the distance of a source's videos from the true ones with its interval; None if `metric` gives none.

    Args:
        metric: a `SetMetric` that has seen the videos.
        positions: of each scene, those of its videos: a group of the jackknife holds whole scenes.
    """

    def distance(scenes):
        return metric.compute([position for scene in scenes for position in scene])

    whole = distance(positions)
    if whole is None:
        return None
    count = min(JACKKNIFE_GROUPS, len(positions))
    if count < MIN_CLIPS:
        return Interval(whole)
    left_out = [distance([s for i, s in enumerate(positions) if i % count != group]) for group in range(count)]
    sizes = [len(positions[group::count]) for group in range(count)]
    return Interval(whole) if None in left_out else jackknife_interval(whole, left_out, sizes)
