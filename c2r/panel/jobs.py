"""A job: one video to generate, from the fields of the page to checked options of `c2r.generate` and a command."""

import shlex
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2r import InputError, cli
from c2r.generation.control import Length, follow_control, length_of, name_controls, read_padded
from c2r.generation.models import check_files
from c2r.generation.options import check_options, complete_options, default_options
from c2r.options import GENERATE
from c2r.panel.model import Panel
from c2r.panel.uploads import place_upload, require_within_limits

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass
class Job:
    """One video to generate: checked options of `c2r.generate`, and its control."""

    args: Namespace
    length: Length
    control: "torch.Tensor | None"  #: (F, 3, H, W) in [0, 1]
    command: str  #: the same as a command of `c2r.generate`
    lora: tuple[str, float] | None  #: path and scale of the LoRA that was chosen on the page


def prepare_job(
    panel: Panel, fields: dict[str, Any], files: Sequence[str] | None, lora: tuple[str, float] | None = None
) -> Job:
    """Check the fields of the page and read the coarse video.

    Args:
        panel: the loaded model.
        fields: {option of `c2r.generate`: value}; None is the option's default.
        files: paths of the upload: one video, or the pictures of a sequence; None is a video without control.
        lora: path and scale of a LoRA to add to the backbone, beside those of the command line.

    Raises:
        InputError: a value is out of range, or the upload is missing, beyond the limits or cannot be decoded.
    """
    from c2r.models.lora_file import LoraFile

    options = panel.given | fields
    if options.get("sequence_fps") == panel.args.fps:
        options["sequence_fps"] = None
    if lora is not None:
        options["lora"] = [*(options["lora"] or []), lora]
    defaults = vars(panel.contract) | default_options(panel.contract, options["guidance"])
    options = {name: value for name, value in options.items() if value != defaults.get(name)}
    shown = options | {"output": "out.mp4"}
    with tempfile.TemporaryDirectory(dir=panel.folder) as folder:
        if panel.has_control:
            placed = place_upload(files, Path(folder), panel.args.max_upload_mb)
            options["control_video"], shown["control_video"] = placed
        args = cli.parse(GENERATE, command_words(shown | options))
        check_options(args)
        complete_options(args, panel.contract)
        if args.num_frames > panel.args.num_frames:
            raise InputError(f"--num_frames {args.num_frames}: more than {panel.args.num_frames}; lower it")
        name_controls(args)
        path = args.control_video[0] if panel.has_control else None
        if path is not None:
            require_within_limits(path)
        if args.follow_control:
            follow_control(args)
        check_files(args, panel.contract, [LoraFile(file, scale) for file, scale in args.lora or []])
        length = length_of(args, path)
        control = None if path is None else read_padded(path, length, args.height, args.width)
    return Job(args, length, control, shlex.join(["python", "-m", "c2r.generate", *command_words(shown)]), lora)


def command_words(options: dict[str, Any]) -> list[str]:
    """Return the arguments of a `c2r.generate` command with these options, without those at their defaults."""
    words = []
    for name, value in options.items():
        if name == "lora":
            words += [word for path, scale in value or [] for word in ("--lora", f"{path}:{scale:g}")]
        elif value is True:
            words.append(f"--{name}")
        elif value is None or value is False or value == GENERATE.options[name].default:
            continue
        elif value != "" or name == "prompt":
            # A value that begins with a dash would be read as an option.
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return words


def control_pixels(job: Job) -> "np.ndarray":
    """Return the control of a job as frames (F, H, W, 3) uint8, without those that are repeated at its end."""
    return (job.control[: job.length.num_frames].permute(0, 2, 3, 1) * 255).round().byte().numpy()
