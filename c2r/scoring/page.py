"""The page of an evaluation."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from c2r.files import write_atomic
from c2r.metrics.catalogue import question_of
from c2r.reporting.colors import RUN_COLORS, STYLES
from c2r.reporting.curves import Line, chart, four_decimals
from c2r.reporting.html import data_address, html_page, table
from c2r.reporting.sample_videos import MAX_VIDEO_BYTES
from c2r.scoring.measuring import Source
from c2r.scoring.picture import draw_scores
from c2r.scoring.results import PAGE, PICTURE, TOO_FEW, Evaluation, earlier_scenes, interval_text, is_beyond_chance
from c2r.scoring.scenes import Scene
from c2r.scoring.side_by_side import remove_earlier_files, write_side_by_side
from c2r.units import size_text

#: A click stops a video, and starts it again: a player's buttons would cover the street.
PAUSE = "this.paused ? this.play() : this.pause()"

BETTER = {True: "higher is better", False: "lower is better", None: ""}

#: Rows of the table of validations: what a number is called, and where it stands.
VALIDATION = {
    "loss with the right conditions": "loss",
    "of real clips": "loss_real",
    "of CG clips": "loss_cg",
    "with another clip's control": "loss_other_control",
    "with no control": "loss_no_control",
    "with another clip's prompt": "loss_other_prompt",
    "control gain": "control_gain",
    "prompt gain": "prompt_gain",
    "leak by coarse versions": "leak_share_coarse",
    "leak by an altered look": "leak_share_augmented",
}


def write_results(
    evaluation: Evaluation, sources: Sequence[Source], scenes: Sequence[Scene], output_dir: Path
) -> None:
    """Write results.json, clips.csv, plot.png, report.html and a video of each scene, in place of earlier ones."""
    remove_earlier_files(output_dir, scenes, earlier_scenes(output_dir))
    evaluation.write(output_dir)
    picture = draw_scores(evaluation.scores)
    write_atomic(output_dir / PICTURE, picture)
    columns, videos = write_side_by_side(sources, scenes, evaluation.form, output_dir)
    prompts = {scene.name: scene.prompt for scene in scenes}
    page = evaluation_page(evaluation, picture, videos, columns, prompts)
    write_atomic(output_dir / PAGE, page.encode())


def evaluation_page(
    evaluation: Evaluation, picture: bytes, videos: Mapping[str, Path], columns: list[str], prompts: Mapping[str, str]
) -> str:
    """Return the HTML of a page on an evaluation.

    Args:
        evaluation: what it has found.
        picture: PNG of `draw_scores`.
        videos: {scene: mp4 of its videos side by side}.
        columns: what stands side by side.
        prompts: {scene: prompt}.
    """
    sections = [
        ("Measures", _measures(evaluation, picture)),
        ("Differences", _differences(evaluation)),
        ("Validation", _validation(evaluation)),
        ("What is missing", "".join(f"<p>{escape(line)}</p>" for line in evaluation.remarks)),
        ("Clips", _clips(videos, columns, prompts)),
        ("Settings", _settings(evaluation)),
    ]
    names = [*evaluation.scores.values]
    return html_page(
        f"Evaluation of {names[0]}" if len(names) == 1 else f"Evaluation of {len(names)} sources", sections
    )


def _key(evaluation, source):
    """Return a source's name with its colour."""
    number = [*evaluation.scores.values].index(source)
    return f'<span class="key" style="--c:{RUN_COLORS[number % len(RUN_COLORS)]}">{escape(source)}</span>'


def _measures(evaluation, picture):
    scores = evaluation.scores
    rows = []
    for name, measure in scores.measures.items():
        against = "" if measure.against == "itself" else f"against {measure.against}"
        notes = ", ".join(filter(None, (against, BETTER[measure.higher_is_better])))
        heading = f'{escape(name)}<br><span class="small">{escape(notes or measure.unit)}</span>'
        heading += f'<br><span class="small">{escape(question_of(name))}</span>'
        rows.append([heading, *(_interval_cell(scores.interval(source, name)) for source in scores.values)])
    body = table(["", *(_key(evaluation, source) for source in scores.values)], rows, "summary")
    seeds = f", {evaluation.num_seeds} seeds each, which are averaged" if evaluation.num_seeds > 1 else ""
    note = (
        f"Means over {len(scores.scenes)} clips of {evaluation.form}{seeds}, with intervals of 95 %: studentised "
        "bootstrap over clips; of distances of sets, jackknife; of the CG look, by the first seed of each clip, with "
        "the error of the clips that it compares with."
    )
    body = f"<p>{escape(note)}</p>{body}"
    looks = [f"<p>{_key(evaluation, source)}: {escape(look)}</p>" for source, look in evaluation.cg_looks.items()]
    if looks:
        body += (
            "<p>CG look: 0 is like the real clips of the training, 1 like its CG clips. A measure against a coarse "
        )
        body += "control also rises when the look of the control is copied: read it beside the CG look.</p>"
        body += "".join(looks)
    image = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    width = 'style="width: 100%; min-width: 760px; height: auto"'
    return f'{body}<div class="scroll"><img {width} alt="Measures of all sources with intervals" src="{image}"></div>'


