import re
import subprocess
import sys

import pytest

from c2r.watchdog import EXIT_HUNG, hang_report
from tests.commands import ENVIRONMENT, TORCHRUN

# Rank 1 stays behind in step 3: asleep, or killed without a word.
SCRIPT = """
import os, signal, sys, time
import torch
from accelerate import Accelerator
import c2r.watchdog
c2r.watchdog.GONE_AFTER = 3.0
accelerator = Accelerator(cpu=True)
watchdog = c2r.watchdog.Watchdog(accelerator, timeout_seconds=float(sys.argv[2]))
for step in range(1, 6):
    watchdog.beat(f"step {step}: data")
    if step == 3 and accelerator.process_index == int(sys.argv[3]):
        if sys.argv[1] == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if sys.argv[1] == "slow":
            for second in range(5):
                time.sleep(1)
                watchdog.beat(f"loading {second}")
        if sys.argv[1] == "asleep":
            time.sleep(1000)
    if sys.argv[1] == "slow":
        watchdog.wait_for_everyone()
    watchdog.beat(f"step {step}: forward and backward")
    accelerator.reduce(torch.ones(1))
watchdog.close()
"""


def message(count, idle, what="step 3: data", waiting=False):
    return {"count": count, "idle": idle, "what": what, "waiting": waiting, "host": "node"}


@pytest.mark.parametrize("idle", [(0, 0), (9, 9), (0, 9)])
def test_nothing_is_reported_while_all_move(idle):
    assert hang_report([message(5, seconds) for seconds in idle], timeout_seconds=10) is None


def test_the_process_behind_is_named():
    messages = [message(6, 11, "step 3: forward and backward"), message(5, 12)]
    line = hang_report(messages, timeout_seconds=10)
    assert "process 1 on node at 'step 3: data'" in line
    assert "others wait at 'step 3: forward and backward'" in line


def test_who_waits_for_a_slow_one_that_moves_is_not_named():
    assert hang_report([message(6, 100, waiting=True), message(5, 2)], timeout_seconds=10) is None


def run(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *TORCHRUN, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sleeping_process_is_named_and_all_end(rank, tmp_path):
    done = run(tmp_path, "asleep", 3, rank)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(rf"no progress for 3 s: process {rank} on \S+ at 'step 3: data'", lines[0])
    assert f"exitcode  : {EXIT_HUNG}" in done.stderr


def test_a_process_that_is_gone_is_named(tmp_path):
    done = run(tmp_path, "stopped", 600, 1)
    assert done.returncode != 0
    assert re.search(r"error: process 1 on \S+ no longer answers", done.stderr)


def test_a_slow_process_that_moves_is_waited_for(tmp_path):
    done = run(tmp_path, "slow", 3, 1)
    assert done.returncode == 0, done.stderr[-2000:]
