"""Commands in processes forked from one that has imported what they need: most of a short run's time is imports.

Where a command is to be what a user types, `tests.helpers.commands.start` it.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from tests.helpers.commands import ENVIRONMENT, LAUNCH, ROOT

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.helpers.forks", "train_phase1", "train_phase2", "c2r.encode", "c2r.generate"])


def forked(command, folder, cwd=ROOT, **environment):
    """Start a command, without its launcher; what it prints goes to `folder`, into stdout and stderr.

    Returns:
        `multiprocessing.Process`.
    """
    if command[: len(LAUNCH)] == LAUNCH:
        command = command[len(LAUNCH) :]
    process = _server.Process(target=_run, args=([*map(str, command)], folder, cwd, environment))
    with mock.patch.dict(os.environ, ENVIRONMENT):  # the first one starts the server
        process.start()
    return process


def fork(*command, **environment):
    """Run one command to its end; returns its exit status, output and errors."""
    with tempfile.TemporaryDirectory() as folder:
        (status,) = statuses([forked([*command], folder, **environment)])
        texts = [Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, status, *texts)


def forked_twice(command, folder, cwds=(ROOT, ROOT)):
    """Start a command as a launcher does on two devices: twice, told of each other by the environment.

    Returns:
        two of `multiprocessing.Process`; what they print goes to the folders 0 and 1 in `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in ("0", "1"):
        (folder / rank).mkdir(exist_ok=True)
        world |= {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(forked(command, folder / rank, cwds[int(rank)], ACCELERATE_USE_CPU="true", **world))
    return processes


def statuses(processes, seconds=300):
    """Wait for the ends of processes; those that are late are killed, or they would keep the tests from ending.

    Returns:
        list of exit statuses; minus the signal that killed it.
    """
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _run(command, folder, cwd, environment):
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # for data workers: the server's would import all anew
    os.environ.update(environment)
    os.chdir(cwd)
    script = command[0] if command[0] != "-m" else f"{command[1].replace('.', '/')}.py"
    sys.argv = command[command[0] == "-m" :]
    status = None
    try:
        runpy.run_path(ROOT / script, run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    # Here, as at the end of any script, nothing holds its frames: its data workers have been told to end. Within the
    # exception multiprocessing would wait for one that has missed its SIGTERM.
    sys.exit(status)
