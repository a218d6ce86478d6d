"""Too few open files, no shared memory, no inodes: one line names what is missing. Workers beyond the cores."""

import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from c2r import InputError
from c2r.cli import run
from c2r.data import workers
from c2r.data.workers import usable_workers
from c2r.sampler import MixedCGRealSampler
from c2r.training.batches import TrainBatches
from c2r.training.failing_together import failing_together
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.options import options
from tests.helpers.runs import run_of

CORES = len(os.sched_getaffinity(0))

#: Ten batches of 400 kB in flight, from one worker.
LOADS = """
import torch
from torch.utils.data import DataLoader
from c2r import cli
cli.run(lambda: list(DataLoader([torch.ones(100_000)] * 10, num_workers=1, prefetch_factor=10)))
"""
WRITES = """
import sys
from pathlib import Path
from c2r import cli
from c2r.files import write_atomic
cli.run(lambda: [write_atomic(Path(sys.argv[1], str(number)), b"1") for number in range(10)])
"""
NEEDS_WORKERS = """
from c2r import cli
from c2r.data.workers import usable_workers
cli.run(lambda: usable_workers(1, 10))
"""


def error_after(preparation, script, *arguments):
    """Run a script in a shell, with mounts of its own, after a shell command; return its error line."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    command = ["unshare", "--mount", "sh", "-c", f'{preparation} || exit 9; exec "$@"', "sh", sys.executable]
    done = subprocess.run(
        [*command, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    if done.returncode == 9 or done.stderr.startswith("unshare:"):
        pytest.skip(f"not permitted here: {done.stderr.strip()}")
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["size=1m", "size=8k", "nr_inodes=6"])
def test_a_full_dev_shm_is_named(limit):
    line = error_after(f"mount -t tmpfs -o {limit} tmpfs /dev/shm", LOADS)
    assert line.startswith("error: /dev/shm: full, and data loader workers need it")
    assert "--shm-size 8g" in line
    assert "--dataloader_num_workers 0" in line


def test_a_disk_without_inodes_is_named(tmp_path):
    line = error_after(f"mount -t tmpfs -o nr_inodes=6 tmpfs {tmp_path}", WRITES, tmp_path)
    assert f"error: {tmp_path}/" in line
    assert "cannot be written (No inodes left on device: it has room, but holds too many files)" in line


def test_too_few_open_files_are_named():
    line = error_after("ulimit -n 24", NEEDS_WORKERS)
    assert line.startswith("error: ulimit -n 24: too few open files, ")
    assert "are needed; run ulimit -n 4096 first" in line
    assert error_after("ulimit -n 75", NEEDS_WORKERS).endswith("or lower --dataloader_num_workers 1")


def test_the_soft_limit_of_open_files_is_raised_where_it_is_too_low():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 4, hard))
    try:
        usable_workers(1, 10)
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert raised >= len(os.listdir("/dev/fd")) + workers.FILES_PER_WORKER
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_workers_beyond_cores_and_batches_are_not_started(monkeypatch, capsys):
    assert usable_workers(CORES, 1000) == CORES
    assert usable_workers(0, 1000) == 0
    assert capsys.readouterr().out == ""
    assert usable_workers(1000, 1000) == CORES
    assert (
        f"--dataloader_num_workers 1000: lowered to {CORES}, the number of cores for each" in capsys.readouterr().out
    )
    assert usable_workers(1000, 1) == 1
    assert "lowered to 1, the number of batches to load" in capsys.readouterr().out
    # The processes of a machine share its cores.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * CORES))
    assert usable_workers(4, 1000) == 1


class Slow:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(60)


def test_a_batch_that_never_arrives_ends_the_run(signal_handlers):
    training = run_of(options(["--dataloader_num_workers=1"]))
    training.watchdog.timeout_seconds = 1.2
    batches = TrainBatches(training, Slow(), MixedCGRealSampler(4, 0, cg_ratio=0, batch_size=2))
    message = (
        r"^error: no batch has arrived \(DataLoader timed out after 1\.2 seconds\): .*raise --distributed_timeout_m"
    )
    with pytest.raises(SystemExit, match=message):
        run(lambda: next(batches.of_one_step()))


def loaded(count, steps, state=None):
    """Return the batches of some steps, which `count` workers load, and the sampler's state after each step."""
    run_of_count = run_of(options([f"--dataloader_num_workers={count}"]))
    clips = [{"index": i} for i in range(7)]
    sampler = MixedCGRealSampler(clips, [], cg_ratio=0, batch_size=2)
    if state is not None:
        sampler.load_state_dict(state)
    batches, found, states = TrainBatches(run_of_count, clips, sampler), [], []
    for _ in range(steps):
        found.append([batch["index"].tolist() for _, batch in batches.of_one_step()])
        states.append(sampler.state_dict())
    return found, states


def test_the_number_of_workers_does_not_change_what_is_drawn_or_resumed():
    expected, states = loaded(0, steps=6)
    assert loaded(1000, steps=6) == (expected, states)
    assert loaded(1000, steps=3, state=states[2]) == (expected[3:], states[3:])


def test_processes_that_write_together_name_missing_inodes(tmp_path, monkeypatch):
    disk = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*disk[:7], 0, *disk[8:])))
    named = pytest.raises(InputError, match=r"final: cannot be written \(No inodes left on device")
    with named, failing_together(Accelerator(cpu=True), tmp_path / "final"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
