"""Detect a hung or dead process and name it in the error, instead of waiting for it in silence.

Every process publishes its position through a store beside the process group, so that it is read even while the group
itself is stuck in a collective.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import DistError, TCPStore

from c2r import InputError, cli

EXIT_HUNG = 74  # EX_IOERR of sysexits.h

INTERVAL = 1.0  # seconds between two messages of a process

#: Largest time in seconds without a message before a process counts as dead: a busy machine delays messages.
GONE_AFTER = 30.0

_GONE = "no longer answers: it has ended, or the network between the machines is down"
_CONNECTION = (
    "every machine reaches main_process_ip at all ports, through the network interface that GLOO_SOCKET_IFNAME (CPU) "
    "or NCCL_SOCKET_IFNAME (GPU) names, such as eth0"
)

_current: "Watchdog | None" = None  # of this process


class Watchdog:
    """Ends the run with one line that names the slowest process, if no process proceeds for `timeout_seconds`.

    With one process all methods do nothing. Create it on every process, after the process group.

    Args:
        accelerator: the run's.
        timeout_seconds: above the longest time between two calls of `beat`: loading a model, a micro-step, a save.
    """

    def __init__(self, accelerator: Accelerator, timeout_seconds: float):
        self.accelerator = accelerator
        self.timeout_seconds = timeout_seconds
        self.gone_after = min(GONE_AFTER, timeout_seconds)
        self.alone = accelerator.num_processes == 1
        # Not judged before the first beat: downloads and the first probe of all files may take any time.
        self._state: dict[str, Any] = {"count": 0, "what": "start", "waiting": True}
        self._beat_at = time.monotonic()
        self._answered_at = time.monotonic()  # when the store last answered
        self._closed = threading.Event()
        self._barriers = 0
        global _current
        _current = None if self.alone else self
        if self.alone:
            return
        host = os.environ.get("MASTER_ADDR", "localhost")
        port = 0
        if accelerator.is_main_process:
            self._server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = self._server.port
        port, self._main_host = broadcast_object_list([port, socket.gethostname()])
        # One connection for each of the two threads: a call of one must not wait for a call of the other.
        self._store, self._thread_store = (
            TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self.gone_after)) for _ in range(2)
        )
        self._publish(0)
        accelerator.wait_for_everyone()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        threading.Thread(target=self._watch_store, daemon=True, name="watchdog of the store").start()
        # A thread that uses the store while Python exits aborts the process.
        atexit.register(self._stop)

    def beat(self, what: str):
        """Record the position of this process, such as "step 812: data"; costs no communication."""
        self._state = {"count": self._state["count"] + 1, "what": what, "waiting": False}
        self._beat_at = time.monotonic()

    def wait_for_everyone(self):
        """Wait at a barrier for any time, as long as the processes that have not arrived keep beating."""
        if not self.alone:
            unjudged = self._state["waiting"]
            self._state = self._state | {"waiting": True}
            self._barriers += 1
            key = f"barrier{self._barriers}"
            arrived = self._store.add(key, 1)
            while arrived < self.accelerator.num_processes:
                time.sleep(0.05)
                arrived = self._store.add(key, 0)
            # The counts differ, as shares differ in size. From here on the lowest count is the slowest again.
            self._state["count"] = self._barriers * 10**9
            self.beat(self._state["what"])
            self._state["waiting"] = unjudged
        self.accelerator.wait_for_everyone()

    @contextmanager
    def unjudged(self) -> Iterator[None]:
        """Let the body take any time without a beat; it may probe all files, for instance."""
        judged, self._state = self._state, self._state | {"waiting": True}
        yield
        self._state, self._beat_at = self._state | {"waiting": judged["waiting"]}, time.monotonic()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body on the main process first; the others wait for it, for any time."""
        if not self.accelerator.is_main_process:
            self.wait_for_everyone()
        with self.unjudged():
            yield
        if self.accelerator.is_main_process:
            self.wait_for_everyone()

    def close(self):
        """Stop watching, at the end of a run."""
        if not self.alone:
            self._stop()
            atexit.unregister(self._stop)
        self.accelerator.wait_for_everyone()  # the main process keeps the store until no other process uses it

    def _stop(self):
        self._closed.set()
        self._thread.join(5 * INTERVAL)

    def _publish(self, number):
        message = self._state | {
            "number": number,
            "idle": time.monotonic() - self._beat_at,
            "host": socket.gethostname(),
        }
        self._thread_store.set(f"rank{self.accelerator.process_index}", json.dumps(message))

    def _watch(self):
        ranks = range(self.accelerator.num_processes)
        heard = {rank: (None, time.monotonic()) for rank in ranks}  # number of the last message, and its time
        number = 0
        while not self._closed.wait(INTERVAL):
            number += 1
            try:
                self._publish(number)
                messages = [json.loads(text) for text in self._thread_store.multi_get([f"rank{r}" for r in ranks])]
            except (DistError, RuntimeError):  # the main process holds the store
                if not self._closed.wait(INTERVAL):
                    self._end_without_store()
                return
            self._answered_at = now = time.monotonic()
            for rank, message in enumerate(messages):
                if message["number"] != heard[rank][0]:
                    heard[rank] = (message["number"], now)
            gone = [rank for rank in ranks if now - heard[rank][1] > self.gone_after]
            prints_line = self.accelerator.process_index == min(set(ranks) - set(gone), default=0)
            if gone:
                _end(f"{_process_names(gone, messages)} {_GONE}", prints_line)
            line = hang_report(messages, self.timeout_seconds)
            if line is not None:
                _end(line, prints_line)

    def _watch_store(self):
        # Where the link between two machines is cut, a call of the store does not return.
        while not self._closed.wait(INTERVAL):
            if time.monotonic() - self._answered_at > self.gone_after:
                self._end_without_store()

    def _end_without_store(self):
        """End this process because process 0 does not answer; print it once on every machine."""
        first_here = self.accelerator.is_local_main_process or self.accelerator.process_index == 1
        _end(f"process 0 on {self._main_host} {_GONE}", prints_line=first_here)


