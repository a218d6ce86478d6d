"""Guards of a step: skip it where the gradient is not finite, and name the clips of unusual losses."""

import logging
import math
from collections.abc import Sequence
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from c2r import InputError
from c2r.training.progress import Progress

logger = logging.getLogger(__name__)

# A loss is a spike if its logarithm exceeds median + SPREADS * 1.4826 * MAD of the log losses of the last WINDOW
# steps. For a normal distribution these are six standard deviations. A few earlier spikes do not move this bound.
WINDOW, MIN_STEPS, SPREADS = 200, 50, 6
MIN_SPREAD = 0.01  # of the log loss; a constant loss has no spread at all


class StepGuard:
    """Decides whether an optimizer step may be taken, the same on every process.

    Args:
        accelerator: the run's.
        progress: holds the last losses and the count of skipped steps, so that a resumed run decides as an
            uninterrupted one.
        max_skipped_steps: maximum consecutive skipped steps; one more ends the run.
        copies: neighbouring processes that record the same clips; the first of them names them.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress, max_skipped_steps: int, copies: int = 1):
        self.names_clips = accelerator.process_index % copies == 0
        self.progress = progress
        self.max_skipped_steps = max_skipped_steps
        self._clips: list[tuple[Sequence[str], torch.Tensor]] = []  # losses stay on the device until they are needed

    def add(self, losses: torch.Tensor, names: Sequence[str]):
        """Record one micro-batch: (B,) losses and the clips' names."""
        self._clips.append((names, losses.detach()))

    def may_step(self, grad_norm: float) -> bool:
        """Return False if the gradient of any process is not finite: skip this step.

        Args:
            grad_norm: norm of the whole gradient over all processes, so that all decide alike.

        Raises:
            InputError: after `max_skipped_steps` consecutive skipped steps.
        """
        if math.isfinite(grad_norm):
            self.progress.skipped_in_a_row = 0
            return True
        self.progress.skipped_in_a_row += 1
        clips = self._gather(self._clips)
        culprits = [name for name, loss in clips if not math.isfinite(loss)]
        step = self.progress.global_step + 1
        if culprits:
            report = f"step {step} skipped: the loss is not finite for {', '.join(culprits)}"
        else:
            report = f"step {step} skipped: the gradient is not finite; its clips: {', '.join(n for n, _ in clips)}"
        if self.progress.skipped_in_a_row > self.max_skipped_steps:
            raise InputError(
                f"{report}; it is number {self.progress.skipped_in_a_row} in a row (--max_skipped_steps "
                f"{self.max_skipped_steps}): look at these clips and delete their cached files, or lower "
                "--learning_rate, and resume"
            )
        logger.info(report)
        return False

    def finish(self, loss: float) -> bool:
        """End a step with its mean loss over all processes. If the loss is a spike, name the clips and return True."""
        clips, self._clips = self._clips, []
        if not (math.isfinite(loss) and loss > 0):
            return False
        bound = spike_bound(self.progress.log_losses)
        self.progress.log_losses = [*self.progress.log_losses, math.log(loss)][-WINDOW:]
        if math.log(loss) <= bound:
            return False
        clips = sorted(self._gather(clips), key=lambda clip: -clip[1])
        named = ", ".join(f"{name} ({clip_loss:.4f})" for name, clip_loss in clips)
        step = self.progress.global_step
        logger.info("step %d: loss %.4f is a spike, above %.4f: %s", step, loss, math.exp(bound), named)
        return True

    def _gather(self, clips):
        """Return [(name, loss)] of all micro-batches and processes; the host waits for the device."""
        own = [pair for names, losses in clips for pair in zip(names, losses.tolist())]
        return gather_object(own if self.names_clips else [])


def spike_bound(log_losses: Sequence[float]) -> float:
    """Return the largest log loss that is no spike; infinite with fewer than MIN_STEPS losses."""
    if len(log_losses) < MIN_STEPS:
        return math.inf
    middle = median(log_losses)
    deviation = median(abs(value - middle) for value in log_losses)
    return middle + SPREADS * max(1.4826 * deviation, MIN_SPREAD)
