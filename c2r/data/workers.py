"""Signal handling of data loader workers, and the part of the watchdog that data and encoding use."""

import os
import signal
import sys
import threading
from contextlib import AbstractContextManager
from typing import Protocol


class Heartbeat(Protocol):
    """Signs of life of a process and barriers without a time limit, as the run's `Watchdog` gives them."""

    def beat(self, what: str) -> None:
        """Record that this process makes progress, and at what."""

    def unjudged(self) -> AbstractContextManager[None]:
        """Allow the body any time without a beat."""

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the body on the main process first, then on the other processes."""

    def wait_for_everyone(self) -> None:
        """Wait until every process arrives here."""


def shield_worker(worker_id: int) -> None:
    """Make a data loader's worker ignore SIGINT, and SIGTERM unless its parent process sends it; a `worker_init_fn`.

    A terminal sends SIGINT to the workers too, and Slurm SIGTERM. If they ended, the training loop could not finish
    its step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":
        return

    def end_when_the_parent_asks():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_when_the_parent_asks, daemon=True).start()
