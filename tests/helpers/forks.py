"""Run commands in forks of a process that has imported their modules: imports take most of a short run's time.

`tests.helpers.commands.start` runs a command as a user does. `start_warm` does so too, its launcher and whatever the
launcher starts included, but all of them are forks.
"""

import atexit
import ctypes
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from unittest import mock

import psutil

from tests.helpers.commands import ENVIRONMENT, HANGS_AFTER, LAUNCH, ROOT, start

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("tests.helpers.forks", "train_phase1", "train_phase2"),
        *("c2r.encoding.encoding_pass", "c2r.pipeline"),  # which commands import inside functions
        *("deepspeed", "matplotlib.backends.backend_agg", "matplotlib.figure", "scipy.io"),  # and libraries
        *("accelerate.commands.launch", "torch.distributed.run"),
    ]
)


def forked(command, folder, cwd=ROOT, **environment):
    """Start a command without its launcher; its output goes into the files stdout and stderr in `folder`.

    A variable of the environment that is None is removed.

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


def start_warm(*command, **environment):
    """Run one Python command to its end, like `start`; it and all Python commands that it starts are forks.

    With PYTHON_EXEC=`warm_python()`, a torchrun that is started in another way starts forks. They are of no use where
    imports are tested, or signals to a process group.
    """
    return start(*command, python=warm_python(), **environment)


@functools.cache
def warm_python():
    """Start a server for tests/helpers/warm_python.py; return the path of that script, which stands in for Python."""
    folder = tempfile.TemporaryDirectory()
    script = Path(folder.name, "python")
    script.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).with_name("warm_python.py").read_text())
    script.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder.name}/socket")
        listener.listen()
        server = _server.Process(target=_serve, args=(listener,))
        with mock.patch.dict(os.environ, ENVIRONMENT):
            server.start()
    atexit.register(folder.cleanup)  # forks keep this reference too: without it they would remove the folder
    # Not by atexit: where the tests run in a process of multiprocessing, that first waits for the server.
    Finalize(None, server.terminate, exitpriority=0)
    return str(script)


def _serve(listener):
    """Fork for every connection, until the process that has started this one ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    ended = multiprocessing.parent_process().sentinel
    while ended not in select.select([listener, ended], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _attend(connection)
        connection.close()


def _attend(connection):
    """Run the command of one connection in a fork, pass signals on to it, and return its exit status."""
    _, (*outputs, network, names), _, _ = socket.recv_fds(connection, 1, 5)
    with connection.makefile("rb") as stream:
        command, cwd, environment = json.loads(stream.read(int.from_bytes(stream.read(4), "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for space in (network, names):
            ctypes.CDLL(None).setns(space, 0)
        for number, descriptor in enumerate(outputs):
            os.dup2(descriptor, number)
        for descriptor in (*outputs, network, names):
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = command.pop(0)
        return _execute(command, cwd)
    for descriptor in (*outputs, network, names):
        os.close(descriptor)  # whoever reads the output waits for all that could write it
    process = os.pidfd_open(pid)
    while process not in select.select([connection, process], [], [])[0]:
        numbers = connection.recv(16)
        if not numbers:
            killed = psutil.Process(pid)
            for member in [killed, *killed.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):  # it has ended
                    member.kill()
            break
        for number in numbers:
            signal.pidfd_send_signal(process, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(BrokenPipeError):  # the client has been killed
        connection.sendall(status.to_bytes(4, "big", signed=True))


def _run(command, folder, cwd, environment):
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _execute(command, cwd)


def _execute(command, cwd):
    """Run a command line of Python in this process, and end it."""
    gc.freeze()  # what has been imported stays: no need to search it for garbage again and again
    os.setsid()  # a test may signal the command's process group
    multiprocessing.set_start_method("fork", force=True)  # for data workers: a forkserver would import again
    os.chdir(cwd)
    if command[0] == "-u":
        del command[0]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    script = command[0]
    if script == "-m":
        del command[0]
        found = importlib.util.find_spec(command[0])
        if found.submodule_search_locations:
            found = importlib.util.find_spec(f"{command[0]}.__main__")
        script = found.origin
    sys.argv = command
    status = None
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    # Outside the except block nothing holds the script's frames, so its data loaders have ended their workers. Within
    # it, multiprocessing would wait for a worker that has missed its SIGTERM.
    sys.exit(status)
