"""Saving and stopping at other times than planned: signals, the end of a slot, the clock.

A stopped run saves first and ends with the exit status EXIT_STOPPED: start it again with the same command and
`--resume_from_checkpoint latest`. (`accelerate launch` itself ends with 1, or by the signal that it was sent.)
"""

import os
import re
import signal
import time

import torch

from c2r import InputError
from c2r.cli import SIGNALS, _say

_SAVE, _SLOT_ENDS, _SIGNAL = 1, 2, 3


class Interruption:
    """Tells the loop when to save in between and when to stop; all processes hear the same at the same step.

    Args:
        args: has save_every_minutes and save_before_timeout.
    """

    def __init__(self, args):
        self.stop = None  # why, as a phrase; None: go on
        self.save = False
        self._signal = None
        self._every = args.save_every_minutes and 60 * args.save_every_minutes
        self._deadline = slot_deadline(args.save_before_timeout)
        self._saved_at = time.monotonic()
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        # No more than a note: the step in progress goes on. A second signal changes nothing.
        if self._signal is None:
            self._signal = signal.Signals(number).name
            _say(f"{self._signal}: saving after this step, then stopping")

    def agree(self, accelerator):
        """Settle `save` and `stop` with the other processes, and return whether to go on. Call it on every process."""
        wanted = 0
        if accelerator.is_main_process:  # one clock decides
            if self._every and time.monotonic() - self._saved_at >= self._every:
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
        """Start the clock of `--save_every_minutes` again."""
        self._saved_at = time.monotonic()


def slot_deadline(save_before_timeout):
    """When to stop, in seconds since 1970; None without the option.

    Raises:
        InputError: not a duration, or nothing says when the slot ends.
    """
    if save_before_timeout is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", save_before_timeout)
    if match is None:
        raise InputError(f"--save_before_timeout {save_before_timeout}: give a time such as 90s, 5m or 1h")
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        raise InputError(
            "--save_before_timeout: nothing says when this slot ends; outside Slurm set SLURM_JOB_END_TIME to its end "
            "in seconds since 1970"
        )
    return int(end) - float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
