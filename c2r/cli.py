"""Run a command: parse its options, answer bad input in one line, exit with a documented status."""

import argparse
import ctypes
import errno
import os
import re
import signal
import sys
import time
import traceback

from c2r import InputError
from c2r.files import UNWRITABLE
from c2r.training.watchdog import name_the_lost

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

SIGNALS = (signal.SIGTERM, signal.SIGINT)


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


HEAD_START = 5.0  # seconds in which the main process's error ends the others


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows each option's default."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or isinstance(action, argparse._HelpAction):
            return action.help
        return f"{action.help} (default: %(default)s)"


def run(main):
    """Run a script's main; bad input, a full disk and a stopping signal end it with one line, not a traceback."""
    stop_on_signals()
    try:
        main()
    except InputError as error:
        _leave_it_to_the_main_process()
        # From a data loader's worker it comes wrapped in the worker's traceback; the last line is the message.
        _end(error, re.sub(r"^c2r[.\w]*: ", "", str(error).strip().splitlines()[-1]))
    except (OSError, EOFError, RuntimeError) as error:
        if _lost_worker(error):
            _end(
                error,
                f"a data loader's worker was killed or cannot be reached ({str(error).partition(chr(10))[0]}), "
                "perhaps for want of memory: lower --dataloader_num_workers and start again with "
                "--resume_from_checkpoint latest",
            )
        if getattr(error, "errno", None) in UNWRITABLE:
            file = error.filename or "output"
            verb = "opened" if error.errno == errno.EACCES else "written"
            _end(error, f"{file}: cannot be {verb} ({error.strerror}); mend it and start again")
        name_the_lost()
        raise


def _end(error, message):
    """Exit with status 1 and a line of its own: a progress bar that the failed frames hold is closed before."""
    traceback.clear_frames(error.__traceback__)
    sys.exit(f"error: {message}")


def _leave_it_to_the_main_process():
    """Most bad input is bad on every process: the main one says so, and the launcher then ends the others."""
    if int(os.environ.get("RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START)


def _lost_worker(error):
    """Whether a data loader misses one of its workers: torch says so, or it fails to fetch what the worker has left.

    What a worker itself has raised is raised elsewhere in the loader.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return str(error).startswith("DataLoader worker") or any(frame.name == "_try_get_data" for frame in frames)
