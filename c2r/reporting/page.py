"""The page of one or several runs: HTML with everything in it, so that it can be mailed and opened offline."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from c2r.reporting.curves import Line, chart, four_decimals, number_text, points_of, smoothed
from c2r.reporting.html import data_address, html_page, table
from c2r.reporting.pairs import Difference, common_steps, difference, paired_clips
from c2r.reporting.run_folder import RunFolder
from c2r.training.output_files import SAMPLE_COLUMNS
from c2r.units import size_text

#: Colours of the runs, and of the lines of a run that stands alone; told apart without colour by the dashes.
RUN_COLORS = ("#1f5fbf", "#c9510c", "#2e7d32", "#8e24aa", "#00838f", "#6d4c41")
ONE_RUN_COLORS = ("#1f5fbf", "#c9510c", "#2e7d32", "#8e24aa")
STYLES = ("solid", "dashed", "dotted", "dash-dotted")

#: All videos of a page together, in bytes; in base64 they take a third more.
MAX_VIDEO_BYTES = 40_000_000

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
#: The table at the top: what a number is called, and where it stands.
SUMMARY = {
    "loss with the right conditions": "validation/loss",
    "with another clip's control": "validation/loss_other_control",
    "with no control": "validation/loss_no_control",
    "with another clip's prompt": "validation/loss_other_prompt",
    "control gain": "validation/control_gain",
    "prompt gain": "validation/prompt_gain",
    "leak by coarse versions": "validation/leak_share_coarse",
    "leak by an altered look": "validation/leak_share_augmented",
    "CG share so far": "train/cg_share",
}


def report_page(runs: Sequence[RunFolder]) -> str:
    """Return the HTML of a page on these runs; with several, each is compared with the first."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    sections = [
        ("Where they stand" if len(runs) > 1 else "Where it stands", _summary(runs)),
        ("Compared clip by clip", "".join(_comparison(runs[0], run, runs) for run in runs[1:])),
        ("Curves", _curves(runs)),
        ("Samples", _samples(runs)),
        ("Options", _options(runs)),
        ("Versions and commands", _environment(runs)),
        ("Not on this page", _missing(runs)),
    ]
    return html_page(title, sections)


def _color(runs, run):
    return RUN_COLORS[[*runs].index(run) % len(RUN_COLORS)]


def _key(runs, run):
    """Return a run's name with its colour."""
    return f'<span class="key" style="--c:{_color(runs, run)}">{escape(run.name)}</span>'


# ------------------------------------------------------------------------------------------------------------- summary


def _summary(runs):
    rows = [["status", *(escape(run.status) for run in runs)]]
    rows.append(["phase", *(str(run.phase or "–") for run in runs)])
    rows.append(["best/", *(_best_cell(run) for run in runs)])
    for label, name in SUMMARY.items():
        values = [run.last(name) for run in runs]
        if any(value is not None for value in values):
            rows.append([escape(label), *("–" if value is None else four_decimals(value) for value in values)])
    if any(run.last("monitor/cg_look") is not None for run in runs):
        rows.append(["CG look and 90 % interval", *(_look_cell(run) for run in runs)])
    clips = [_clips_text(run) for run in runs]
    if any(clips):
        rows.append(["validation clips", *(text or "–" for text in clips)])
    note = "Numbers are those of the last validation, or of the last step."
    return f"<p>{note}</p>" + table(["", *(_key(runs, run) for run in runs)], rows, "summary")


def _best_cell(run):
    if run.best_step is None:
        return "–"
    value = run.numbers[f"validation/{run.best_by}"][run.best_step]
    return f"{run.best_by.replace('_', ' ')} {four_decimals(value)} at step {run.best_step:,}"


def _look_cell(run):
    look, low, high = (run.last(f"monitor/cg_look{ending}") for ending in ("", "_low", "_high"))
    if look is None:
        return "–"
    return f"{look:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def _clips_text(run):
    if not run.validations:
        return ""
    last = run.validations[max(run.validations)]
    domains = [clip["domain"] for clip in last["clips"]]
    counted = [f"{domains.count(d)} {'CG' if d == 'cg' else d}" for d in ("real", "cg") if d in domains]
    return f"{' and '.join(counted)}, each at {len(last['sigmas'])} noise levels"


