"""Write a checkpoint while training goes on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from c2r.training.failing_together import failing_together

_WRITING, _WRITTEN, _FAILED = 0, 1, 2


class BackgroundWrite:
    """Files that a thread of each process writes, completed when every process has written its own.

    Create it on every process. A single process also completes the files in the thread; several agree in the main
    thread, where their collectives run.

    Args:
        accelerator: the run's.
        path: file or folder that is written, for messages.
        write: writes this process's files.
        complete: gives them their final names. It is called on every process.
        discard: removes what was written if a process fails. It is called on every process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        write: Callable[[], None],
        complete: Callable[[], None],
        discard: Callable[[], None],
    ):
        self._accelerator, self._path = accelerator, path
        self._write, self._complete, self._discard = write, complete, discard
        self._alone = accelerator.num_processes == 1
        self._error: BaseException | None = None
        self.seconds = 0.0  #: from the start to the end of the writing
        self._thread = threading.Thread(target=self._run, name=f"writes {path.name}")
        self._thread.start()

    def _run(self):
        started = time.perf_counter()
        try:
            self._write()
            if self._alone:
                self._complete()
        except BaseException as error:  # raised by `finish`
            self._error = error
        self.seconds = time.perf_counter() - started

    def has_ended(self) -> bool:
        """Return True if every process has written its files, or one has failed. Call it on every process."""
        state = _WRITING if self._thread.is_alive() else _FAILED if self._error else _WRITTEN
        if self._alone:
            return state != _WRITING
        states = self._accelerator.gather(torch.tensor([state], device=self._accelerator.device)).tolist()
        return _FAILED in states or _WRITING not in states

    def finish(self):
        """Wait until the files of all processes are written, and complete them. Call it on every process.

        Raises:
            InputError: a process has no room or no permission to write. Its files are removed.
        """
        self.join()
        try:
            with failing_together(self._accelerator, self._path):
                if self._error is not None:
                    raise self._error
            if not self._alone:
                self._complete()
        except BaseException:
            self._discard()
            raise

    def join(self):
        """Wait until this process's files are written; `finish` raises its error."""
        self._thread.join()
