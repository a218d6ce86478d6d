import re
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator

from c2r import InputError
from c2r.training.watchdog import EXIT_HUNG, Watchdog, hang_report, joining
from tests.helpers.background import Background
from tests.helpers.commands import TORCHRUN
from tests.helpers.forks import fork, warm_python

# One rank sleeps, stops, or is slow in step 3.
SCRIPT = """
import os, signal, sys, time
import torch
from accelerate import Accelerator
import c2r.training.watchdog
c2r.training.watchdog.GONE_AFTER = 6.0
accelerator = Accelerator(cpu=True)
watchdog = c2r.training.watchdog.Watchdog(accelerator, timeout_seconds=float(sys.argv[2]))
for step in range(1, 6):
    watchdog.beat(f"step {step}: data")
    if step == 3 and accelerator.process_index == int(sys.argv[3]):
        if sys.argv[1] == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if sys.argv[1] == "slow":
            for second in range(9):
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


# The first of two processes, whose second one is never started.
ALONE = """
import torch
from c2r.training.watchdog import joining
with joining(timeout_seconds=1):
    torch.distributed.init_process_group("gloo")
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


def test_a_process_further_on_is_not_named_although_it_is_idle_for_longer():
    messages = [message(6, 12, "step 3: forward and backward"), message(5, 9)]
    assert hang_report(messages, timeout_seconds=10) is None
    messages = [message(6, 14, "step 3: forward and backward"), message(5, 11)]
    assert "process 1 on node at 'step 3: data'" in hang_report(messages, timeout_seconds=10)


def test_a_process_that_waits_for_a_slow_one_is_not_named():
    assert hang_report([message(6, 100, waiting=True), message(5, 2)], timeout_seconds=10) is None


def test_unjudged_work_may_take_any_time():
    watchdog = Watchdog(Accelerator(cpu=True), 60)

    def is_judged():
        message = watchdog._state | {"idle": 1e6, "host": "a"}
        return hang_report([message], 60) is not None

    watchdog.beat("step 3: data")
    assert is_judged()
    with watchdog.unjudged():
        assert not is_judged()
    assert is_judged()
    with watchdog.main_process_first():
        assert not is_judged()


def test_no_process_is_judged_before_the_first_beat():
    assert hang_report([message(0, 5000, "start", waiting=True)] * 2, timeout_seconds=10) is None


def test_a_process_that_is_never_joined_ends(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = fork(script, **world)
    assert done.returncode == EXIT_HUNG
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "have not connected after 1 s (--distributed_timeout_minutes): check that the command runs on every" in line


def test_processes_that_cannot_connect_are_told_what_to_check(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    nobody = {"init_method": "tcp://127.0.0.1:1", "world_size": 2, "rank": 1, "timeout": timedelta(seconds=1)}
    message = r"cannot connect \(The client socket .*\); check .* GLOO_SOCKET_IFNAME"
    with pytest.raises(InputError, match=message), joining(timeout_seconds=60):
        torch.distributed.init_process_group("gloo", **nobody)


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return lambda *arguments: Background([*TORCHRUN, script, *arguments], PYTHON_EXEC=warm_python())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sleeping_process_is_named_and_all_end(rank, start):
    with start("asleep", 3, rank) as done:
        assert done.end() != 0
        assert len(done.errors) == 1, done.text
        assert re.search(rf"no progress for 3 s: process {rank} on \S+ at 'step 3: data'", done.errors[0])
        assert f"exitcode  : {EXIT_HUNG}" in done.text


@pytest.mark.slow
def test_a_dead_process_is_named(start):
    with start("stopped", 600, 1) as done:
        done.wait_until(lambda: done.errors)
        done.rank(1).kill()  # torchrun would wait for it for half a minute
        assert done.end() != 0
        assert re.match(r"error: process 1 on \S+ no longer answers", done.errors[0])


@pytest.mark.slow
def test_the_others_wait_for_a_slow_process_that_moves(start):
    with start("slow", 6, 1) as done:
        assert done.end() == 0, done.text[-2000:]
