"""The section of a run's page that compares it with another run clip by clip."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from c2r.reporting.colors import color_of, key_of
from c2r.reporting.curves import Line, chart, number_text
from c2r.reporting.html import table
from c2r.reporting.pairs import Difference, common_steps, difference, paired_clips
from c2r.reporting.run_folder import RunFolder


def comparison_section(a: RunFolder, b: RunFolder, runs: Sequence[RunFolder]) -> str:
    """Return the HTML that compares run b with run a; `runs` are those of the page, for their colours."""
    heading = f"<h3>{key_of(runs, b)} against {key_of(runs, a)}</h3>"
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
    color = color_of(runs, b)
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
