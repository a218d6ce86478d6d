"""Save and stop at unplanned times: on signals, before a Slurm slot ends, by the clock.

A stopped run saves first and ends with the exit status EXIT_STOPPED: restart it with the same command and
`--resume_from_checkpoint latest`. (`accelerate launch` itself ends with 1, or by the signal that it was sent.)
"""

import os
import signal
import time

import torch
from accelerate import Accelerator

from c2r.cli import SIGNALS, write_error_line

_SAVE, _SLOT_ENDS, _SIGNAL = 1, 2, 3


class Interruption:
    """Decides when the loop saves between planned checkpoints and when it stops, the same on every process.

    Args:
        save_every_minutes: longest time between two checkpoints; None: no limit.
        save_before_timeout: seconds before the end of the Slurm slot at which the run stops; None: never.

    Attributes:
        stop: reason to stop, as a phrase; None to continue.
        save: True if a checkpoint is to be saved after this step.
    """

    def __init__(self, save_every_minutes: float | None = None, save_before_timeout: float | None = None):
        self.stop: str | None = None
        self.save = False
        self._signal: str | None = None
        self._interval = save_every_minutes and 60 * save_every_minutes
        self._deadline = slot_deadline(save_before_timeout)
        self._saved_at = time.monotonic()
        for number in SIGNALS:
            signal.signal(number, self._note_signal)

    def _note_signal(self, number, frame):
        # Only noted: the step in progress is finished first. A second signal changes nothing.
        if self._signal is None:
            self._signal = signal.Signals(number).name
            write_error_line(f"{self._signal}: saving after this step, then stopping")

    def agree(self, accelerator: Accelerator) -> bool:
        """Settle `save` and `stop` with the other processes; return True to continue. Call it on every process."""
        wanted = 0
        if accelerator.is_main_process:  # one clock decides
            if self._interval and time.monotonic() - self._saved_at >= self._interval:
                wanted = _SAVE
            if self._deadline and time.time() >= self._deadline:
                wanted = _SLOT_ENDS
        if self._signal:
            wanted = _SIGNAL
        if accelerator.num_processes > 1:
            wanted = int(accelerator.gather(torch.tensor([wanted], device=accelerator.device)).max())
        self.save = wanted > 0
        if wanted == _SLOT_ENDS:
            self.stop = "the slot ends soon (--save_before_timeout)"
        elif wanted == _SIGNAL:
            self.stop = self._signal or "a signal to another process"
        return self.stop is None

    def saved(self):
        """Restart the clock of `save_every_minutes`."""
        self._saved_at = time.monotonic()


def slot_deadline(save_before_timeout: float | None) -> float | None:
    """Return the time at which the run is to stop, in seconds since 1970; None: never.

    SLURM_JOB_END_TIME is set, because --save_before_timeout is refused without it.

    Args:
        save_before_timeout: seconds before the end of the slot.
    """
    return None if save_before_timeout is None else int(os.environ["SLURM_JOB_END_TIME"]) - save_before_timeout
