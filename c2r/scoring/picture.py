"""A picture of an evaluation: each measure with its interval and its clips, for each source."""

import io
import math

from c2r.reporting.colors import RUN_COLORS
from c2r.scoring.measuring import Scores

#: Measures in a row of the picture.
COLUMNS = 3


def draw_scores(scores: Scores) -> bytes:
    """Draw the measures of all sources.

    Returns:
        a PNG file, byte for byte the same for the same scores.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources, names = [*scores.values], [*scores.measures]
    rows = max(1, math.ceil(len(names) / COLUMNS))
    figure = Figure(figsize=(12, rows * (1.1 + 0.32 * len(sources))), dpi=100, layout="constrained")
    places = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True)
    for axes, name in zip(places.flat, names):
        measure = scores.measures[name]
        for row, source in enumerate(sources):
            color = RUN_COLORS[row % len(RUN_COLORS)]
            interval = scores.interval(source, name)
            if name not in scores.distances:
                clips = [*scores.of_clips(source, name).values()]
                axes.plot(clips, [row] * len(clips), "|", color=color, alpha=0.35, markersize=9)
            if math.isfinite(interval.low):
                axes.plot([interval.low, interval.high], [row, row], color=color, linewidth=2.2)
            if math.isfinite(interval.mean):
                axes.plot([interval.mean], [row], "o", color=color, markersize=6)
        better = {True: "right is better", False: "left is better", None: measure.unit}[measure.higher_is_better]
        axes.set_title(f"{name} ({better})", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=8)
    for axes in [*places.flat][len(names) :]:
        axes.set_visible(False)
    places[0, 0].set_yticks(range(len(sources)), sources)
    places[0, 0].set_ylim(len(sources) - 0.5, -0.5)
    png = io.BytesIO()
    # Without the version of matplotlib in the file, which would change its bytes.
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return png.getvalue()
