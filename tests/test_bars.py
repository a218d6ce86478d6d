"""Progress in log files: whole lines, and none for work that takes a moment."""

import io
import logging
import sys
import time

from c2r import bars
from c2r.bars import progress_bar, slow_work


def test_a_log_file_gets_whole_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0)
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    outer = bars.tqdm(total=2, desc="outer", **bars.bar_settings(shown=True))
    inner = bars.tqdm(total=3, desc="inner", leave=False, **bars.bar_settings(shown=True))
    for _ in range(3):
        inner.update()
    inner.close()
    outer.update()
    outer.close()
    lines = log.getvalue().split("\n")
    assert [line.partition(":")[0] for line in lines] == ["outer", *["inner"] * 4, *["outer"] * 2, ""]
    assert not {"\r", "\x1b"} & set(log.getvalue())


def test_work_of_a_moment_shows_no_bar(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(3, "validation", "batch", shown=True) as bar:
        for _ in range(3):
            bar.update()
    with progress_bar(3, "validation", "batch", shown=False) as bar:
        bar.update()
    assert log.getvalue() == ""


def test_slow_work_says_that_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(bars, "FIRST_LINE", 0.01)
    caplog.set_level(logging.INFO)
    with slow_work("reading weights", shown=True):
        until = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
    assert caplog.messages == ["reading weights: 0 s so far"]
    with slow_work("reading weights", shown=False):
        time.sleep(0.05)
    assert len(caplog.messages) == 1