def _interval_cell(interval):
    mean, bracket, bounds = interval_text(interval).partition(" [")
    return escape(mean) + (f'<br><span class="small">{escape(bracket.strip() + bounds)}</span>' if bracket else "")


def _differences(evaluation):
    if not evaluation.differences:
        return ""
    rows = []
    for d in evaluation.differences:
        verdict = evaluation.verdict(d)
        if is_beyond_chance(d):
            verdict = f"<b>{verdict}</b>"
        pair = f"{_key(evaluation, d.second)}<br>− {_key(evaluation, d.first)}"
        difference = escape(interval_text(d.interval, sign=True))
        rows.append([escape(d.measure), difference, f"{d.p_value:.2g}", str(d.clips), verdict, pair])
    found = sum(map(is_beyond_chance, evaluation.differences))
    verdict = f"{found} of {len(rows)} differences {'is' if found == 1 else 'are'} beyond chance."
    undecided = sum(evaluation.verdict(d) == TOO_FEW for d in evaluation.differences)
    if undecided:
        verdict += (
            f" {undecided} cannot be: with {len(rows)} differences it takes {evaluation.clips_needed} clips to tell."
        )
    note = (
        "Both sources are measured on the same clips, so the values of each clip are subtracted before they are "
        "averaged. p: permutation of the signs of these differences, corrected by Holm for all rows of the table; at "
        "most 0.05 is beyond chance. The intervals are of one difference each and not corrected: of many rows, some "
        "exclude 0 by chance. Another training with another seed is not in it."
    )
    body = table(["", "difference", "p", "clips", "", "pair"], rows, "numbers")
    return f'<p class="verdict">{verdict}</p>{body}<p class="small">{note}</p>'


def _validation(evaluation):
    losses = evaluation.losses
    if not losses:
        return ""
    rows = []
    for text, name in VALIDATION.items():
        values = [found.numbers.get(name) for found in losses.values()]
        if any(value is not None for value in values):
            rows.append([escape(text), *("–" if value is None else four_decimals(value) for value in values)])
    for domain, named in (("real", "real"), ("cg", "CG")):
        intervals = [found.intervals.get(f"control_gain_{domain}") for found in losses.values()]
        if any(intervals):
            cells = ["–" if interval is None else escape(interval_text(interval)) for interval in intervals]
            rows.append([f"control gain of {named} clips", *cells])
    rows.append(["held-out clips", *(_clips_text(found) for found in losses.values())])
    body = table(["", *map(escape, losses)], rows, "summary")
    lines = []
    for number, (model, found) in enumerate(losses.items()):
        prefix = "control_gain_sigma_"
        points = [
            (round(1000 * float(name.removeprefix(prefix))), value)
            for name, value in found.numbers.items()
            if name.startswith(prefix)
        ]
        lines.append(Line(model, points, RUN_COLORS[number % len(RUN_COLORS)], STYLES[number % len(STYLES)]))
    gains = chart(
        "Control gain by noise level",
        lines,
        "Over the timestep: 1000 is pure noise, where the layout is decided.",
        marks=[(0, "ignored")],
    )
    note = "The numbers of the models' own training: loss on held-out clips, with the right conditions and wrong ones."
    return f'<p>{note}</p>{body}<div class="charts">{gains}</div>'


def _clips_text(found):
    return " and ".join(f"{count} {'CG' if domain == 'cg' else domain}" for domain, count in found.clips.items())


def _clips(videos, columns, prompts):
    parts, room, left_out = [], MAX_VIDEO_BYTES, 0
    heads = "".join(f"<span>{escape(name)}</span>" for name in columns)
    grid = f'style="grid-template-columns: repeat({len(columns)}, 1fr)"'
    for scene, path in videos.items():
        size = path.stat().st_size
        if size > room:
            left_out += 1
            continue
        room -= size
        address = data_address(path, "video/mp4")
        video = f'<video autoplay loop muted playsinline onclick="{PAUSE}" src="{address}"></video>'
        width = f"min-width: {130 * len(columns)}px"
        parts.append(
            f'<h3>{escape(scene)}</h3><p>{escape(prompts[scene])}</p><figure class="sample"><div class="scroll">'
            f'<div class="row" style="{width}"><div class="columns" {grid}>{heads}</div>{video}'
            "</div></div></figure>"
        )
    note = "<p>A click stops a video, another one lets it run.</p>" if parts else ""
    more = f"<p>{left_out} more would make the page larger than {size_text(MAX_VIDEO_BYTES)}.</p>" if left_out else ""
    return note + "".join(parts) + more


def _settings(evaluation):
    rows = [
        [
            f"<code>--{escape(name)}</code>",
            escape(" ".join(map(str, value)) if isinstance(value, list) else str(value)),
        ]
        for name, value in evaluation.settings.items()
        if value is not None
    ]
    return table(["", ""], rows, "options")
