"""Curves as inline SVG: readable without scripts, and with values under the pointer where scripts run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
    scale = _scale(lines, [*include, *(value for value, _ in marks)])
    parts = [*scale.axes(), *(part for value, label in marks for part in _draw_mark(scale, value, label))]
    for line in sorted(lines, key=lambda line: not line.faint):
        parts += _draw_line(scale, line)
    shown = [line for line in lines if not line.faint]
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>'
        + (f"<p>{escape(note)}</p>" if note else "")
        + f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-chart="{escape(_pointer_data(scale, shown))}">{"".join(parts)}</svg>{_legend(shown)}</figure>'
    )


@dataclass(frozen=True)
class _Scale:
    """Ranges of the axes, and the left end of the horizontal one in the units of the viewBox."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @cached_property
    def y_labels(self):
        return axis_labels(ticks(self.y_low, self.y_high))

    @cached_property
    def left(self):
        return round(DIGIT * max(len(label) for label in self.y_labels.values())) + 8

    def x_of(self, x):
        return self.left + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - self.left - RIGHT)

    def y_of(self, y):
        return TOP + (self.y_high - y) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def axes(self):
        """Yield the grid, the ticks with their labels, and the axes."""
        left, bottom = self.left, HEIGHT - BOTTOM
        for value, label in self.y_labels.items():
            y = self.y_of(value)
            yield f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
        for value in ticks(self.x_low, self.x_high):
            if value != int(value):
                continue
            x = self.x_of(value)
            anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
            yield f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            yield f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:,.0f}</text>'
        yield f'<path class="axis" d="M{left} {TOP}V{bottom}H{WIDTH - RIGHT}"/>'


def _scale(lines, include):
    """Return a scale that holds the lines, their bands, and further values of the vertical axis."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    ys += [y for line in lines for _, low, high in line.band for y in (low, high) if math.isfinite(y)]
    ys += include
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = min(ys), max(ys)
    margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    return _Scale(x_low, x_high, y_low - margin, y_high + margin)


def _draw_mark(scale, value, label):
    y = scale.y_of(value)
    yield f'<line class="mark" x1="{scale.left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    yield f'<text class="mark" x="{WIDTH - RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">{escape(label)}</text>'


def _draw_line(scale, line):
    """Yield a line's band, the line, and its points if they are few."""
    color = f'style="--c:{line.color}"'
    points = [(scale.x_of(x), scale.y_of(y)) for x, y in line.points]
    if line.band:
        ahead = [(x, high) for x, _, high in line.band if math.isfinite(high)]
        back = [(x, low) for x, low, _ in reversed(line.band) if math.isfinite(low)]
        corners = " ".join(f"{scale.x_of(x):.1f},{scale.y_of(y):.1f}" for x, y in ahead + back)
        yield f'<polygon class="band" {color} points="{corners}"/>'
    dash = f' stroke-dasharray="{DASHES[line.style]}"' if DASHES[line.style] else ""
    yield f'<path class="{"faint" if line.faint else "line"}" {color}{dash} d="{_path(points)}"/>'
    if not line.faint and len(points) <= 40:
        for x, y in points:
            if math.isfinite(y):
                yield f'<circle {color} cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>'


def _pointer_data(scale, lines):
    """Return the JSON by which the page's script finds the step under the pointer and writes the lines' values."""
    data = {
        "x": [scale.x_low, scale.x_high],
        "box": [scale.left, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "lines": [
            {"label": line.label, "color": line.color, "points": [(x, y) for x, y in line.points if math.isfinite(y)]}
            for line in lines
        ],
    }
    return as_json(data)


def _legend(lines):
    entries = "".join(
        f'<li><svg width="26" height="8" aria-hidden="true"><line x1="1" x2="25" y1="4" y2="4" class="line" '
        f'style="--c:{line.color}" stroke-dasharray="{DASHES[line.style]}"/></svg>{escape(line.label)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{entries}</ul>'


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
