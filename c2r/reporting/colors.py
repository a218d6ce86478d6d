"""Colours of runs on pages and in pictures."""

from collections.abc import Sequence
from html import escape

from c2r.reporting.run_folder import RunFolder

#: Colours of the runs, and of the lines of a run that stands alone; told apart without colour by the dashes.
RUN_COLORS = ("#1f5fbf", "#c9510c", "#2e7d32", "#8e24aa", "#00838f", "#6d4c41")
ONE_RUN_COLORS = ("#1f5fbf", "#c9510c", "#2e7d32", "#8e24aa")
STYLES = ("solid", "dashed", "dotted", "dash-dotted")


def color_of(runs: Sequence[RunFolder], run: RunFolder) -> str:
    """Return the colour of one of the runs."""
    return RUN_COLORS[[*runs].index(run) % len(RUN_COLORS)]


def key_of(runs: Sequence[RunFolder], run: RunFolder) -> str:
    """Return a run's name with its colour, as HTML."""
    return f'<span class="key" style="--c:{color_of(runs, run)}">{escape(run.name)}</span>'
