import os
import signal
import time

import pytest
from accelerate import Accelerator

from c2r.training.interruption import Interruption, slot_deadline


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_the_run_save_and_stop(number, signal_handlers, capfd):
    asked = Interruption()
    assert asked.agree(Accelerator(cpu=True))
    os.kill(os.getpid(), number)
    assert "saving after this step" in capfd.readouterr().err
    assert not asked.agree(Accelerator(cpu=True))
    assert asked.save
    assert asked.stop == number.name


def test_save_every_minutes_saves_without_stopping(signal_handlers):
    asked = Interruption(save_every_minutes=0.001)
    accelerator = Accelerator(cpu=True)
    time.sleep(0.1)
    assert asked.agree(accelerator)
    assert asked.save
    asked.saved()
    assert asked.agree(accelerator)
    assert not asked.save


@pytest.mark.parametrize(("left", "stops"), [(100, True), (1000, False)])
def test_a_slot_that_ends_soon_makes_the_run_save_and_stop(left, stops, signal_handlers, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left))
    asked = Interruption(save_before_timeout=300)
    asked.agree(Accelerator(cpu=True))
    assert asked.save == stops
    assert (asked.stop is not None) == stops


def test_the_deadline_is_before_the_end_of_the_slot(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000")
    assert slot_deadline(90.0) == 1000000 - 90
    assert slot_deadline(None) is None
