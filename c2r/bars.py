"""Progress of work that takes more than a few seconds: bars on a terminal, a line now and then in a log file."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

#: Seconds between two lines where the output is no terminal, and after which work without a bar says that it goes on.
LOG_INTERVAL, FIRST_LINE = 30.0, 5.0


class _Lines:
    """Writes each state of a bar as a line of its own: a log file cannot take the last one back."""

    def __init__(self, stream):
        self._stream = stream
        self.encoding = stream.encoding  # tqdm draws with blocks or with ASCII

    def write(self, text: str):
        if text := text.strip("\r\n "):
            self._stream.write(f"{text}\n")

    def flush(self):
        self._stream.flush()


def bar_settings(shown: bool) -> dict[str, Any]:
    """Return keyword arguments for tqdm.

    Args:
        shown: False on processes that print nothing.
    """
    settings: dict[str, Any] = {"disable": not shown, "dynamic_ncols": True}
    # tqdm reads the variable itself; it is set where the output is no terminal, but read as on one.
    if shown and not sys.stderr.isatty() and "TQDM_MININTERVAL" not in os.environ:
        settings |= {"file": _Lines(sys.stderr), "mininterval": LOG_INTERVAL, "maxinterval": 2 * LOG_INTERVAL}
        settings |= {"position": 0}  # below another bar it would move the cursor
    return settings


def progress_bar(total: int, title: str, unit: str, shown: bool) -> tqdm:
    """Return a bar to be used in a `with` statement.

    Args:
        total: number of units.
        title: what is done.
        unit: such as "clip".
        shown: False on processes that print nothing.
    """
    # A bar of work that takes a moment is not shown at all.
    return tqdm(total=total, desc=title, unit=unit, leave=False, delay=1.0, **bar_settings(shown))


def close_bars() -> None:
    """Close all bars, each of which then ends its line."""
    for bar in list(tqdm._instances):
        bar.close()


@contextmanager
def slow_work(title: str, shown: bool) -> Iterator[None]:
    """Print a line after FIRST_LINE seconds and every LOG_INTERVAL seconds while the body runs.

    For work that has no units to count, such as reading weights or waiting for other processes.

    Args:
        title: what is done, such as "gathering the weights".
        shown: False on processes that print nothing.
    """
    if not shown:
        yield
        return
    ended, started = threading.Event(), time.monotonic()

    def report():
        wait = FIRST_LINE
        while not ended.wait(wait):
            logger.info("%s: %.0f s so far", title, time.monotonic() - started)
            wait = LOG_INTERVAL

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
