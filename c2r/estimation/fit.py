"""Find the fastest options with which a run fits a device's memory."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from c2r.estimation.report import Estimate
from c2r.units import GIB

#: Bytes of a device that tensors cannot have: CUDA's context, its libraries' workspaces and gaps between tensors.
RESERVED = 1.5 * GIB

#: Options of the training scripts that trade time or exactness for memory, from the fastest to the smallest. Of two
#: rows that take the same time, the one with fewer changes comes first.
MODES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": False},
    {"gradient_checkpointing": False, "optimizer": "adamw8bit"},
    {"gradient_checkpointing": False, "optimizer": "adamw8bit", "weight_storage": "bf16"},
    {},
    {"optimizer": "adamw8bit"},
    {"weight_storage": "bf16"},
    {"optimizer": "adamw8bit", "weight_storage": "bf16"},
)


@dataclass(frozen=True)
class Fit:
    """A row of MODES with which a run fits."""

    args: Namespace  #: the run's options with those of the mode
    changes: dict[str, Any]  #: the options of the mode
    estimate: Estimate


def find_fit(
    args: Namespace,
    memory: float,
    estimate: Callable[..., Estimate],
    supported: Callable[[Namespace], bool] = lambda args: True,
) -> Fit | None:
    """Return the first of MODES with which every stage of a run fits a device; None if there is none.

    Args:
        args: options of a training script, all modes' own among them.
        memory: bytes of the device.
        estimate: called with options, and `step_only=True` for the training step alone.
        supported: False for options that do not work together.
    """
    for mode in MODES:
        changed = Namespace(**vars(args) | {"gradient_checkpointing": True} | mode)
        if not supported(changed):
            continue
        if not _fits(estimate(changed, step_only=True), memory):
            continue
        whole = estimate(changed, step_only=False)
        if _fits(whole, memory):
            return Fit(changed, mode, whole)
    return None


def _fits(estimate, memory):
    return estimate.total(estimate.largest) <= memory - RESERVED
