import os
import signal
import time
from argparse import Namespace

import pytest
from accelerate import Accelerator

from c2r import InputError
from c2r.training.interruption import Interruption, slot_deadline


def interruption(**options):
    return Interruption(Namespace(**{"save_every_minutes": None, "save_before_timeout": None} | options))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, signal_handlers, capfd):
    asked = interruption()
    assert asked.agree(Accelerator(cpu=True))
    os.kill(os.getpid(), number)
    assert "saving after this step" in capfd.readouterr().err
    assert not asked.agree(Accelerator(cpu=True))
    assert asked.save
    assert asked.stop == number.name


def test_the_clock_saves_and_does_not_stop(signal_handlers):
    asked = interruption(save_every_minutes=0.001)
    accelerator = Accelerator(cpu=True)
    time.sleep(0.1)
    assert asked.agree(accelerator)
    assert asked.save
    asked.saved()
    assert asked.agree(accelerator)
    assert not asked.save


@pytest.mark.parametrize(("left", "stops"), [(100, True), (1000, False)])
def test_the_end_of_a_slot_saves_and_stops(left, stops, signal_handlers, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left))
    asked = interruption(save_before_timeout="5m")
    asked.agree(Accelerator(cpu=True))
    assert asked.save == stops
    assert (asked.stop is not None) == stops


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_the_deadline_is_before_the_end(text, seconds, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000")
    assert slot_deadline(text) == 1000000 - seconds


@pytest.mark.parametrize("text", ["5", "m", "-5m", "5 minutes"])
def test_what_is_no_duration_is_refused(text, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000")
    with pytest.raises(InputError, match="such as 90s, 5m or 1h"):
        slot_deadline(text)


def test_a_slot_without_an_end_is_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    with pytest.raises(InputError, match="SLURM_JOB_END_TIME"):
        slot_deadline("5m")
