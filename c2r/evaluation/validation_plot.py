"""A picture of the validations of a run."""

import io
import math
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from c2r.evaluation.validation import GAINS, LEAK_BOUND
from c2r.files import write_atomic
from c2r.training.trackers import log_picture

#: Labels of the losses in the first part of the picture.
LOSSES = {
    "loss": "right conditions",
    "loss_other_control": "another clip's control",
    "loss_no_control": "no control",
    "loss_other_prompt": "another clip's prompt",
}

#: Labels of the leaks in the third part.
LEAKS = {"leak_share_coarse": "leak (coarse version)", "leak_share_augmented": "leak (augmented)"}


def draw_history(history: list[dict[str, float]]) -> bytes:
    """Draw three curves over the steps: losses, gain by noise level, and gains with the leak.

    Args:
        history: the validations in order, each with its `step` and its `validation_metrics`.

    Returns:
        a PNG file, byte for byte the same for the same history.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4.2), dpi=100, layout="constrained")
    losses, levels, gains = figure.subplots(1, 3)
    for name, label in LOSSES.items():
        _curve(losses, history, name, label)
    losses.set_title("validation loss")

    gain = next((name for name in GAINS if name in history[-1]), "prompt_gain")
    by_level = [name for name in history[-1] if name.startswith(f"{gain}_sigma_")]
    for i, name in enumerate(by_level):  # more noise is darker
        shade = str(0.7 * (1 - i / max(1, len(by_level) - 1)))
        _curve(levels, history, name, f"at sigma {name.rpartition('_')[2]}", color=shade)
    levels.set_title(f"{gain.replace('_', ' ')} by noise level")

    for name, color in zip(GAINS, ("C0", "C2")):
        _curve(gains, history, name, name.replace("_", " "), color=color)
    gains.set_title("gains")
    lines = gains.get_lines()
    if any(name in entry for entry in history for name in LEAKS):
        gains.set_title("gains, and leak")
        shares = gains.twinx()
        for name, style in zip(LEAKS, ("-", "--")):
            _curve(shares, history, name, LEAKS[name], color="C3", linestyle=style)
        shares.set_ylim(min(0, shares.get_ylim()[0]), max(1, shares.get_ylim()[1]))
        lines = [
            *lines,
            *shares.get_lines(),
            shares.axhline(LEAK_BOUND, color="C3", linestyle=":", label="too much"),
        ]
        shares.set_ylabel("leak: share of the real clips' control gain", color="C3")
        shares.tick_params(axis="y", colors="C3")
    for axes in (levels, gains):
        axes.axhline(0, color="black", linewidth=0.5)
    for entry in history:
        if "new_baseline" in entry:  # the numbers before it are of other clips or noise levels
            for axes in (losses, levels, gains):
                axes.axvline(entry["step"], color="black", linestyle="--", linewidth=0.8)
    for axes, shown in ((losses, losses.get_lines()), (levels, levels.get_lines()[:-1]), (gains, lines)):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.3)
        labels = [line.get_label() for line in shown]
        axes.legend(shown, labels, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    png = io.BytesIO()
    # Without the version of matplotlib in the file, which would change its bytes.
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return png.getvalue()


def _curve(axes, history, name, label, **style):
    points = []
    for entry in history:
        if "new_baseline" in entry:
            points.append((entry["step"], math.nan))  # breaks the line
        if name in entry:
            points.append((entry["step"], entry[name]))
    if points:
        axes.plot(*zip(*points), marker="o", markersize=3, label=label, **style)


def write_history(history: list[dict[str, float]], accelerator: Accelerator, output_dir: str | Path) -> None:
    """Write validation.png into the output folder, and log the same picture, from two validations on.

    Call it on the main process only.

    Args:
        history: see `draw_history`.
        accelerator: the run's.
        output_dir: the run's output folder.
    """
    if len(history) < 2:  # no curve yet, and the first step need not wait for Matplotlib
        return
    png = draw_history(history)
    write_atomic(Path(output_dir) / "validation.png", png)
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    log_picture(accelerator, "validation", picture, int(history[-1]["step"]))
