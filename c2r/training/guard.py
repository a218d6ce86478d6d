"""Guards of a step: what is not finite is not learned from, what stands out is named with its clips."""

import math
from statistics import median

from accelerate.utils import gather_object
from tqdm import tqdm

from c2r import InputError

# A loss counts as a spike beyond median + SPREADS · 1.4826 · MAD of the log losses of the last WINDOW steps: for a
# normal distribution that is six standard deviations, and a few earlier spikes do not move it.
WINDOW, MIN_STEPS, SPREADS = 200, 50, 6

MIN_SPREAD = 0.01  # of the log loss: less is no spread, but a constant loss


class StepGuard:
    """Decides whether an optimizer step may be taken, the same on every process.

    Args:
        accelerator: the run's.
        loop: `LoopState`; the guard's memory is kept in it, so that a resumed run guards as an uninterrupted one.
        max_skipped_steps: so many in a row are borne; one more ends the run.
    """

    def __init__(self, accelerator, loop, max_skipped_steps):
        self.accelerator = accelerator
        self.loop = loop
        self.max_skipped_steps = max_skipped_steps
        self._clips = []

    def add(self, losses, names):
        """Note one micro-batch: (B,) losses and the clips' names."""
        self._clips += zip(names, losses.tolist())

    def may_step(self, grad_norm):
        """False if the gradient, and so the loss or the gradient of some process, is not finite: skip this step.

        Args:
            grad_norm: float, of the whole gradient over all processes, so that they decide alike.

        Raises:
            InputError: after `max_skipped_steps` in a row.
        """
        if math.isfinite(grad_norm):
            self.loop.skipped_in_a_row = 0
            return True
        self.loop.skipped_in_a_row += 1
        clips = gather_object(self._clips)
        culprits = [name for name, loss in clips if not math.isfinite(loss)]
        step = self.loop.global_step + 1
        if culprits:
            what = f"step {step} skipped: the loss is not finite for {', '.join(culprits)}"
        else:
            what = f"step {step} skipped: the gradient is not finite; its clips: {', '.join(n for n, _ in clips)}"
        if self.loop.skipped_in_a_row > self.max_skipped_steps:
            raise InputError(
                f"{what}; it is number {self.loop.skipped_in_a_row} in a row (--max_skipped_steps "
                f"{self.max_skipped_steps}): look at these clips and delete what is cached of them, or lower "
                "--learning_rate, and resume"
            )
        if self.accelerator.is_main_process:
            tqdm.write(what)
        return False

    def finish(self, loss):
        """End a step with its mean loss over all processes; names its clips if it is a spike.

        Returns:
            whether it is one.
        """
        clips, self._clips = self._clips, []
        if not (math.isfinite(loss) and loss > 0):
            return False
        bound = spike_bound(self.loop.log_losses)
        self.loop.log_losses = [*self.loop.log_losses, math.log(loss)][-WINDOW:]
        if math.log(loss) <= bound:
            return False
        clips = sorted(gather_object(clips), key=lambda clip: -clip[1])
        if self.accelerator.is_main_process:
            named = ", ".join(f"{name} ({clip_loss:.4f})" for name, clip_loss in clips)
            tqdm.write(
                f"step {self.loop.global_step}: loss {loss:.4f} is a spike, above {math.exp(bound):.4f}: {named}"
            )
        return True


def spike_bound(log_losses):
    """Upper bound of the log loss of a step that is no spike; infinite before there are MIN_STEPS to judge by."""
    if len(log_losses) < MIN_STEPS:
        return math.inf
    middle = median(log_losses)
    deviation = median(abs(value - middle) for value in log_losses)
    return middle + SPREADS * max(1.4826 * deviation, MIN_SPREAD)
