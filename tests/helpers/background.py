"""Commands that are watched while they run, and interrupted."""

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import psutil

from tests.helpers.commands import ENVIRONMENT, ROOT

#: Each step's count must be seen, or the moment to interrupt would be missed.
WATCHED = {"TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}


class Background:
    """A Python command in a session of its own; `with` it, and none of its processes outlives the body.

    Args:
        command: list of arguments for Python.
        environment: variables besides the usual ones.
    """

    def __init__(self, command, **environment):
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = psutil.Popen(
            [sys.executable, *map(str, command)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | WATCHED | environment,
            cwd=ROOT,
            start_new_session=True,
        )
        self._seen = set()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self._output.close()

    @property
    def text(self):
        """All that it has printed, errors too."""
        file = self._output.fileno()
        # Not by seek: the processes write at the same position.
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    @property
    def errors(self):
        """Its lines for the user."""
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def steps(self):
        """All step counts that its progress bar has shown, from where it started."""
        return [int(count) for count in re.findall(r"phase \d: +\d+%\|[^|]*\| (\d+)/", self.text)]

    def trained(self, count=1):
        """Whether it has taken so many steps since it started."""
        steps = self.steps
        return bool(steps) and steps[-1] >= steps[0] + count

    def wait_until(self, condition, seconds=200):
        """Wait for the moment at which `condition()` is true; it must come before the end."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended before its moment: {self.text[-3000:]}"
            assert time.monotonic() < until, f"its moment never came: {self.text[-3000:]}"
            time.sleep(0.0005)

    def family(self):
        """Its processes: the launcher, what it has launched, their data workers; as far as they were seen."""
        if self.process.is_running():
            self._seen |= {self.process, *self.process.children(recursive=True)}
        return list(self._seen)

    def rank(self, number):
        """The training process of this rank, under torchrun."""
        for child in self.process.children():
            with suppress(psutil.NoSuchProcess):  # it has ended
                if child.environ().get("RANK") == str(number):
                    return child
        raise LookupError(f"no process of rank {number}")

    def end(self, seconds=200):
        """Wait for its end, and for that of all its processes, which may outlive a launcher that was killed.

        Returns:
            its exit status; minus the signal that killed it.
        """
        _, alive = psutil.wait_procs(self.family(), timeout=seconds)
        assert not alive, self.text[-3000:]
        return self.process.wait()

    def kill(self):
        """SIGKILL all its processes, and wait for their ends: none may write on.

        Not by process group: torchrun gives each of its processes one of its own.
        """
        family = self.family()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
