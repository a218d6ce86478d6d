"""Write the results of an evaluation: results.json, clips.csv and the lines of the terminal."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from c2r import InputError, __version__
from c2r.evaluation.monitor import CGLook
from c2r.files import read_json, write_atomic
from c2r.scoring.measuring import CG_LOOK, Difference, Scores
from c2r.scoring.run_datasets import ModelLosses
from c2r.scoring.scenes import ClipFormat
from c2r.scoring.statistics import CONFIDENCE, MIN_CLIPS, SIGNIFICANCE, Interval, clips_needed

RESULTS, CLIPS, PICTURE, PAGE = "results.json", "clips.csv", "plot.png", "report.html"

#: The verdict on a difference whose clips could not show it: no sign that two sources are alike.
TOO_FEW = "too few clips to tell"


class _Results(TypedDict):
    """The checked entries of results.json."""

    clips: list[str]


def earlier_scenes(output_dir: Path) -> set[str]:
    """Return the scenes that the results.json of a folder names; none if there is no such file, or a damaged one."""
    try:
        return {*read_json(output_dir / RESULTS, _Results, extra="allow")["clips"]}
    except InputError:
        return set()


@dataclass
class Evaluation:
    """All that an evaluation has found.

    Attributes:
        form: of the clips.
        num_seeds: videos of each scene by each model.
        scores: of the videos.
        differences: of every two sources.
        losses: {model: its validation}, of models alone.
        settings: options of the command.
        models: {model: its folder, step and fingerprints}.
    """

    form: ClipFormat
    num_seeds: int
    scores: Scores
    losses: dict[str, ModelLosses] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        self.differences = self.scores.differences()

    @property
    def clips_needed(self) -> int:
        """Clips that it takes for a difference beyond chance; 0 if there are no differences."""
        return clips_needed(len(self.differences)) if self.differences else 0

    def verdict(self, difference: Difference) -> str:
        """Return what follows from a difference, second − first.

        Returns:
            "better" or "worse", the second one; "beyond chance" where neither direction is better; "within chance"; or
            TOO_FEW.
        """
        if is_beyond_chance(difference):
            better = self.scores.measures[difference.measure].higher_is_better
            if better is None:
                return "beyond chance"
            return "better" if (difference.interval.mean > 0) == better else "worse"
        return TOO_FEW if difference.clips < self.clips_needed else "within chance"

    @property
    def remarks(self) -> list[str]:
        """Sentences on what is missing, or does not follow from these clips."""
        scores, count = self.scores, len(self.scores.scenes)
        lines = [f"{name}: {reason}" for name, reason in scores.skipped.items()]
        if count < MIN_CLIPS:
            lines.append(f"{count} clips are too few for intervals; give at least {MIN_CLIPS}")
        tests, needed = len(self.differences), self.clips_needed
        if needed > count:
            lines.append(
                f"no difference can be beyond chance: with {tests} of them it takes {needed} clips, and there are "
                f"{count}; give more clips, or fewer --metrics, models or kinds of --control"
            )
        # A measure may have values for a part of the clips only.
        for name in scores.measures:
            fewest = min((scores.num_clips(source, name) for source in scores.values), default=count)
            if fewest < MIN_CLIPS <= count and name != CG_LOOK:
                lines.append(f"{name}: {fewest} clips with a value are too few for an interval; it takes {MIN_CLIPS}")
            paired = min((d.clips for d in self.differences if d.measure == name), default=count)
            if paired < needed <= count:
                lines.append(
                    f"{name}: two sources share {paired} clips with a value, too few for a difference beyond chance; "
                    f"with {tests} differences it takes {needed}"
                )
        return lines

    @property
    def cg_looks(self) -> dict[str, str]:
        """{source: the measures of its CG look in words, of which the CG look is the mean}."""
        return {source: look_text(look) for source, look in self.scores.looks.items()}

    def write(self, folder: Path) -> None:
        """Write results.json and clips.csv."""
        write_atomic(folder / RESULTS, (json.dumps(self._as_json(), indent=2, allow_nan=False) + "\n").encode())
        write_atomic(folder / CLIPS, self._as_csv().encode())

    def _as_json(self) -> dict[str, Any]:
        scores = self.scores
        return {
            "version": __version__,
            "settings": self.settings,
            "models": self.models,
            "format": asdict(self.form),
            "num_seeds": self.num_seeds,
            "clips": scores.scenes,
            "confidence": CONFIDENCE,
            "measures": {
                name: {
                    **{key: getattr(measure, key) for key in ("higher_is_better", "against", "unit")},
                    "sources": {
                        source: _as_numbers(scores.interval(source, name)) | {"clips": scores.num_clips(source, name)}
                        for source in scores.values
                    },
                }
                for name, measure in scores.measures.items()
            },
            "cg_looks": self.cg_looks,
            "differences": [
                {
                    "measure": d.measure,
                    "first": d.first,
                    "second": d.second,
                    **_as_numbers(d.interval),
                    "clips": d.clips,
                    "p_value": d.p_value,
                    "beyond_chance": is_beyond_chance(d),
                    "verdict": self.verdict(d),
                }
                for d in self.differences
            ],
            "validation": {
                model: {
                    "clips": losses.clips,
                    "numbers": losses.numbers,
                    "intervals": {name: _as_numbers(interval) for name, interval in losses.intervals.items()},
                }
                for model, losses in self.losses.items()
            },
            "remarks": self.remarks,
        }

    def _as_csv(self) -> str:
        scores = self.scores
        names = [name for name in scores.measures if name not in scores.distances]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["source", "clip", "seed", *names])
        for source, measures in scores.values.items():
            for scene in scores.scenes:
                of_seeds = zip(*(measures[name][scene] for name in names))
                for seed, values in zip(scores.seeds[source], of_seeds):
                    writer.writerow(
                        [
                            source,
                            scene,
                            "" if seed is None else seed,
                            *("" if v is None else f"{v:.6g}" for v in values),
                        ]
                    )
        return text.getvalue()

    def lines(self) -> Iterator[str]:
        """Yield what the command prints."""
        for name, measure in self.scores.measures.items():
            better = {True: ", higher is better", False: ", lower is better", None: ""}[measure.higher_is_better]
            against = "" if measure.against == "itself" else f" against {measure.against}"
            yield f"{name}{against}{better}"
            for source in self.scores.values:
                yield f"  {source}: {interval_text(self.scores.interval(source, name))}"
        for difference in self.differences:
            if is_beyond_chance(difference):
                verdict = self.verdict(difference)
                yield (
                    f"beyond chance: {difference.measure} of {difference.second} − {difference.first}: "
                    f"{interval_text(difference.interval, sign=True)}, p {difference.p_value:.2g}"
                    + (f", {verdict}" if verdict in ("better", "worse") else "")
                )
        for source, look in self.cg_looks.items():
            yield f"{source}: {look}"
        for model, losses in self.losses.items():
            numbers = losses.numbers
            gain = f", control gain {numbers['control_gain']:.4f}" if "control_gain" in numbers else ""
            leak = f", leak {numbers['leak_share_coarse']:.2f}" if "leak_share_coarse" in numbers else ""
            domains = [
                f"{numbers[f'loss_{domain}']:.4f} of {count} {name} clips"
                for domain, name in (("real", "real"), ("cg", "CG"))
                if f"loss_{domain}" in numbers and (count := losses.clips.get(domain))
            ]
            of_domains = f" ({', '.join(domains)})" if domains else ""
            yield f"{model}: validation loss {numbers['loss']:.4f}{of_domains}{gain}{leak}"
        yield from self.remarks


def is_beyond_chance(difference: Difference) -> bool:
    """Return True if a difference is significant after Holm's correction."""
    return difference.p_value <= SIGNIFICANCE


def look_text(look: CGLook) -> str:
    """Return the measures of a CG look in words; its own interval stands in the table of measures."""
    parts = [
        f"{name} {score.mean:.2f}" + (" (uninformative, left out)" if name in look.uninformative else "")
        for name, score in look.measures.items()
    ]
    return f"CG look by {', '.join(parts)}".replace("-", "−")


def interval_text(interval: Interval, sign: bool = False) -> str:
    """Return a mean with its interval, all with as many decimals as the interval's width needs."""
    mean, low, high = interval.mean, interval.low, interval.high
    if not math.isfinite(mean):
        return "–"
    width = high - low
    bounded = math.isfinite(width)
    size = width if bounded and width > 0 else abs(mean)
    decimals = min(6, max(2, 1 - math.floor(math.log10(size)))) if size > 0 else 2
    mark = "+" if sign else ""
    text = f"{mean:{mark}.{decimals}f}" + (
        f" [{low:{mark}.{decimals}f}, {high:{mark}.{decimals}f}]" if bounded else ""
    )
    return text.replace("-", "−")


def _as_numbers(interval: Interval) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}
