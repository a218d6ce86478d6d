"""The section of a run's page with its curves."""

from collections.abc import Sequence

from c2r.reporting.colors import ONE_RUN_COLORS, STYLES, color_of
from c2r.reporting.curves import Line, chart, points_of, smoothed
from c2r.reporting.run_folder import RunFolder

#: Above it, real clips owe more of their control gain to the look of the control than to its layout.
LEAK_BOUND = 0.5

LOSSES = {
    "validation/loss": "right conditions",
    "validation/loss_other_control": "another clip's control",
    "validation/loss_no_control": "no control",
    "validation/loss_other_prompt": "another clip's prompt",
}
GAINS = {"validation/control_gain": "control gain", "validation/prompt_gain": "prompt gain"}
LEAKS = {
    "validation/leak_share_coarse": "by coarse versions",
    "validation/leak_share_augmented": "by an altered look",
}


def curves_section(runs: Sequence[RunFolder]) -> str:
    """Return the HTML of the curves of all runs."""
    charts = [_training_loss(runs)]
    losses = LOSSES if len(runs) == 1 else dict([*LOSSES.items()][:3])  # more lines cannot be told apart
    charts.append(chart("Validation loss", _several(runs, losses), "Held-out clips under fixed noise."))
    note = "Loss with the wrong condition − loss."
    charts.append(chart("Gains", _several(runs, GAINS), note, marks=[(0, "ignored")]))
    charts += [_gain_by_level(runs, run) for run in runs]
    charts.append(
        chart(
            "Leak",
            _several(runs, LEAKS),
            "Share of the real clips' control gain that comes from the look of their control.",
            marks=[(LEAK_BOUND, "too much by coarse versions")],
            include=(0, 1),
        )
    )
    charts.append(_cg_look(runs))
    charts += [_cg_measures(runs, run) for run in runs]
    shares = {"train/cg_share": "CG share so far", "monitor/cg_ratio": "asked for"}
    charts.append(chart("CG share", _several(runs, shares), "Share of CG pairs among the samples.", include=(0,)))
    more = [
        chart(title, _several(runs, {name: label}), include=include)
        for title, name, label, include in (
            ("Gradient norm", "train/grad_norm", "before clipping", (0,)),
            ("Learning rate", "train/learning_rate", "learning rate", (0,)),
            ("Speed", "train/samples_per_second", "clips per second", (0,)),
            ("Memory", "train/gpu_memory_gib", "GiB reserved at the peak", (0,)),
            ("Share of real samples in the loss", "train/real_loss_share", "share", (0, 1)),
            ("Domain classifier", "train/domain_accuracy", "accuracy", (0, 1)),
        )
    ]
    shown = "".join(charts)
    folded = "".join(more)
    if folded:
        folded = (
            f'<details><summary>Training: gradient, rate, speed</summary><div class="charts">{folded}</div></details>'
        )
    return f'<div class="charts">{shown}</div>{folded}' if shown or folded else ""


def _several(runs, names):
    """Return the lines of some numbers: with one run by colour and dash, with several by the run's colour."""
    lines = []
    for run in runs:
        there = {name: label for name, label in names.items() if run.numbers.get(name)}
        for i, (name, label) in enumerate(there.items()):
            color = ONE_RUN_COLORS[i % 4] if len(runs) == 1 else color_of(runs, run)
            text = label if len(runs) == 1 else run.name if len(names) == 1 else f"{run.name}: {label}"
            lines.append(Line(text, points_of(run.numbers[name]), color, STYLES[[*names].index(name) % 4]))
    return lines


def _training_loss(runs):
    lines, window = [], 1
    for run in runs:
        series = run.numbers.get("train/loss", {})
        points, window = smoothed(series)
        if len(runs) == 1:
            lines.append(Line("each step", points_of(series), ONE_RUN_COLORS[0], faint=True))
        label = f"mean of {window} steps" if window > 1 else "loss"
        lines.append(Line(label if len(runs) == 1 else f"{run.name}, {label}", points, color_of(runs, run)))
        if held_out := run.numbers.get("validation/loss_as_trained"):
            label = "held-out clips" if len(runs) == 1 else f"{run.name}, held-out clips"
            lines.append(
                Line(
                    label, points_of(held_out), ONE_RUN_COLORS[1] if len(runs) == 1 else color_of(runs, run), STYLES[1]
                )
            )
    note = "It varies with the noise levels drawn; compare validations. Dashed: what it would be on held-out clips."
    return chart("Training loss", lines, note)


def _gain_by_level(runs, run):
    gain = "control_gain" if "validation/control_gain" in run.numbers else "prompt_gain"
    names = sorted(name for name in run.numbers if name.startswith(f"validation/{gain}_sigma_"))
    lines = []
    for i, name in enumerate(names):
        light = 62 - 40 * i / max(1, len(names) - 1)  # more noise is darker
        style = STYLES[3 - i % 4]
        color, label = f"hsl(215 45% {light:.0f}%)", f"σ {name.rpartition('_')[2]}"
        lines.append(Line(label, points_of(run.numbers[name]), color, style))
    which = gain.replace("_", " ").capitalize()
    title = f"{which} by noise level" + ("" if len(runs) == 1 else f", {run.name}")
    return chart(title, lines, "Much noise (dark): layout. Little noise: detail.", marks=[(0, "")])


def _cg_look(runs):
    lines = []
    for run in runs:
        look, low, high = (run.numbers.get(f"monitor/cg_look{ending}", {}) for ending in ("", "_low", "_high"))
        band = [(step, low[step], high[step]) for step in look if step in low and step in high]
        lines.append(Line("CG look" if len(runs) == 1 else run.name, points_of(look), color_of(runs, run), band=band))
    bounds = {bound for run in runs if type(bound := run.option("monitor_bound")) is float and abs(bound) < 10}
    marks = [(bounds.pop(), "bound")] if len(bounds) == 1 else []
    note = "0: like the real clips, 1: like the CG clips; 90 % interval."
    return chart("CG look of the samples", lines, note, marks, (0, 1))


def _cg_measures(runs, run):
    lines = []
    for i, measure in enumerate(("texture", "lighting", "geometry", "dinov3")):
        series = run.numbers.get(f"monitor/cg_{measure}", {})
        accuracy = run.last(f"monitor/cg_{measure}_accuracy")
        label = measure if accuracy is None else f"{measure} (separates {100 * accuracy:.0f} %)"
        lines.append(Line(label, points_of(series), ONE_RUN_COLORS[i], STYLES[i]))
    title = "CG look by measure" + ("" if len(runs) == 1 else f", {run.name}")
    return chart(title, lines, "A measure at 75 % or less, or that chance explains, does not count.", include=(0, 1))
