"""Run a command in the background, watch its output, and interrupt it."""

import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.helpers.commands import ENVIRONMENT, HANGS_AFTER, ROOT
from tests.helpers.forks import forked


class Background:
    """A Python command in its own session; at the end of a `with` block all its processes are killed.

    Args:
        command: list of arguments for Python.
        fork: start it by `tests.helpers.forks`, without its imports and without a launcher.
        environment: more environment variables.
    """

    def __init__(self, command, fork=False, **environment):
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._forked = forked(command, self._folder.name, **environment) if fork else None
        if fork:
            self.process = psutil.Process(self._forked.pid)
        else:
            with self._outputs[0].open("wb") as output:
                self.process = psutil.Popen(
                    [sys.executable, *map(str, command)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=ENVIRONMENT | environment,
                    cwd=ROOT,
                    start_new_session=True,
                )
        self._seen = set()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self._folder.cleanup()

    @property
    def text(self):
        """Its output and errors so far."""
        return "\n".join(path.read_text(errors="replace") for path in self._outputs if path.exists())

    @property
    def errors(self):
        """Its lines that begin with "error: "."""
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def steps(self):
        """All step counts that its progress bar has shown, the first one included."""
        return [int(count) for count in re.findall(r"phase \d: +\d+%\|[^|]*\| (\d+)/", self.text)]

    def trained(self, count=1):
        """Return True if it has taken at least `count` steps since it started."""
        steps = self.steps
        return bool(steps) and steps[-1] >= steps[0] + count

    def is_running(self):
        """Return True unless it has ended."""
        return self._forked.is_alive() if self._forked else self.process.poll() is None

    def wait_until(self, condition, seconds=HANGS_AFTER):
        """Wait until `condition()` is true; fail if the command ends before."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.is_running(), f"ended too early: {self.text[-3000:]}"
            assert time.monotonic() < until, f"still not true after {seconds} s: {self.text[-3000:]}"
            time.sleep(0.0005)

    def family(self):
        """Return its processes seen so far: the launcher, the launched processes, and their data workers."""
        if self.process.is_running():
            self._seen |= {self.process, *self.process.children(recursive=True)}
        return list(self._seen)

    def rank(self, number):
        """Return the training process of this rank, under torchrun."""
        for child in self.process.children():
            with suppress(psutil.NoSuchProcess):  # it has ended
                if child.environ().get("RANK") == str(number):
                    return child
        raise LookupError(f"no process of rank {number}")

    def end(self, seconds=HANGS_AFTER):
        """Wait for all its processes to end: they may outlive a launcher that was killed.

        Returns:
            its exit status; minus the number of the signal if it was killed.
        """
        _, alive = psutil.wait_procs(self.family(), timeout=seconds)
        assert not alive, self.text[-3000:]
        if self._forked:
            self._forked.join(seconds)
            return self._forked.exitcode
        return self.process.wait()

    def suspend(self):
        """Stop all its processes until `resume`."""
        for member in self.family():
            with suppress(psutil.NoSuchProcess):
                member.suspend()

    def resume(self):
        """Continue after `suspend`."""
        for member in self.family():
            with suppress(psutil.NoSuchProcess):
                member.resume()

    def kill(self):
        """Send SIGKILL to all its processes and wait for them to end.

        A signal to the process group would miss some: torchrun gives each of its processes a group of its own.
        """
        family = self.family()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
