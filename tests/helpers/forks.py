"""Run commands in forks of a process that has imported their modules: imports take most of a short run's time.

`tests.helpers.commands.start` runs a command as a user does, its launcher included.
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

from tests.helpers.commands import ENVIRONMENT, HANGS_AFTER, LAUNCH, ROOT

_server = multiprocessing.get_context("forkserver")
#: The commands import the latter two inside functions.
_PRELOADED = ["tests.helpers.forks", "train_phase1", "train_phase2", "c2r.encoding.encoding_pass", "c2r.pipeline"]
_server.set_forkserver_preload(_PRELOADED)


def forked(command, folder, cwd=ROOT, **environment):
    """Start a command without its launcher; its output goes into the files stdout and stderr in `folder`.

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
    """Run one command to its end; return its exit status, output and errors."""
    with tempfile.TemporaryDirectory() as folder:
        (status,) = statuses([forked([*command], folder, **environment)])
        texts = [Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, status, *texts)


def forked_twice(command, folder, cwds=(ROOT, ROOT)):
    """Start a command on two processes, with the environment variables that a launcher sets.

    Returns:
        two `multiprocessing.Process`; their output goes into the folders 0 and 1 in `folder`.
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


def statuses(processes, seconds=HANGS_AFTER):
    """Wait for processes to end, and kill those that still run after `seconds`.

    Returns:
        list of exit statuses; minus the number of the signal for a process that was killed.
    """
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _run(command, folder, cwd, environment):
    os.setsid()  # a test may signal the command's process group
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # for data workers: a forkserver would import again
    os.environ.update(environment)
    os.chdir(cwd)
    script = command[0] if command[0] != "-m" else f"{command[1].replace('.', '/')}.py"
    sys.argv = command[command[0] == "-m" :]
    status = None
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    # Outside the except block nothing holds the script's frames, so its data loaders have ended their workers. Within
    # it, multiprocessing would wait for a worker that has missed its SIGTERM.
    sys.exit(status)
