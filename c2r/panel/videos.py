"""The videos that the page shows: the control, the output, and the grid of a sweep; each with a line about it."""

import logging
import shutil
import time
from typing import TYPE_CHECKING

from c2r.panel.generation import Report, generate, parse_scales, sweep
from c2r.panel.jobs import Job, control_pixels
from c2r.panel.model import Panel

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


def show_control(panel: Panel, job: Job) -> tuple[str, str]:
    """Return the path of a video of the control, as the model sees it, and a line about it."""
    args = job.args
    line = (
        f"Control: the first {args.num_frames / args.fps:.2f} s of the coarse video, {args.num_frames} frames of "
        f"{args.height}x{args.width}"
    )
    return save(panel, "control", "control.mp4", control_pixels(job), args.fps), line


def generate_one(panel: Panel, job: Job, report: Report) -> tuple[str, str, str]:
    """Generate one video; return its path, a line about it, and the same as a command."""
    start = time.monotonic()
    frames = generate(panel, job, report)
    path = save(panel, "output", f"c2r-seed{job.args.seed}.mp4", frames, job.args.fps)
    return path, _summary(job, "Output", start), job.command


def generate_grid(panel: Panel, job: Job, scales: str, report: Report) -> tuple[str, str]:
    """Generate a video for each conditioning scale; return the path of their grid and a line about it."""
    start = time.monotonic()
    frames = sweep(panel, job, parse_scales(scales), report)
    path = save(panel, "grid", f"c2r-seed{job.args.seed}-scales.mp4", frames, job.args.fps)
    return path, _summary(job, "Comparison", start)


def save(panel: Panel, kind: str, name: str, frames: "np.ndarray", fps: float) -> str:
    """Write a video for the page to show, and delete the last one of its kind: the page has a copy of its own.

    Each kind is written by one kind of job, of which one runs at a time.
    """
    from c2r.data.video_writer import write_video

    shutil.rmtree(panel.folder / kind, ignore_errors=True)
    path = panel.folder / kind / name
    write_video(path, frames, fps)
    return str(path)


def _summary(job, what, start):
    line = f"{what}: seed {job.args.seed}, {job.args.num_inference_steps} steps, {time.monotonic() - start:.1f} s"
    logger.info(line)
    return line
