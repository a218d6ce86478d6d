"""Number and signal handling of data loader workers, and the part of the watchdog that data and encoding use."""

import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
from contextlib import AbstractContextManager
from typing import Protocol

from c2r import InputError

logger = logging.getLogger(__name__)

#: Open files that a process needs for its pipes to one worker and for the tensors of the batches in flight.
FILES_PER_WORKER = 16
#: Open files for everything else that is opened after a data loader: models, logs, connections.
OTHER_FILES = 64
#: Seconds between two looks of a worker at whether its parent process is there.
PARENT_INTERVAL = 5.0


class Heartbeat(Protocol):
    """Signs of life of a process and barriers without a time limit, as the run's `Watchdog` gives them."""

    timeout_seconds: float  #: above the longest time between two calls of `beat`

    def beat(self, what: str) -> None:
        """Record that this process makes progress, and at what."""

    def unjudged(self) -> AbstractContextManager[None]:
        """Allow the body any time without a beat."""

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on the main process first, then on the other processes."""

    def wait_for_everyone(self) -> None:
        """Wait until every process arrives here."""


def usable_workers(wanted: int, batches: int) -> int:
    """Return how many data loader workers to start; log a line if these are fewer than wanted.

    More workers than cores or batches would only take memory. Their number does not change what is drawn.

    Args:
        wanted: --dataloader_num_workers.
        batches: the batches that this process will load.

    Raises:
        InputError: the process may not open enough files. Workers that cannot open one drop their batch, for which
            the process would wait without end.
    """
    cores = _cores()
    if cores == os.cpu_count():  # otherwise the launcher, such as srun, has given each process its own
        cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    count = min(wanted, cores, batches)
    if count < wanted:
        limit = "batches to load" if batches == count else "cores for each process"
        logger.info("--dataloader_num_workers %d: lowered to %d, the number of %s", wanted, count, limit)
    _require_open_files(count)
    return count


def _cores():
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _require_open_files(workers):
    """Raise the soft limit of open files if it is too low; raise InputError if the hard limit is."""
    needed = len(os.listdir("/dev/fd")) + OTHER_FILES + workers * FILES_PER_WORKER
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard < needed and hard != resource.RLIM_INFINITY:
        enough_for_none = needed - workers * FILES_PER_WORKER <= hard
        fewer = f", or lower --dataloader_num_workers {workers}" if enough_for_none else ""
        raise InputError(f"ulimit -n {hard}: too few open files, {needed} are needed; run ulimit -n 4096 first{fewer}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def shield_worker(worker_id: int) -> None:
    """Make a data loader's worker ignore SIGINT, and SIGTERM unless its parent process sends it; a `worker_init_fn`.

    A terminal sends SIGINT to the workers too, and Slurm SIGTERM. If they ended, the training loop could not finish
    its step and save. The worker ends with its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return

    def end_with_the_parent():
        # torch's worker notes its parent's id too late: if that was killed while the worker started, it would wait
        # without end, and hold open the output and the memory that it shares.
        while os.getppid() == parent.pid:
            signalled = signal.sigtimedwait({signal.SIGTERM}, PARENT_INTERVAL)
            if signalled is not None and signalled.si_pid == parent.pid:
                break
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_the_parent, daemon=True).start()
