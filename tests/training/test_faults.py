"""Faults that end or harm a long run: nothing finished is lost, and one line names the cause."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import c2r.encode
from c2r import InputError
from c2r.cli import EXIT_STOPPED, run
from c2r.training.checkpoint import checkpoint_bytes
from c2r.training.resume import find_damage, list_checkpoints
from c2r.training.watchdog import EXIT_HUNG
from tests.helpers.background import Background
from tests.helpers.commands import LAUNCH, SIZE, TORCHRUN, phase1, phase2, same, scalars, succeed, weights
from tests.helpers.forks import fork, forked_twice, statuses, warm_python
from tests.helpers.runs import build_run, save, train_one_step

STEPS = 24


@pytest.fixture
def small_disk(tmp_path):
    """Return small_disk(size), which mounts a tmpfs of a size such as "64k" and returns its folder."""
    folders = []

    def mount(size, *options):
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


def remount(folder, option):
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


@contextmanager
def filled(folder, leave=0):
    """Fill the disk of `folder` with a file, but for `leave` bytes."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - leave)
    yield
    filler.unlink()


def checksums(out):
    """Return {file: SHA-256} of all finished checkpoints, best/ and final/."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in [*out.glob("checkpoint-*"), out / "best", out / "final"]
        for path in folder.rglob("*")
        if path.is_file()
    }


def one_line(text, part):
    """Return the only error line of a failed command's output; fail unless it contains `part`, without a traceback."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text[-3000:]
    assert part in errors[0]
    assert "Traceback" not in text
    return errors[0]


@pytest.fixture
def resume_command(first, second, tiny_models, small_datasets):
    """Return resume_command(out, *extra), a command of phase 2 that continues `second` from its fourth step."""

    def command(out, *extra, launcher=(), last=STEPS):
        if not out.exists():
            out.mkdir()
            shutil.copytree(second[0] / "checkpoint-4", out / "checkpoint-4")
        options = [f"--max_train_steps={last}", "--resume_from_checkpoint=latest", *extra]
        return phase2(tiny_models, small_datasets, first[0] / "final", out, *options, launcher=launcher)

    return command


@pytest.fixture(scope="module")
def undisturbed(first, second, tiny_models, small_datasets, tmp_path_factory):
    """Run that command without a fault; return its folder."""
    out = tmp_path_factory.mktemp("run") / "undisturbed"
    out.mkdir()
    shutil.copytree(second[0] / "checkpoint-4", out / "checkpoint-4")
    options = [f"--max_train_steps={STEPS}", "--resume_from_checkpoint=latest"]
    succeed(*phase2(tiny_models, small_datasets, first[0] / "final", out, *options), by=fork)
    return out


def ended_alike(out, undisturbed):
    """Return True if both runs have the same final weights and losses."""
    losses = [scalars(run)["train/loss"] for run in (out, undisturbed)]
    return same(weights(out / "final"), weights(undisturbed / "final")) and losses[0] == losses[1]


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
def test_signals_stop_a_run_after_saving_and_nothing_is_lost(resume_command, undisturbed, tmp_path):
    out = tmp_path / "run"

    def stopped(done, reason):
        assert done.text.count(f"{reason}: saving after this step, then stopping") == 1  # no data worker prints it
        last = done.steps[-1]
        assert f"step {last}: stopped: {reason}; continue with --resume_from_checkpoint latest" in done.text
        assert find_damage(out / f"checkpoint-{last}") is None
        assert "error: " not in done.text

    # Ctrl-C: the terminal sends it to all processes.
    with Background(resume_command(out, launcher=LAUNCH)) as done:
        done.wait_until(done.trained)
        family = done.family()
        assert len(family) >= 3  # launcher, training process, data worker
        os.killpg(done.process.pid, signal.SIGINT)
        # 1 if the training process has ended before the signal ends the launcher.
        assert done.end() in (-signal.SIGINT, 1)
        stopped(done, "SIGINT")

    # A scheduler's SIGTERM ends the launcher.
    with Background(resume_command(out, launcher=LAUNCH)) as done:
        done.wait_until(done.trained)
        done.family()
        done.process.terminate()
        assert done.end() == -signal.SIGTERM
        stopped(done, "SIGTERM")
        assert "Traceback" not in done.text

    # Without a launcher, SIGTERM to all processes, as Slurm sends it.
    with Background(resume_command(out), fork=True) as done:
        done.wait_until(done.trained)
        done.family()
        os.killpg(done.process.pid, signal.SIGTERM)
        assert done.end() == EXIT_STOPPED
        stopped(done, "SIGTERM")
        assert "Traceback" not in done.text

    # The end of the Slurm slot is near.
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 60)}
    done = fork(*resume_command(out, "--save_before_timeout=5m"), **end)
    assert done.returncode == EXIT_STOPPED
    assert f"step {list_checkpoints(out)[-1][0]}: stopped: the slot ends soon" in done.stdout

    succeed(*resume_command(out), by=fork)
    assert ended_alike(out, undisturbed)


