"""Data loader workers: they end with their parent process."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers.commands import ENVIRONMENT, ROOT

#: A process whose worker prints its id and goes on to start for a second.
PARENT = """
import os, time
from torch.utils.data import DataLoader
from c2r.data.workers import shield_worker

def start_slowly(worker_id):
    print(os.getpid(), flush=True)
    time.sleep(1)
    shield_worker(worker_id)

next(iter(DataLoader([0], num_workers=1, worker_init_fn=start_slowly)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch alone watches the parent elsewhere")
def test_a_worker_ends_even_if_its_parent_is_killed_while_it_starts():
    # torch's worker notes its parent's id only after this, so by itself it would take its new parent for it.
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    worker = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 30
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.1)
    ended = not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    if not ended:
        worker.kill()
    assert ended
