"""Take real steps of a run with random weights, and measure what they take."""

import time
from argparse import Namespace
from dataclasses import dataclass

import torch

from c2r import InputError
from c2r.data.buckets import Bucket
from c2r.estimation.configs import ModelConfigs
from c2r.estimation.step import Inputs, Untracked, build_models, build_state, take_step
from c2r.training.backward_step import StepInBackward
from c2r.training.precision import frozen_dtype

#: Steps that are timed, after one that is not.
COUNT = 3


@dataclass(frozen=True)
class Measurement:
    """A measured step."""

    peak: int  #: bytes of tensors
    reserved: int  #: bytes that the allocator has taken from the device for them
    seconds: float  #: of a micro-step and an optimizer step


class RealStep:
    """The step that an estimate is computed from, on a real device.

    Args:
        args: options of a training script.
        configs: of the models.
        bucket: size of the clips.
        device: the device.

    Raises:
        InputError: bitsandbytes is missing, or the backbone has too few blocks.
    """

    def __init__(self, args: Namespace, configs: ModelConfigs, bucket: Bucket, device: torch.device):
        self.args = args
        self.inputs = Inputs(configs, bucket, args.train_batch_size, frozen_dtype(args.mixed_precision), device)
        self.state = build_state(args, build_models(args, configs, device), device, Untracked())
        if args.step_in_backward:
            self.state.in_backward = StepInBackward(self.state.optimizer)

    def take(self) -> None:
        """Take a step, see `take_step`."""
        take_step(self.args, self.state, self.inputs, Untracked())
        if self.state.in_backward is not None:
            self.state.in_backward.take_grad_norm()


def require_gpu() -> None:
    """Raise InputError if this machine has no GPU."""
    if not torch.cuda.is_available():
        raise InputError("--measure: there is no GPU here; leave it out")


def measure_step(args: Namespace, configs: ModelConfigs, bucket: Bucket) -> Measurement:
    """Measure a step on this machine's GPU; the arguments are those of `RealStep`.

    Raises:
        InputError: the step does not fit the GPU; see also `RealStep`.
    """
    device = torch.device("cuda", 0)
    try:
        step = RealStep(args, configs, bucket, device)
        step.take()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        for _ in range(COUNT):
            step.take()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise InputError("--measure: the step does not fit the GPU; give options that take less, see --fit") from None
    seconds = (time.perf_counter() - started) / COUNT
    return Measurement(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), seconds)
