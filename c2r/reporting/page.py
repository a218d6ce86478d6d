"""The page of one or several runs: HTML with everything in it, so that it can be mailed and opened offline."""

from collections.abc import Sequence
from html import escape

from c2r.reporting.colors import key_of
from c2r.reporting.comparison import comparison_section
from c2r.reporting.curves import four_decimals, number_text
from c2r.reporting.html import html_page, table
from c2r.reporting.run_curves import curves_section
from c2r.reporting.run_folder import RunFolder
from c2r.reporting.sample_videos import samples_section

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
        ("Compared clip by clip", "".join(comparison_section(runs[0], run, runs) for run in runs[1:])),
        ("Curves", curves_section(runs)),
        ("Samples", samples_section(runs)),
        ("Options", _options(runs)),
        ("Versions and commands", _environment(runs)),
        ("Not on this page", _missing(runs)),
    ]
    return html_page(title, sections)


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
    return f"<p>{note}</p>" + table(["", *(key_of(runs, run) for run in runs)], rows, "summary")


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


def _options(runs):
    known = [run for run in runs if run.start is not None]
    if not known:
        return ""
    names = sorted({name for run in known for name in run.start["options"]})
    rows = {name: [_value(run.start["options"].get(name)) for run in known] for name in names}
    differing = {name: values for name, values in rows.items() if len(set(values)) > 1}
    head = ["", *(key_of(runs, run) for run in known)]
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
    parts = [table(["", *(key_of(runs, run) for run in known)], rows)]
    for run in known:
        stopped = run.status.startswith("stopped")
        label = "to continue" if stopped else "how it was started"
        command = run.start["resume" if stopped else "command"]
        name = "" if len(runs) == 1 else f"{key_of(runs, run)}, "
        parts.append(
            f'<div class="command"><p>{name}{label}</p><pre tabindex="0">{escape(command)}</pre>'
            '<button type="button" class="copy" hidden>Copy</button></div>'
        )
    return "".join(parts)


def _missing(runs):
    lines = [(run, line) for run in runs for line in run.missing]
    return "".join(f"<p>{escape(run.name)} has no {escape(line)}.</p>" for run, line in lines)
