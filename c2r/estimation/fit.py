"""Find the fastest options with which a run fits a device's memory."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from c2r import InputError
from c2r.estimation.report import Estimate
from c2r.options.training_checks import has_frozen_backbone
from c2r.units import GIB

#: Bytes of a device that tensors cannot have: CUDA's context, its libraries' workspaces and gaps between tensors.
RESERVED = 1.5 * GIB

EIGHT_BIT = {"optimizer": "adamw8bit"}
SMALL = EIGHT_BIT | {"weight_storage": "bf16"}
IN_PARTS = {"ffn_chunks": 4}
OFFLOADED = IN_PARTS | {"offload_activations": True}
STREAMED = OFFLOADED | {"offload_backbone": True}
IN_BACKWARD = {"step_in_backward": True}  # for runs without accumulation and clipping

#: Options of the training scripts that trade time or exactness for memory. The order follows from their FLOPs and
#: copies; it is not measured. The backbone in 8 bit is not among them, because it changes what is learned.
MODES: tuple[dict[str, Any], ...] = (
    *({"gradient_checkpointing": mode} for mode in ("none", "selective", "block")),
    *({"gradient_checkpointing": mode} | EIGHT_BIT for mode in ("none", "selective", "block")),
    *({"gradient_checkpointing": mode} | SMALL for mode in ("none", "selective", "block")),
    *(IN_PARTS | states for states in ({}, EIGHT_BIT, SMALL)),
    *(OFFLOADED | states for states in ({}, EIGHT_BIT, SMALL)),
    *(STREAMED | states for states in ({}, EIGHT_BIT, SMALL)),
    OFFLOADED | SMALL | IN_BACKWARD,
    STREAMED | SMALL | IN_BACKWARD,
)


@dataclass(frozen=True)
class Fit:
    """A row of MODES with which a run fits."""

    args: Namespace  #: the run's options with those of the mode
    changes: dict[str, Any]  #: the options of the mode that differ from the run's
    estimate: Estimate


def find_fit(
    args: Namespace,
    memory: float,
    estimate: Callable[..., Estimate],
    supported: Callable[[Namespace], bool] = lambda args: True,
) -> Fit:
    """Return the first of MODES with which every stage of a run fits a device.

    With each mode --train_batch_size is kept if it fits; otherwise one clip at a time is tried, with more
    accumulation, so that a step has as many clips.

    Args:
        args: options of a training script.
        memory: bytes of the device.
        estimate: called with options, and `step_only=True` for the training step alone.
        supported: False for options that do not work together.

    Raises:
        InputError: there is none; it names the stage that is too large.
    """
    found: Fit | None = None
    steps: list[Estimate] = []
    runs: list[Estimate] = []
    for mode in MODES:
        if mode.get("offload_backbone") and not has_frozen_backbone(args):
            continue
        for batch in _batches(args):
            changes = {"gradient_checkpointing": "block"} | mode | batch
            changed = Namespace(**vars(args) | changes)
            if not supported(changed):
                continue
            tried = estimate(changed, step_only=True)
            steps.append(tried)
            if not _fits(tried, memory):
                if args.gradient_accumulation_steps > 1:
                    break  # more clips at a time would not either
                continue
            tried = estimate(changed, step_only=False)
            runs.append(tried)
            if _fits(tried, memory):
                changes = {name: value for name, value in changes.items() if getattr(args, name) != value}
                found = Fit(changed, changes, tried)
        if found is not None:
            return found
    # Plain training is always supported, so there is a step. Where it fits, another stage does not.
    smallest = min(runs or steps, key=lambda estimate: estimate.total(estimate.largest))
    stage, left = smallest.largest, max(0, memory - RESERVED)
    raise InputError(
        f"--fit {memory / GIB:g}GB: does not fit with any options; the least that was found takes "
        f"{smallest.total(stage) / GIB:.1f} GiB for {stage}, of {left / GIB:.1f} that tensors can have; "
        "lower the size of the clips, or give more devices by --engine and --num_processes"
    )


def _batches(args):
    """Yield ways to split the clips of an optimizer step into micro-steps: one clip at a time, and that of args."""
    clips = args.train_batch_size * args.gradient_accumulation_steps
    if args.train_batch_size > 1:
        yield {"train_batch_size": 1, "gradient_accumulation_steps": clips}
    yield {}


def _fits(estimate, memory):
    return estimate.total(estimate.largest) <= memory - RESERVED
