"""Write the results of an evaluation: results.json, clips.csv and the lines of the terminal."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from c2r import __version__
from c2r.files import write_atomic
from c2r.scoring.measuring import Difference, Scores
from c2r.scoring.run_datasets import ModelLosses
from c2r.scoring.scenes import ClipFormat
from c2r.scoring.statistics import CONFIDENCE, MIN_CLIPS, SIGNIFICANCE, Interval, clips_needed

RESULTS, CLIPS, PICTURE, PAGE = "results.json", "clips.csv", "plot.png", "report.html"


@dataclass
class Evaluation:
    """All that an evaluation has found.

    Attributes:
        form: of the clips.
        num_seeds: videos of each scene by each model.
        scores: of the videos.
        differences: of every two sources.
        losses: {model: its validation}, of models alone.
        cg_looks: {source: judgement of the CG monitor in words}.
        remarks: sentences on what these numbers cannot tell.
        settings: options of the command.
        models: {model: its folder, step and fingerprints}.
    """

    form: ClipFormat
    num_seeds: int
    scores: Scores
    losses: dict[str, ModelLosses] = field(default_factory=dict)
    cg_looks: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        self.differences = self.scores.differences()

    @property
    def remarks(self) -> list[str]:
        """Sentences on what is missing, or cannot be told from these clips."""
        count = len(self.scores.scenes)
        lines = [f"{name}: {reason}" for name, reason in self.scores.skipped.items()]
        if count < MIN_CLIPS:
            lines.append(f"{count} clips are too few for intervals; give at least {MIN_CLIPS}")
        tests = len(self.differences)
        if tests and (needed := clips_needed(tests)) > count:
            lines.append(
                f"no difference can be beyond chance: with {tests} of them it takes {needed} clips, and there are "
                f"{count}; give more clips, or fewer --metrics or models"
            )
        return lines

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
                    **{key: value for key, value in asdict(measure).items() if key != "name"},
                    "sources": {
                        source: _as_numbers(scores.interval(source, name)) | {"clips": clips_of(scores, source, name)}
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
                yield (
                    f"beyond chance: {difference.measure} of {difference.second} − {difference.first}: "
                    f"{interval_text(difference.interval, sign=True)}, p {difference.p_value:.2g}"
                )
        for source, look in self.cg_looks.items():
            yield f"{source}: {look}"
        for model, losses in self.losses.items():
            numbers = losses.numbers
            gain = f", control gain {numbers['control_gain']:.4f}" if "control_gain" in numbers else ""
            leak = f", leak {numbers['leak_share_coarse']:.2f}" if "leak_share_coarse" in numbers else ""
            yield f"{model}: validation loss {numbers['loss']:.4f}{gain}{leak}"
        yield from self.remarks


def is_beyond_chance(difference: Difference) -> bool:
    """Return True if a difference is significant after Holm's correction."""
    return difference.p_value <= SIGNIFICANCE


def clips_of(scores: Scores, source: str, measure: str) -> int:
    """Return the number of clips that a number is of."""
    return len(scores.scenes) if measure in scores.distances else len(scores.of_clips(source, measure))


def interval_text(interval: Interval, sign: bool = False) -> str:
    """Return a mean with its interval, all with as many decimals as the interval's width needs."""
    mean, low, high = interval.mean, interval.low, interval.high
    if not math.isfinite(mean):
        return "–"
    width = high - low
    known = math.isfinite(width)
    size = width if known and width > 0 else abs(mean)
    decimals = min(6, max(2, 1 - math.floor(math.log10(size)))) if size > 0 else 2
    mark = "+" if sign else ""
    text = f"{mean:{mark}.{decimals}f}" + (f" [{low:{mark}.{decimals}f}, {high:{mark}.{decimals}f}]" if known else "")
    return text.replace("-", "−")


def _as_numbers(interval: Interval) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(interval).items()}
