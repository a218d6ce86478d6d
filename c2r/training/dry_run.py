"""`--dry_run`: everything that a run does, once, on a few of its clips, before it is left alone for days.

The script's own loop trains one step, validates, saves a checkpoint, best/ and final/, is built up again from the
checkpoint and goes on. What it has measured is projected on the whole run.
"""

import gc
import math
import resource
import shutil
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.torch_utils import empty_device_cache

from c2r.cli import stop_on_signals
from c2r.training.engine import build_accelerator
from c2r.training.preflight import run_bytes, samples_per_step
from c2r.units import GIB, duration_text, size_text

STEPS = (1, 3)  # of the first leg, and of both; the third is warm, and it alone is timed


@dataclass
class RunRecord:
    """What a run measures of itself, for the projection of a dry run."""

    seconds: dict = field(default_factory=dict)  #: of the last "validation", "sampling" and "checkpoint"
    spent: dict = field(default_factory=dict)  #: seconds of all of them
    started: float = field(default_factory=time.perf_counter)  #: when the first validation has, and then training
    samples_per_second: float | None = None  #: of the last step
    trainable: int = 0  #: parameters
    to_encode: dict = field(default_factory=dict)  #: {"latents": clips} that the whole run lacked before this one
    seconds_per_clip: dict = field(default_factory=dict)  #: {"latents": of all processes together} if any were missing

    @contextmanager
    def time(self, name):
        """Note how long the body takes."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.spent[name] = self.spent.get(name, 0.0) + self.seconds[name]

    def plan_encoding(self, missing):
        """Note what the whole run would encode, a `Missing`.

        Raises:
            InputError: there is no room for it.
        """
        missing.require_room()
        self.to_encode[missing.kind] = missing.count

    def add_encoding(self, *passes):
        """Note how long encoding takes; each an `Encoded`."""
        for encoded in passes:
            if encoded.seconds_per_clip is not None:
                self.seconds_per_clip.setdefault(encoded.kind, encoded.seconds_per_clip)

    def start(self):
        """What is timed starts now: the first validation, then the training loop."""
        self.spent, self.started = {}, time.perf_counter()

    def shares(self):
        """'93.1 % training, 4.0 % validation, 2.9 % checkpoint' of the time since `start`."""
        total = time.perf_counter() - self.started
        parts = {"training": total - sum(self.spent.values())} | self.spent
        return ", ".join(f"{100 * seconds / total:.1f} % {name}" for name, seconds in parts.items())


def few(clips, args, accelerator):
    """The clips of a domain to train on: in a dry run no more than its steps take, of the largest bucket first."""
    if not args.dry_run:
        return clips
    sizes = np.array([math.prod(bucket) for bucket in clips.buckets], np.int64)[clips.bucket_numbers]
    largest = np.argsort(-sizes, kind="stable")[: STEPS[-1] * samples_per_step(accelerator, args)]
    return clips[np.sort(largest)]


def dry_run(train, args):
    """Run a script's `train` in two legs, the second resumed from the first, and print what the whole run would take.

    It writes beside `--output_dir` and removes that again, whatever happens. What it encodes stays in the cache.

    Args:
        train: `(args, accelerator, RunRecord)`, the script's.
        args: the options of the run that is planned.

    Raises:
        InputError: as the run itself would.
    """
    out = Path(args.output_dir).absolute()
    folder = out.with_name(f".{out.name}.dry_run")
    leg = Namespace(**vars(args))
    leg.planned, leg.output_dir, leg.report_to = args, str(folder), "none"
    leg.checkpointing_steps = leg.validation_steps = leg.sample_steps = leg.checkpoints_total_limit = 1
    leg.resume_from_checkpoint = "latest"
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # of a dry run that was killed
    accelerator = build_accelerator(leg)
    records = [RunRecord() for _ in STEPS]
    try:
        for leg.max_train_steps, record in zip(STEPS, records):
            stop_on_signals()  # the leg before has left its own
            accelerator.print(f"dry run: to step {leg.max_train_steps}")
            train(leg, accelerator, record)
            accelerator.free_memory()
            gc.collect()
            empty_device_cache()
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    accelerator.print(
        f"dry run: passed in {time.perf_counter() - started:.0f} s: trained, validated, saved and resumed; "
        f"{folder.name} is removed again, what was encoded stays in the cache"
    )
    for line in projection(args, *records, samples_per_step(accelerator, args)):
        accelerator.print(f"dry run: {line}")
    accelerator.print(f"dry run: {_peak_memory(accelerator)}")
    accelerator.end_training()


def projection(args, first, last, samples):
    """Lines that tell what the whole run takes, from what a few steps of it took.

    Args:
        args: the options of the run that is planned.
        first, last: `RunRecord` of the first leg (which encoded) and of the last one (which is warm).
        samples: clips of one optimizer step.
    """
    step = samples / last.samples_per_second
    validations = math.ceil(args.max_train_steps / args.validation_steps) + 1
    checkpoints = math.ceil(args.max_train_steps / args.checkpointing_steps)
    parts = {
        f"{args.max_train_steps:,} steps": args.max_train_steps * step,
        f"{validations} validations": validations * last.seconds["validation"],
        f"{checkpoints} checkpoints": checkpoints * last.seconds["checkpoint"],
    }
    if "sampling" in last.seconds:
        samplings = math.ceil(args.max_train_steps / args.sample_steps)
        parts[f"{samplings} samplings"] = samplings * last.seconds["sampling"]
    for kind, seconds in first.seconds_per_clip.items():
        parts[f"encoding the {kind} of {first.to_encode[kind]:,} clips"] = first.to_encode[kind] * seconds
    yield (
        f"measured: {step:.2f} s a step, {last.seconds['validation']:.2f} s a validation, "
        f"{last.seconds['checkpoint']:.2f} s a checkpoint"
    )
    detail = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in parts.items())
    yield f"projected: {duration_text(sum(parts.values()))} in all: {detail}"
    needed = run_bytes(args, last.trainable)
    yield "projected: " + (
        f"up to {size_text(needed)} in {args.output_dir}"
        if needed is not None
        else "disk without a bound: --save_every_minutes keeps every checkpoint; give --checkpoints_total_limit"
    )


def _peak_memory(accelerator):
    if accelerator.device.type == "cuda":
        return f"measured: {torch.cuda.max_memory_reserved() / GIB:.2f} GiB of the device's memory at the peak"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"measured: {kib * 1024 / GIB:.2f} GiB of the machine's memory at the peak, of one process"