@contextmanager
def joining(timeout_seconds: float) -> Iterator[None]:
    """End this process with one line if the body, which connects the launched processes, takes too long.

    Args:
        timeout_seconds: above the longest difference between the starts of two processes.

    Raises:
        InputError: the processes cannot connect.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    line = (
        f"the launched processes have not connected after {timeout_seconds:.0f} s (--distributed_timeout_minutes): "
        f"check that the command runs on every machine, and that {_CONNECTION}"
    )
    timer = threading.Timer(timeout_seconds, _end, (line, first_here))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        # Gloo has no error class of its own.
        if isinstance(error, DistError) or "connect" in str(error):
            reason = str(error).partition("\n")[0]
            raise InputError(f"the launched processes cannot connect ({reason}); check that {_CONNECTION}") from error
        raise
    finally:
        timer.cancel()


def _end(line, prints_line):
    if prints_line:
        print(
            f"\nerror: {line}; restart, a training run with --resume_from_checkpoint latest",
            file=sys.stderr,
            flush=True,
        )
    else:
        time.sleep(2 * INTERVAL)  # otherwise the launcher ends the process that prints the line
    os._exit(EXIT_HUNG)


def name_dead_process():
    """Wait until the watchdog has ended this process and named a dead one, if there is one. Call it after a failure.

    When a process dies, the collectives of the others fail at once or hang, depending on the backend. The errors of
    the collectives do not name the process that they were waiting for.
    """
    if _current is not None and not _current._closed.is_set():
        _current.gone_after = 3 * INTERVAL
        time.sleep(6 * INTERVAL)


def hang_report(messages: list[dict[str, Any]], timeout_seconds: float) -> str | None:
    """Return one line about the processes that keep the others waiting; None as long as all proceed.

    Args:
        messages: one per process: {"count", "what", "waiting", "idle", "host"}; idle in seconds. A process with
            "waiting" is not judged.
        timeout_seconds: idle time that counts as a hang.
    """
    # Processes with a higher count may be idle for longer: they wait for those with the lowest.
    busy = [rank for rank, message in enumerate(messages) if not message["waiting"]]
    lowest = min((messages[rank]["count"] for rank in busy), default=0)
    behind = [rank for rank in busy if messages[rank]["count"] == lowest]
    if min((messages[rank]["idle"] for rank in behind), default=0) <= timeout_seconds:
        return None
    what = messages[behind[0]]["what"]
    line = f"no progress for {timeout_seconds:.0f} s: {_process_names(behind, messages)} at '{what}'"
    others = [m["what"] for r, m in enumerate(messages) if r not in behind]
    if others:
        line += f", the others wait at '{others[0]}'"
    return f"{line} (--distributed_timeout_minutes)"


def _process_names(ranks, messages):
    return ", ".join(f"process {rank} on {messages[rank]['host']}" for rank in ranks)


cli.failure_hooks.append(name_dead_process)
