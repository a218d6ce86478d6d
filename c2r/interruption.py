"""Saving and stopping at other times than planned: signals, the end of a slot, the clock.

A stopped run saves first and ends with the exit status EXIT_STOPPED: start it again with the same command and
`--resume_from_checkpoint latest`. (`accelerate launch` itself ends with 1, or by the signal that it was sent.)
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time

import torch

from c2r import InputError

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAVE, _SLOT_ENDS, _SIGNAL = 1, 2, 3


def stop_on_signals():
    """Until the training loop has something to save, SIGTERM and SIGINT end the process at once, with EXIT_STOPPED.

    A process of a launcher is sent SIGTERM too when its launcher dies: it would go on writing beside the next run.
    """

    def stop(number, frame):
        for handled in SIGNALS:
            signal.signal(handled, signal.SIG_IGN)
        _say(f"stopped by {signal.Signals(number).name}; start again with the same command")
        sys.exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, stop)
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _say(line):
    # Not by print: a signal may come while the progress bar is in the same stream's buffer, which then raises.
    os.write(sys.__stderr__.fileno(), f"{line}\n".encode())


def shield_worker(worker_id):
    """`worker_init_fn` of a data loader: of the signals, a worker obeys its own process's SIGTERM alone.

    A terminal sends SIGINT, and Slurm SIGTERM, to the workers too: if they ended, the loop could not finish its step
    and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":
        return

    def obey():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=obey, daemon=True).start()


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