@pytest.mark.slow
def test_two_processes_stop_together_and_a_dead_or_hung_one_is_named(resume_command, tmp_path):
    out = tmp_path / "run"
    command = resume_command(out, "--distributed_timeout_minutes=0.2", "--validation_steps=1000", launcher=TORCHRUN)

    # A signal to one process.
    with Background(command, PYTHON_EXEC=warm_python()) as done:
        done.wait_until(done.trained)
        done.rank(1).terminate()
        assert done.end() != 0
        step = list_checkpoints(out)[-1][0]
        assert f"step {step}: stopped: a signal to another process" in done.text
        assert f"exitcode  : {EXIT_STOPPED}" in done.text

    before = checksums(out)

    def second_one(harmed_by):
        """Send a signal to the second process when training begins; return the errors of the first."""
        folder = tmp_path / harmed_by.name  # of its own: an output of the last time would say that training has begun
        folder.mkdir()
        processes = forked_twice(command[len(TORCHRUN) :], folder)
        output = folder / "0/stderr"
        while not output.exists() or "phase 2: " not in output.read_text():
            assert all(process.is_alive() for process in processes)
            time.sleep(0.1)
        os.kill(processes[1].pid, harmed_by)
        processes[0].join(60)
        processes[1].kill()
        assert statuses(processes) == [EXIT_HUNG, -signal.SIGKILL]
        return output.read_text()

    for harmed_by in (signal.SIGKILL, signal.SIGSTOP):  # one process dies, and one hangs
        assert "process 1 on " in one_line(second_one(harmed_by), "no longer answers")
    assert before.items() <= checksums(out).items()


# -------------------------------------------------------------------------------------------------------------- disks


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(resume_command, undisturbed, small_disk):
    disk = small_disk("8m")
    out = disk / "run"
    with Background(resume_command(out, "--checkpoints_total_limit=1"), fork=True) as done:
        done.wait_until(done.trained)
        with filled(disk):
            assert done.end() == 1
            one_line(done.text, "No space left on device")
            newest = list_checkpoints(out)[-1][1]
            assert find_damage(newest) is None
    done = succeed(*resume_command(out, "--checkpoints_total_limit=1"), by=fork)
    assert f"resumed from {newest}" in done.stdout
    assert ended_alike(out, undisturbed)


def test_a_save_that_fills_the_disk_leaves_the_last_checkpoint(small_disk):
    disk = small_disk("8m")
    run = build_run(disk / "run")
    train_one_step(run)
    save(run)
    before = checksums(disk / "run")
    train_one_step(run)
    needed = checkpoint_bytes(sum(p.numel() for p in run.state.trainable.parameters()), run.run.args)
    needed += -needed % 4096
    with filled(disk, leave=needed), pytest.raises(InputError, match="No space left on device"):
        save(run)
    assert checksums(disk / "run") == before
    with filled(disk, leave=needed - 8192), pytest.raises(InputError, match="GB needed"):
        save(run)
    assert checksums(disk / "run") == before
    assert not list((disk / "run").glob(".checkpoint*"))
    save(run)
    assert [step for step, _ in list_checkpoints(disk / "run")] == [1, 2]


def test_a_full_disk_ends_encoding_in_one_line_and_a_restart_continues(
    tiny_models, small_datasets, small_disk, monkeypatch
):
    disk = small_disk("48k")
    options = {name: SIZE[name] for name in SIZE} | {
        "dataset": small_datasets / "real",
        "pretrained_model_name_or_path": tiny_models / "pipeline",
        "cache_dir": disk,
        "dataloader_num_workers": 0,
    }
    monkeypatch.setattr(sys, "argv", ["encode", *(f"--{name}={value}" for name, value in options.items())])
    with pytest.raises(SystemExit, match=r"^error: .*safetensors: cannot be written \(No space left on device\)"):
        run(c2r.encode.main)
    made = {path: path.stat().st_mtime_ns for path in disk.rglob("*.safetensors")}
    assert made
    assert not list(disk.rglob("*.tmp"))
    remount(disk, "size=1m")
    run(c2r.encode.main)
    assert len(list(disk.glob("clips/*/*.safetensors"))) == 10
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in made.items())


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path):
    run = build_run(tmp_path, "--checkpoints_total_limit=2")
    for step in (2, 4):
        save(run, step)
    (tmp_path / "checkpoint-4/model/config.json").unlink()
    save(run, 6)
    assert [step for step, path in list_checkpoints(tmp_path) if find_damage(path) is None] == [2, 6]
    assert not (tmp_path / "checkpoint-4").exists()


