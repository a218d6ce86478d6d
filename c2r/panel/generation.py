"""Generate the video of a job, or one for each conditioning scale, step by step."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from c2r import InputError
from c2r.generation.video import generate as generate_video
from c2r.options import GENERATE
from c2r.panel.grid import arrange, grid_columns, labelled
from c2r.panel.jobs import Job, control_pixels
from c2r.panel.loras import added_lora
from c2r.panel.model import Panel

if TYPE_CHECKING:
    import numpy as np

#: Conditioning scales of a sweep: they bound the time for which the others in the queue wait.
MAX_SWEEP = 9

#: Called with (steps done, all steps, description); it may raise `Cancelled`.
Report = Callable[[int, int, str], None]


class Cancelled(Exception):
    """Raised between two steps of a job that its user has cancelled."""


def generate(panel: Panel, job: Job, report: Report, **changed: float) -> "np.ndarray":
    """Generate one video, (F, H, W, 3) uint8.

    Args:
        panel: the loaded model.
        job: see `prepare_job`.
        report: called before the first step and after each; if it raises, no further step runs.
        changed: options with other values than the job's.

    Raises:
        InputError: see `c2r.generation.video.generate`.
    """
    args = Namespace(**vars(job.args) | changed)
    steps = args.num_inference_steps

    def on_step_end(pipeline, step, timestep, tensors):
        report(step + 1, steps, "denoising" if step + 1 < steps else "decoding")
        return {}

    report(0, steps, "denoising")
    inputs = {"prompt": args.prompt[0], "negative_prompt": args.negative_prompt, "callback_on_step_end": on_step_end}
    with added_lora(panel.pipeline, job.lora):
        return generate_video(panel.pipeline, args, job.length, job.control, "the video", **inputs)


def parse_scales(text: str) -> list[float]:
    """Return the conditioning scales of a sweep, written as "0, 0.5, 1".

    Raises:
        InputError: there are none, too many, or one is no number of at least 0.
    """
    scales = []
    for word in re.split(r"[\s,;]+", text.strip()):
        try:
            scales.append(GENERATE.options["conditioning_scale"].type(word))
        except ValueError as error:
            raise InputError(f"Scales {text}: {word or 'nothing'} is {error}") from None
    if len(scales) > MAX_SWEEP:
        raise InputError(f"Scales {text}: {len(scales)} of them; give at most {MAX_SWEEP}")
    return scales


def sweep(panel: Panel, job: Job, scales: Sequence[float], report: Report) -> "np.ndarray":
    """Generate the same video with several conditioning scales; return them beside the control as one labelled grid.

    Returns:
        (F, H', W', 3) uint8.
    """
    columns = grid_columns(len(scales) + 1)
    cells = [labelled(control_pixels(job), "control", columns)]
    all_steps = job.args.num_inference_steps * len(scales)
    for number, scale in enumerate(scales):

        def report_of_all(step, steps, text, number=number, scale=scale):
            report(number * steps + step, all_steps, f"{text}, scale {scale:g}")

        frames = generate(panel, job, report_of_all, conditioning_scale=scale)
        cells.append(labelled(frames, f"scale {scale:g}", columns))
    return arrange(cells, columns)