# ---------------------------------------------------------------------------------------------------------- comparison


def _comparison(a, b, runs):
    """Return the comparison of a run with the first one."""
    heading = f"<h3>{_key(runs, b)} against {_key(runs, a)}</h3>"
    for run in (a, b):
        if not run.validations:
            return (
                f"{heading}<p>{escape(run.name)} has no losses of single clips: no paired comparison is possible.</p>"
            )
    if a.phase != b.phase:
        return f"{heading}<p>No paired comparison: the runs are of different phases, with other losses.</p>"
    steps = common_steps(a, b)
    if not steps:
        return (
            f"{heading}<p>No paired comparison is possible: the runs have no step at which both validated, or other "
            "validation clips or noise levels.</p>"
        )
    step = steps[-1]
    first, second = a.validations[step], b.validations[step]
    loss = difference(first, second)
    assert loss is not None
    body = f'<p class="verdict">{_verdict(a, b, loss, step)}</p>'
    rows = []
    for label, arguments in _compared(first):
        found = difference(first, second, **arguments)
        if found is not None:
            rows.append([escape(label), *_difference_cells(found), str(found.clips), _reading(found)])
    differences = table(["", "difference", "± standard error", "clips", ""], rows, "numbers")
    curve = [(step, difference(a.validations[step], b.validations[step])) for step in steps]
    gain = [(step, difference(a.validations[step], b.validations[step], "other_control", "right")) for step in steps]
    color = _color(runs, b)
    charts = chart(
        f"Validation loss, {b.name} − {a.name}",
        [_difference_line("difference, ± 2 standard errors", curve, color)],
        marks=[(0, "equal")],
        note="Below 0 the run is better.",
    )
    charts += chart(
        f"Control gain, {b.name} − {a.name}",
        [_difference_line("difference, ± 2 standard errors", gain, color)],
        marks=[(0, "equal")],
        note="Above 0 the run follows the control more.",
    )
    total = max(len(first["clips"]), len(second["clips"]))
    only = "" if loss.clips == total else f" Only {loss.clips} of {total} clips are in both runs."
    note = (
        "Both runs are validated on the same clips with the same noise, so the losses of each clip are subtracted "
        "before they are averaged; domains have the same weight. The standard error is that of the mean over the "
        f"clips: it does not include what another --seed would change.{only}{_wrong_conditions_note(first, second)}"
    )
    differences += f'<p class="small">{note}</p>'
    return f'{heading}{body}<div class="compared"><div>{differences}</div><div class="charts">{charts}</div></div>'


def _verdict(a, b, loss, step):
    size = f"{number_text(_rounded(abs(loss.mean), loss.error))} ± {number_text(_rounded(loss.error, loss.error))}"
    if not math.isfinite(loss.error):
        size = f"{number_text(abs(loss.mean))}, without an error, since a domain has one clip"
    where = f"at step {step:,}, the last at which both validated ({loss.clips} clip{'s' * (loss.clips != 1)})"
    if loss.mean == 0:
        return f"Validation loss: <b>{escape(b.name)}</b> and <b>{escape(a.name)}</b> are equal {where}."
    direction = "below" if loss.mean < 0 else "above"
    unclear = "" if loss.is_clear else " That is within the uncertainty."
    names = f"<b>{escape(b.name)}</b> {direction} <b>{escape(a.name)}</b>"
    return f"Validation loss: {names} by <b>{size}</b> {where}.{unclear}"


def _wrong_conditions_note(first, second):
    """Return a sentence if the runs have other wrong conditions for some of their common clips, otherwise ""."""
    pairs = len(paired_clips(first, second))
    if all(len(paired_clips(first, second, name)) == pairs for name in ("other_control", "other_prompt")):
        return ""
    return (
        " The wrong control or prompt of some clips is another in each run, since their sets of validation clips "
        "differ: rows with such a condition have only the clips for which it is the same, or are left out."
    )


