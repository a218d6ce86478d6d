"""The section of a run's page with its sample videos."""

from collections.abc import Sequence
from html import escape

from c2r.reporting.colors import key_of
from c2r.reporting.html import data_address
from c2r.reporting.run_folder import RunFolder
from c2r.training.output_files import SAMPLE_COLUMNS
from c2r.units import size_text

#: All videos of a page together, in bytes; in base64 they take a third more.
MAX_VIDEO_BYTES = 40_000_000


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


def samples_section(runs: Sequence[RunFolder]) -> str:
    """Return the HTML of the samples of all runs, step by step."""
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
                label = f"step {step:,}" if len(runs) == 1 else f"{key_of(runs, run)}, step {step:,}"
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
