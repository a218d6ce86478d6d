"""`--dry_run`: rehearse everything that a run does, on a few of its clips, before the run is left alone for days.

The script's own loop trains one step, validates, saves a checkpoint, best/ and final/, is rebuilt from the checkpoint
and continues. The measured times are projected to the whole run.
"""

import gc
import logging
import math
import resource
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import empty_device_cache

from c2r.cli import stop_on_signals
from c2r.data.clips import Clips
from c2r.options.presets import preset_line
from c2r.training.engine import build_accelerator
from c2r.training.plan import Plan
from c2r.training.preflight import run_bytes
from c2r.training.run import Run
from c2r.training.setup import start_run
from c2r.training.timings import Timings
from c2r.units import GIB, duration_text, size_text

logger = logging.getLogger(__name__)

#: Last step of each leg. Only the third step is timed, because the first step of a leg is slower.
STEPS = (1, 3)


def launch(train: Callable[[Run], Plan], args: Namespace):
    """Run a script's `train`, or with --dry_run rehearse it.

    Args:
        train: trains from the first check to final/.
        args: options of the script.
    """
    if args.preset is not None:
        logger.info(preset_line(args))
    if args.dry_run:
        dry_run(train, args)
        return
    accelerator = build_accelerator(args)
    _train(train, start_run(args, accelerator))
    accelerator.end_training()


def _train(train, run):
    try:
        return train(run)
    finally:
        # The run has failed. A single process still completes what it was saving; several would have to agree.
        if run.saving is not None and run.accelerator.num_processes == 1:
            run.saving.join()


def limit_to_dry_run(clips: Clips, run: Run) -> Clips:
    """Return the clips to train on: in a dry run as many as its steps take, of the largest buckets; else all."""
    if not run.args.dry_run:
        return clips
    sizes = np.array([math.prod(bucket) for bucket in clips.buckets], np.int64)[clips.bucket_numbers]
    largest = np.argsort(-sizes, kind="stable")[: STEPS[-1] * run.samples_per_step]
    return clips[np.sort(largest)]


def dry_run(train: Callable[[Run], Plan], args: Namespace):
    """Run a script's `train` in two legs, the second resumed from the first, and print what the whole run would take.

    The two legs write into a folder beside `--output_dir`, which is always removed. Encoded clips stay in the cache.

    Args:
        train: see `launch`; returns the run's `Plan`.
        args: options of the planned run.

    Raises:
        InputError: as the run itself would.
    """
    out = Path(args.output_dir).absolute()
    folder = out.with_name(f".{out.name}.dry_run")
    leg = Namespace(**vars(args))
    leg.output_dir, leg.report_to, leg.resume_from_checkpoint = str(folder), ["none"], "latest"
    leg.checkpointing_steps = leg.validation_steps = leg.sample_steps = leg.checkpoints_total_limit = 1
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # left by a dry run that was killed
    accelerator = build_accelerator(leg)
    timings: list[Timings] = []
    try:
        for last_step in STEPS:
            stop_on_signals()  # the first leg has left its own handlers
            leg.max_train_steps = last_step
            logger.info("dry run: to step %d", last_step)
            run = start_run(leg, accelerator, planned=args)
            plan = _train(train, run)
            timings.append(run.timings)
            accelerator.free_memory()
            gc.collect()
            empty_device_cache()
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    logger.info(
        f"dry run: passed in {time.perf_counter() - started:.0f} s: trained, validated, saved and resumed; "
        f"{folder.name} is removed again, encoded clips stay in the cache"
    )
    first, last = timings
    for line in projection(args, first, last, run.samples_per_step, plan.num_trainable):
        logger.info("dry run: %s", line)
    logger.info("dry run: %s", _peak_memory(accelerator))
    accelerator.end_training()


def projection(args: Namespace, first: Timings, last: Timings, samples: int, num_trainable: int) -> Iterator[str]:
    """Yield lines on the time and disk space of the whole run, projected from a few steps.

    Args:
        args: options of the planned run.
        first: timings of the first leg, which encoded.
        last: timings of the last leg, which was warm.
        samples: clips of one optimizer step.
        num_trainable: parameters that train.
    """
    step = samples / last.samples_per_second
    validations = math.ceil(args.max_train_steps / args.validation_steps) + 1
    checkpoints = math.ceil(args.max_train_steps / args.checkpointing_steps)
    copying, writing = last.last["checkpoint"], last.last["writing"]
    # A save waits for the write of the one before.
    waiting = max(0.0, writing - args.checkpointing_steps * step)
    parts = {
        f"{args.max_train_steps:,} steps": args.max_train_steps * step,
        f"{validations} validations": validations * last.last["validation"],
        f"{checkpoints} checkpoints": checkpoints * (copying + waiting),
    }
    if "sampling" in last.last:
        samplings = math.ceil(args.max_train_steps / args.sample_steps)
        parts[f"{samplings} samplings"] = samplings * last.last["sampling"]
    for kind, seconds in first.seconds_per_clip.items():
        parts[f"encoding the {kind} of {first.to_encode[kind]:,} clips"] = first.to_encode[kind] * seconds
    yield (
        f"measured: {step:.2f} s a step, {last.last['validation']:.2f} s a validation, "
        f"{copying:.2f} s a checkpoint, which is complete {writing:.2f} s later"
    )
    detail = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in parts.items())
    yield f"projected: {duration_text(sum(parts.values()))} in all: {detail}"
    needed = run_bytes(args, num_trainable)
    yield "projected: " + (
        f"up to {size_text(needed)} in {args.output_dir}"
        if needed is not None
        else "disk without a bound: --save_every_minutes keeps every checkpoint; give --checkpoints_total_limit"
    )


def _peak_memory(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"measured: {torch.cuda.max_memory_reserved() / GIB:.2f} GiB of the device's memory at the peak"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"measured: {kib * 1024 / GIB:.2f} GiB of the machine's memory at the peak, of one process"
