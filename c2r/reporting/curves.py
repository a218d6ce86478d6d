"""Curves as inline SVG: readable without scripts, and with values under the pointer where scripts run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

#: Size of a chart and the place of its axes, in the units of its viewBox.
WIDTH, HEIGHT, RIGHT, TOP, BOTTOM = 420, 236, 10, 10, 26

#: Width of a digit of an axis, in the same units.
DIGIT = 6.4

#: Points of a line; more cannot be seen at this size.
MAX_POINTS = 240

#: Steps whose mean is drawn as the training loss: this share of all steps.
SMOOTHED_SHARE = 0.04

DASHES = {"solid": "", "dashed": "7 4", "dotted": "1.5 3.5", "dash-dotted": "7 3 1.5 3"}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: for the legend.
        points: [(step, value)] in the order of steps; a NaN breaks the line.
        color: of CSS.
        style: a key of DASHES.
        band: [(step, low, high)] of an interval.
        faint: drawn thin and pale behind the others, without a legend.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    style: str = "solid"
    band: Sequence[tuple[float, float, float]] = field(default_factory=tuple)
    faint: bool = False


def points_of(series: Mapping[int, float]) -> list[tuple[float, float]]:
    """Return the points of a logged number, thinned to at most MAX_POINTS."""
    points = sorted(series.items())
    if len(points) <= MAX_POINTS:
        return [*points]
    every = math.ceil(len(points) / MAX_POINTS)
    return [*points[:-1:every], points[-1]]


def smoothed(series: Mapping[int, float]) -> tuple[list[tuple[float, float]], int]:
    """Return the running mean of a number over its last steps, and over how many it is taken."""
    points = [(step, value) for step, value in sorted(series.items()) if math.isfinite(value)]
    window = max(1, round(SMOOTHED_SHARE * len(points)))
    means, total = {}, 0.0
    for i, (step, value) in enumerate(points):
        total += value - (points[i - window][1] if i >= window else 0)
        if i >= window - 1:
            means[step] = total / window
    return points_of(means), window


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]


def axis_labels(values: Sequence[float]) -> dict[float, str]:
    """Return a label for each tick, all with as many decimals as their distance needs."""
    distance = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    if distance < 1e-5:
        return {value: f"{value:.1e}".replace("-", "−") if value else "0" for value in values}
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
    return {value: f"{value:,.{decimals}f}".replace("-", "−") for value in values}


def chart(
    title: str,
    lines: Sequence[Line],
    note: str = "",
    marks: Sequence[tuple[float, str]] = (),
    include: Sequence[float] = (),
) -> str:
    """Draw lines over the steps.

    Args:
        title: above the chart.
        lines: those without a finite point are left out.
        note: a sentence below the title.
        marks: (value, label) of horizontal lines.
        include: values that the vertical axis must reach.

    Returns:
        an HTML figure; "" if no line has a point.
    """
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    ys += [y for line in lines for _, low, high in line.band for y in (low, high) if math.isfinite(y)]
    ys += [*include, *(value for value, _ in marks)]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = min(ys), max(ys)
    margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    y_ticks = axis_labels(ticks(y_low, y_high))
    left = round(DIGIT * max(len(label) for label in y_ticks.values())) + 8

    def x_of(x):
        return left + (x - x_low) / (x_high - x_low) * (WIDTH - left - RIGHT)

    def y_of(y):
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value, label in y_ticks.items():
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    x_ticks = [value for value in ticks(x_low, x_high) if value == int(value)]
    for value in x_ticks:
        x = x_of(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:,.0f}</text>')
    axis = f"M{left} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
    parts.append(f'<path class="axis" d="{axis}"/>')
    for value, label in marks:
        y = y_of(value)
        parts.append(f'<line class="mark" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="mark" x="{WIDTH - RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for line in sorted(lines, key=lambda line: not line.faint):
        color = f'style="--c:{line.color}"'
        if line.band:
            ahead = [f"{x_of(x):.1f},{y_of(high):.1f}" for x, _, high in line.band if math.isfinite(high)]
            back = [f"{x_of(x):.1f},{y_of(low):.1f}" for x, low, _ in reversed(line.band) if math.isfinite(low)]
            parts.append(f'<polygon class="band" {color} points="{" ".join(ahead + back)}"/>')
        path = _path([(x_of(x), y_of(y)) for x, y in line.points])
        dash = f' stroke-dasharray="{DASHES[line.style]}"' if DASHES[line.style] else ""
        parts.append(f'<path class="{"faint" if line.faint else "line"}" {color}{dash} d="{path}"/>')
        if not line.faint and len(line.points) <= 40:
            parts += [
                f'<circle {color} cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.4"/>'
                for x, y in line.points
                if math.isfinite(y)
            ]
    shown = [line for line in lines if not line.faint]
    # The script finds the step under the pointer by these, and writes the values of each line.
    data = {
        "x": [x_low, x_high],
        "box": [left, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "lines": [
            {"label": line.label, "color": line.color, "points": [(x, y) for x, y in line.points if math.isfinite(y)]}
            for line in shown
        ],
    }
    legend = "".join(
        f'<li><svg width="26" height="8" aria-hidden="true"><line x1="1" x2="25" y1="4" y2="4" class="line" '
        f'style="--c:{line.color}" stroke-dasharray="{DASHES[line.style]}"/></svg>{escape(line.label)}</li>'
        for line in shown
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>'
        + (f"<p>{escape(note)}</p>" if note else "")
        + f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-chart="{escape(as_json(data))}">{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def _path(points):
    words, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            words.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    if len(words) == 1:  # a point alone is seen as a short stroke
        words.append("h.1")
    return "".join(words)


def four_decimals(value: float) -> str:
    """Return a number with four decimals, so that those of a table stand below each other."""
    return f"{value:.4f}".replace("-", "−")


def number_text(value: float) -> str:
    """Return a number with about four digits, such as "0.4502", "−0.03", "1.2e-05" or "15,000"."""
    if value != 0 and abs(value) < 1e-3:
        text = f"{value:.2g}" if abs(value) < 1e-4 else f"{value:.5f}".rstrip("0")
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−", 1) if value < 0 else text


def as_json(value: Any) -> str:
    """Return JSON that can stand in an HTML script or attribute: no NaN, and no < that could end a script."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