def _compared(entry) -> Iterator[tuple[str, dict]]:
    """Yield the rows of the comparison: a label and arguments of `difference`."""
    yield "loss, right conditions", {}
    for domain, label in (("real", "real clips"), ("cg", "CG clips")):
        yield f"… {label}", {"domain": domain}
    for level, sigma in enumerate(entry["sigmas"]):
        yield f"… at noise level {sigma:.2f}", {"level": level}
    for condition, label in (("other_control", "another clip's control"), ("no_control", "no control")):
        yield f"loss, {label}", {"condition": condition}
    yield "control gain", {"condition": "other_control", "against": "right"}
    yield "prompt gain", {"condition": "other_prompt", "against": "right"}
    yield "leak by coarse versions", {"condition": "coarse", "against": "right"}


def _rounded(value, error):
    """Round to two digits of the error."""
    if not (math.isfinite(error) and error > 0):
        return value
    return round(value, 1 - math.floor(math.log10(error)))


def _difference_cells(found: Difference):
    """Return the mean with its sign, and the error, both to two digits of the error."""
    if not math.isfinite(found.error):
        return [f"{found.mean:+.4f}".replace("-", "−"), "–"]
    decimals = 4 if found.error == 0 else min(6, max(0, 1 - math.floor(math.log10(found.error))))
    return [f"{found.mean:+.{decimals}f}".replace("-", "−"), f"{found.error:.{decimals}f}"]


def _reading(found: Difference):
    if not math.isfinite(found.error):
        return "one clip in a domain"
    return "" if found.is_clear else "within the uncertainty"