# -------------------------------------------------------------------------------------------------------------- files


def _latents_of(cache, name):
    """Yield the cached files of one file of a dataset."""
    for path in cache.glob("clips/*/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if json.loads(file.metadata()["c2r"])["file"] == name:
                yield path


def _put_nan(path):
    tensors = load_file(path)
    tensors["latents_mean"][0, 0, 0, 0] = torch.nan
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


@pytest.mark.slow
def test_a_clip_of_nan_is_skipped_and_named_and_too_many_end_the_run(first, tiny_models, small_datasets, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(small_datasets / "real/.c2r_cache", cache)
    _put_nan(next(_latents_of(cache, "r2.mov")))
    cut = next(_latents_of(cache, "r3.avi"))
    os.truncate(cut, cut.stat().st_size - 100)
    options = [f"--cache_dir={cache}", "--resume_from_checkpoint=latest", "--validation_steps=1000"]
    done = succeed(*phase1(tiny_models, small_datasets, out, *options, "--max_train_steps=4"), by=fork)
    text = done.stdout + done.stderr
    assert "1 damaged files in the cache are encoded again" in text
    # Two steps draw every clip once.
    assert len(re.findall(r"step \d skipped: the loss is not finite for r2\.mov#\d\n", text)) == 2
    assert all(tensor.isfinite().all() for tensor in weights(out / "final").values())
    assert not same(weights(out / "final"), weights(first[0] / "final"))
    before = checksums(out)

    for name in ("r1.webm", "r2.mov", "r3.avi", "r4.mkv"):
        for path in _latents_of(cache, name):
            _put_nan(path)
    options += ["--max_train_steps=8", "--max_skipped_steps=1"]
    done = fork(*phase1(tiny_models, small_datasets, out, *options))
    assert done.returncode == 1
    line = one_line(done.stdout + done.stderr, "step 6 skipped: the loss is not finite for ")
    assert "number 2 in a row (--max_skipped_steps 1)" in line
    assert checksums(out) == before


def test_a_truncated_checkpoint_is_skipped_for_the_one_before(first, tiny_models, small_datasets, tmp_path):
    out = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(first[0] / name, out / name)
    file = out / "checkpoint-4/optimizer-00000-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    options = ["--max_train_steps=4", "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"]
    done = succeed(*phase1(tiny_models, small_datasets, out, *options), by=fork)
    assert f"checkpoint-4: incomplete ({file.name} has" in done.stdout + done.stderr
    assert f"resumed from {out}/checkpoint-2 at step 2" in done.stdout
    assert same(weights(out / "final"), weights(first[0] / "final"))
    assert [step for step, _ in list_checkpoints(out)] == [4]
    assert find_damage(out / "checkpoint-4") is None


@pytest.mark.slow
def test_a_run_that_cannot_resume_is_refused_and_nothing_is_lost(
    resume_command, tiny_models, small_datasets, small_disk, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(small_datasets / "real", other)
    os.utime(other / "r3.avi")
    disk, backbone = small_disk("1m"), tiny_models / "pipeline"
    folders = {name: disk / name if name == "read-only" else tmp_path / name for name in ("base", "data", "read-only")}
    commands = {
        "base": (resume_command(folders["base"], f"--resume_backbone_from={backbone}"), "the backbone has changed"),
        "data": (resume_command(folders["data"], f"--real_dataset={other}"), "the real dataset has changed"),
        "read-only": (resume_command(folders["read-only"]), f"{folders['read-only']}: cannot be written (Read-only"),
    }
    before = {name: checksums(out) for name, out in folders.items()}
    remount(disk, "ro")
    for name, (command, part) in commands.items():
        done = fork(*command)
        assert done.returncode == 1
        one_line(done.stdout + done.stderr, part)
        assert name != "read-only" or "kept " not in done.stdout  # refused before the datasets are read
    assert {name: checksums(out) for name, out in folders.items()} == before


def test_a_killed_data_worker_ends_the_run_in_one_line(resume_command, tmp_path):
    """The kernel kills processes for lack of memory."""
    with Background(resume_command(tmp_path / "run"), fork=True) as done:
        done.wait_until(done.trained)
        done.process.children()[0].kill()
        assert done.end() == 1
        one_line(done.text, "worker was killed")
