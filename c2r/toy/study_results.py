"""The results of the study: results.csv, two pictures and a table."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from c2r.files import write_atomic

#: Columns of results.csv. The first four come from `measure_layout`, the others from the run's c2r.json.
MEASURES = (
    "people_own",
    "people_other",
    "edges_own",
    "edges_other",
    "loss",
    "loss_real",
    "control_gain",
    "prompt_gain",
    "leak_share_coarse",
    "leak_share_augmented",
    "cg_look",
    "cg_look_low",
    "cg_look_high",
    "cg_texture",
    "cg_lighting",
    "cg_geometry",
    "cg_dinov3",
    "cg_share",
)
#: Columns of the printed table.
SHOWN_MEASURES = (
    "people_own",
    "people_other",
    "edges_own",
    "control_gain",
    "leak_share_coarse",
    "cg_look",
    "cg_share",
)
CG_LOOK_LABEL = "CG look (0 real clips, 1 CG clips)"


@dataclass(frozen=True)
class Result:
    """A line of results.csv."""

    run: str  #: name of the setting
    seed: int
    values: dict[str, float | None]  #: of `MEASURES`; None: the run has no such measure
    seconds: int


def write_results(path: Path, results: Sequence[Result]):
    """Write results.csv."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["run", "seed", *MEASURES, "seconds"])
    for result in results:
        values = ["" if value is None else f"{value:.4f}" for value in map(result.values.get, MEASURES)]
        writer.writerow([result.run, result.seed, *values, result.seconds])
    write_atomic(path, table.getvalue().encode())


def read_results(path: Path) -> list[Result]:
    """Read results.csv; return an empty list if there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            Result(
                row["run"],
                int(row["seed"]),
                {measure: float(row[measure]) if row[measure] else None for measure in MEASURES},
                int(row["seconds"]),
            )
            for row in csv.DictReader(file)
        ]


def values_of(results: Sequence[Result], run: str, measure: str) -> list[float]:
    """Return a measure of a setting, one value for each seed that has it."""
    values = (result.values[measure] for result in results if result.run == run)
    return [value for value in values if value is not None]


def draw_control(path: Path, results: Sequence[Result], ratios: Sequence[float]):
    """Draw control and CG look over the share of CG, with and without phase 1.

    Args:
        path: the PNG to write.
        results: of the finished runs; missing ones are left out.
        ratios: the shares of CG that were tried.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {
        "people_own": "people correlation, own scene",
        "control_gain": "control gain",
        "cg_look": CG_LOOK_LABEL,
    }
    for axes, (measure, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        for suffix, label, colour in (("", "with phase 1", "C0"), (", no phase 1", "without", "C1")):
            values = {ratio: values_of(results, f"cg {ratio:g}{suffix}", measure) for ratio in ratios}
            _plot_seeds(axes, {ratio: seeds for ratio, seeds in values.items() if seeds}, label, colour)
        axes.set(title=title, xlabel="share of CG")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    _save(figure, path)


def _plot_seeds(axes: Axes, values: dict[float, list[float]], label: str, colour: str):
    """Plot a line through the means of the seeds, and a dot for each seed."""
    if not values:
        return
    axes.plot(list(values), [sum(seeds) / len(seeds) for seeds in values.values()], color=colour, label=label)
    for ratio, seeds in values.items():
        axes.plot([ratio] * len(seeds), seeds, ".", color=colour)


def draw_remedies(path: Path, results: Sequence[Result], runs: Sequence[str]):
    """Draw each setting by its CG look and its control gain: the upper left is best.

    Args:
        path: the PNG to write.
        results: of the finished runs.
        runs: names of the settings; those without phase 1 are left out.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    markers = "os^vD<>ph*XPd"
    shown = [name for name in runs if values_of(results, name, "cg_look") and "no phase 1" not in name]
    for i, name in enumerate(shown):
        look, gain = values_of(results, name, "cg_look"), values_of(results, name, "control_gain")
        axes.plot(look, gain, markers[i % len(markers)], color=f"C{i % 10}", label=name, alpha=0.8)
    axes.set(xlabel=CG_LOOK_LABEL, ylabel="control gain")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _save(figure: Figure, path: Path):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomic(path, file.getvalue())


def print_table(results: Sequence[Result], runs: Sequence[str]):
    """Print the means over the seeds of each setting."""
    print(f"{'mean over seeds':36s} seeds " + " ".join(f"{measure:>12s}" for measure in SHOWN_MEASURES))
    for name in runs:
        count = len(values_of(results, name, "loss"))
        if count:
            values = [values_of(results, name, measure) for measure in SHOWN_MEASURES]
            means = [f"{sum(seeds) / len(seeds):12.3f}" if seeds else " " * 12 for seeds in values]
            print(f"{name:36s} {count:5d} " + " ".join(means))