def _difference_line(label, curve, color):
    curve = [(step, found) for step, found in curve if found is not None]
    band = [
        (step, found.mean - 2 * found.error, found.mean + 2 * found.error)
        for step, found in curve
        if math.isfinite(found.error)
    ]
    return Line(label, [(step, found.mean) for step, found in curve], color, band=band)


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(runs):
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
            color = ONE_RUN_COLORS[i % 4] if len(runs) == 1 else _color(runs, run)
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
        lines.append(Line(label if len(runs) == 1 else f"{run.name}, {label}", points, _color(runs, run)))
        if held_out := run.numbers.get("validation/loss_as_trained"):
            label = "held-out clips" if len(runs) == 1 else f"{run.name}, held-out clips"
            lines.append(
                Line(label, points_of(held_out), ONE_RUN_COLORS[1] if len(runs) == 1 else _color(runs, run), STYLES[1])
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
        lines.append(Line("CG look" if len(runs) == 1 else run.name, points_of(look), _color(runs, run), band=band))
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


# ------------------------------------------------------------------------------------------------------------- samples


def chosen_videos(runs: Sequence[RunFolder], room: int = MAX_VIDEO_BYTES) -> tuple[list[dict], str]:
    """Choose the sample videos that fit on the page.

    Args:
        runs: the runs.
        room: bytes of all videos together.

    Returns:
        {step: {number: path}} for each run, and a sentence on what was left out, "" if nothing was.
    """
    chosen = [dict(run.videos) for run in runs]
    if _bytes(chosen) <= room:
        return chosen, ""
    kept = []
    for run, videos in zip(runs, chosen):
        steps = [*videos]
        near_best = min(steps, key=lambda step: abs(step - (run.best_step or 0)), default=None)
        kept.append({step: videos[step] for step in sorted({*steps[:1], near_best, *steps[-1:]} - {None})})
    left_out = "the first, the best and the last step of each run are shown"
    count = max((number for videos in kept for row in videos.values() for number in row), default=-1) + 1
    while _bytes(kept) > room and count > 0:
        count -= 1
        kept = [{s: {n: p for n, p in row.items() if n < count} for s, row in v.items()} for v in kept]
        left_out = f"the first, the best and the last step of each run are shown, and {count} samples of each"
    kept = [{step: row for step, row in videos.items() if row} for videos in kept]
    return kept, f"All videos would take {size_text(_bytes(chosen))}, so {left_out}."


def _bytes(chosen):
    return sum(path.stat().st_size for videos in chosen for row in videos.values() for path in row.values())


def _samples(runs):
    chosen, left_out = chosen_videos(runs)
    steps = sorted({step for videos in chosen for step in videos})
    if not steps:
        return f"<p>{escape(left_out)}</p>" if left_out else ""
    numbers = sorted({number for videos in chosen for row in videos.values() for number in row})
    buttons = "".join(f'<button type="button" data-step="{step}">{step:,}</button>' for step in steps)
    parts = [
        f'<div class="steps" hidden><span>Step</span>{buttons}<button type="button" class="play">Play</button></div>'
    ]
    columns = "".join(f"<span>{escape(name)}</span>" for name in SAMPLE_COLUMNS)
    for sample in numbers:
        figures = []
        for step in steps:
            for run, videos in zip(runs, chosen):
                path = videos.get(step, {}).get(sample)
                if path is None:
                    continue
                label = f"step {step:,}" if len(runs) == 1 else f"{_key(runs, run)}, step {step:,}"
                video = (
                    '<video controls loop muted playsinline preload="metadata" '
                    f'src="{data_address(path, "video/mp4")}"></video>'
                )
                figures.append(
                    f'<figure class="sample" data-step="{step}"><figcaption>{label}</figcaption><div class="scroll">'
                    f'<div class="row"><div class="columns">{columns}</div>{video}</div></div></figure>'
                )
        prompts = {run.captions.get(f"samples/{sample}") for run in runs} - {None}
        prompt = f"<p>{escape(' / '.join(sorted(prompts)))}</p>" if prompts else ""
        parts.append(f"<h3>Sample {sample}</h3>{prompt}{''.join(figures)}")
    note = "Controls, prompts and seeds are the same at every step."
    return f"<p>{note} {escape(left_out)}</p>{''.join(parts)}"


# ------------------------------------------------------------------------------------------ options, versions, missing


def _options(runs):
    known = [run for run in runs if run.start is not None]
    if not known:
        return ""
    names = sorted({name for run in known for name in run.start["options"]})
    rows = {name: [_value(run.start["options"].get(name)) for run in known] for name in names}
    differing = {name: values for name, values in rows.items() if len(set(values)) > 1}
    head = ["", *(_key(runs, run) for run in known)]
    parts = []
    if len(known) > 1:
        if differing:
            parts.append("<h3>What differs</h3>")
            parts.append(table(head, [[_code(name), *values] for name, values in differing.items()], "options"))
        else:
            parts.append("<p>All options are equal.</p>")
    all_options = table(head, [[_code(name), *values] for name, values in rows.items()], "options")
    parts.append(f"<details><summary>All {len(rows)} options</summary>{all_options}</details>")
    return "".join(parts)


def _value(value):
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return "<br>".join(escape(str(entry)) for entry in value)
    return escape(number_text(value) if type(value) in (int, float) else str(value))


def _code(name):
    return f"<code>--{escape(name)}</code>"


def _environment(runs):
    known = [run for run in runs if run.start is not None]
    if not known:
        return ""
    names = sorted({name for run in known for name in run.start["environment"]})
    rows = [["C2R", *(escape(run.start["version"]) for run in known)]]
    rows.append(["started", *(escape(run.start["started"]) for run in known)])
    rows += [[escape(name), *(escape(run.start["environment"].get(name, "–")) for run in known)] for name in names]
    rows.append(["folder", *(f"<code>{escape(str(run.path))}</code>" for run in known)])
    parts = [table(["", *(_key(runs, run) for run in known)], rows)]
    for run in known:
        stopped = run.status.startswith("stopped")
        label = "to continue" if stopped else "how it was started"
        command = run.start["resume" if stopped else "command"]
        name = "" if len(runs) == 1 else f"{_key(runs, run)}, "
        parts.append(
            f'<div class="command"><p>{name}{label}</p><pre tabindex="0">{escape(command)}</pre>'
            '<button type="button" class="copy" hidden>Copy</button></div>'
        )
    return "".join(parts)


def _missing(runs):
    lines = [(run, line) for run in runs for line in run.missing]
    return "".join(f"<p>{escape(run.name)} has no {escape(line)}.</p>" for run, line in lines)
