"""The results of the study: results.csv, two pictures and two tables."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from c2r.files import write_atomic
from c2r.scoring.statistics import Interval

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
#: Columns of both tables.
COMPARED_MEASURES = (
    "people_own",
    "people_other",
    "edges_own",
    "control_gain",
    "leak_share_coarse",
    "cg_look",
)
#: Columns of the table of means. The share of CG is set, and only the controller changes it.
SHOWN_MEASURES = (*COMPARED_MEASURES, "cg_share")
#: Confidence of the intervals of differences.
CONFIDENCE = 0.9
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


def draw_remedies(path: Path, results: Sequence[Result], baselines: Mapping[str, str | None]):
    """Draw control gain over CG look, and people correlation over leak for each planted leak: the upper left is best.

    Args:
        path: the PNG to write.
        results: of the finished runs.
        baselines: {setting: its baseline}; settings without phase 1 or of another length are left out.
    """
    whole = [name for name in baselines if not any(text in name for text in ("no phase 1", "probe", "steps"))]
    honest = [name for name in whole if not name.startswith("leak")]
    panels = [(honest, ("cg_look", CG_LOOK_LABEL), ("control_gain", "control gain"))]
    leak_share, people = ("leak_share_coarse", "leak (coarse)"), ("people_own", "people correlation, own scene")
    for leak in dict.fromkeys(name.partition(",")[0] for name in whole if name.startswith("leak")):
        leaking = [name for name in whole if name == baselines[leak] or name.partition(",")[0] == leak]
        panels.append((leaking, leak_share, people))
    figure = Figure(figsize=(9, 3.75 * len(panels)), layout="constrained")
    markers = "os^vD<>ph*XPd"
    for axes, (names, (x, x_label), (y, y_label)) in zip(figure.subplots(len(panels)), panels):
        values = {(result.run, result.seed): (result.values[x], result.values[y]) for result in results}
        for i, name in enumerate(names):
            points = [point for (run, _), point in values.items() if run == name and None not in point]
            if points:
                axes.plot(*zip(*points), markers[i % len(markers)], color=f"C{i % 10}", label=name, alpha=0.8)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    _save(figure, path)


def _save(figure: Figure, path: Path):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomic(path, file.getvalue())


def paired_difference(results: Sequence[Result], run: str, baseline: str, measure: str) -> Interval | None:
    """Compare a setting with another one at the same seeds.

    Args:
        results: of the finished runs.
        run, baseline: names of the settings.
        measure: one of `MEASURES`.

    Returns:
        the mean of run − baseline with its Student's t interval over the seeds, without bounds for one seed; None if
        there is no seed at which both have the measure.
    """
    values = {(result.run, result.seed): result.values[measure] for result in results}
    differences = []
    for seed in sorted({result.seed for result in results}):
        first, second = values.get((run, seed)), values.get((baseline, seed))
        if first is not None and second is not None:
            differences.append(first - second)
    if not differences:
        return None
    mean, count = fmean(differences), len(differences)
    if count == 1:
        return Interval(mean)
    half = stdev(differences) / math.sqrt(count) * float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Interval(mean, mean - half, mean + half)


def excludes_zero(difference: Interval) -> bool:
    """Return True if a difference has an interval, and this excludes 0."""
    return difference.low > 0 or difference.high < 0


def study_tables(results: Sequence[Result], baselines: Mapping[str, str | None]) -> str:
    """Return two Markdown tables: the means over the seeds, and the differences from the baselines.

    Args:
        results: of the finished runs.
        baselines: {setting: the setting that it is compared with, or None}, in the order of the rows; settings
            without results are left out.
    """
    means, rows, tested, marked = [], [], 0, 0
    for name, baseline in baselines.items():
        count = len(values_of(results, name, "loss"))
        if count == 0:
            continue
        values = [values_of(results, name, measure) for measure in SHOWN_MEASURES]
        means.append([name, str(count), *(_number(fmean(seeds)) if seeds else "–" for seeds in values)])
        if baseline is not None:
            found = [paired_difference(results, name, baseline, measure) for measure in COMPARED_MEASURES]
            bounded = [difference for difference in found if difference and math.isfinite(difference.low)]
            tested, marked = tested + len(bounded), marked + sum(map(excludes_zero, bounded))
            rows.append([name, baseline, *map(_difference_text, found)])
    remark = "With one seed there are no intervals."
    if tested:
        confidence, by_chance = f"{CONFIDENCE * 100:.0f} %", (1 - CONFIDENCE) * tested
        remark = (
            f"In brackets: Student's t interval of {confidence} over the seeds. Bold: it excludes 0. This holds for "
            f"{marked} of {tested} intervals; if no setting changed anything, about {by_chance:.0f} would by chance."
        )
    return (
        f"Means over the seeds:\n\n{markdown_table(['setting', 'seeds', *SHOWN_MEASURES], means)}\n"
        f"Mean differences from the baseline at the same seeds. {remark}\n\n"
        f"{markdown_table(['setting', 'baseline', *COMPARED_MEASURES], rows)}"
    )


def _difference_text(difference: Interval | None) -> str:
    if difference is None:
        return "–"
    text = _number(difference.mean, "+")
    if math.isfinite(difference.low):
        text += f" [{_number(difference.low, '+')}, {_number(difference.high, '+')}]"
    return f"**{text}**" if excludes_zero(difference) else text


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("-", "−")


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with columns of equal width, so that it can be read in a terminal too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [titles, ["-" * width for width in widths], *rows]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)
