"""The record of a run in its output folder, which `python -m c2r.report` reads.

run.json holds how the run was started, metrics.jsonl every logged number, and validations.jsonl the loss of each
validation clip. The last two have one JSON object in each line, in the order of steps.
"""

import json
import logging
import math
import os
import platform
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process

from c2r import __version__
from c2r.files import write_atomic
from c2r.training.engine import ENGINE_NAMES, sharding
from c2r.training.launched import resume_command
from c2r.training.output_files import METRICS, START, VALIDATIONS
from c2r.training.resume import saved_options

logger = logging.getLogger(__name__)

#: Packages whose versions are written down.
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


class RecordTracker(GeneralTracker):
    """Write what Accelerate's trackers get into files, whatever --report_to names.

    A run that was killed has logged steps after its checkpoint. Those are removed, because the resumed run logs them
    again.

    Args:
        output_dir: the run's output folder.
        purge_step: lines of this step and of later ones are removed at the start.
    """

    name = "record"
    requires_logging_directory = False

    def __init__(self, output_dir: str | Path, purge_step: int):
        super().__init__()
        self._folder, self._purge_step = Path(output_dir), purge_step
        self._files: dict[str, TextIO] = {}
        #: {name: last step at which it was logged before this start}, of what was removed too.
        self.logged: dict[str, int] = {}

    @on_main_process
    def start(self):
        for name in (METRICS, VALIDATIONS):
            path = self._folder / name
            if path.exists() or path.is_symlink():
                write_atomic(path, b"".join(self._kept(path)))
            # Not through a link, which could lead out of the folder.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            # A line is written at once: a killed run has lost none.
            self._files[name] = open(os.open(path, flags, 0o644), "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def _kept(self, path) -> Iterator[bytes]:
        """Yield the lines before the purged step; note the last step of each name."""
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = json.loads(line)
                    step, names = int(entry["step"]), [*entry.get("media", ()), *entry]
                except (ValueError, KeyError, TypeError, AttributeError):
                    logger.warning("%s: line %d is damaged, perhaps cut off by a kill; removed", path, number)
                    continue
                if path.name == METRICS:
                    self.logged |= {name: max(step, self.logged.get(name, step)) for name in names}
                if step < self._purge_step:
                    yield line if line.endswith(b"\n") else line + b"\n"

    @property
    def tracker(self):
        return self

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs):
        """Append one line of numbers; what is not finite is written as null, which every JSON reader takes."""
        self._append(METRICS, {"step": step} | {name: _json_number(value) for name, value in values.items()})

    @on_main_process
    def log_media(self, name: str, step: int, caption: str | None = None):
        """Note that a picture or video of this name was logged."""
        self._append(METRICS, {"step": step, "media": [name]} | ({} if caption is None else {"caption": caption}))

    @on_main_process
    def log_validation(self, entry: dict[str, Any]):
        """Append one line to validations.jsonl."""
        self._append(VALIDATIONS, entry)

    def _append(self, name, entry):
        self._files[name].write(json.dumps(entry, allow_nan=False) + "\n")

    @on_main_process
    def finish(self):
        for file in self._files.values():
            file.close()


def write_start(accelerator: Accelerator, args: Namespace, command: list[str]) -> None:
    """Write run.json: options, command lines and versions of this start. Call it on the main process only.

    Args:
        accelerator, args: the run's.
        command: the words that started it.
    """
    device = accelerator.device
    environment = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "engine": ENGINE_NAMES[sharding(accelerator)] if accelerator.num_processes > 1 else "one process",
        "processes": str(accelerator.num_processes),
    } | {package: version(package) for package in PACKAGES}
    content = {
        "version": __version__,
        "phase": 2 if hasattr(args, "resume_backbone_from") else 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "resume": resume_command(command, args),
        "options": saved_options(args),
        "environment": environment,
    }
    write_atomic(Path(args.output_dir) / START, json.dumps(content, indent=1).encode())


def _json_number(value):
    if isinstance(value, bool):
        return int(value)
    return value if math.isfinite(value) else None
