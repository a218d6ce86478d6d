"""Data loader workers that outlive the signals sent to their terminal or job."""

import os
import signal
import sys
import threading


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
