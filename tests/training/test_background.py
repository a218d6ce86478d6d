import ast
import threading
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from c2r import InputError
from c2r.training import checkpoint
from c2r.training.background import BackgroundWrite
from tests.helpers.forks import forked_twice, statuses
from tests.helpers.runs import build_run, save, save_checkpoint, train_one_step

# Both processes write; the second one is done at once, or fails.
TWO = """
import sys, time
from pathlib import Path
from accelerate import Accelerator
from c2r import InputError
from c2r.training.background import BackgroundWrite
accelerator = Accelerator(cpu=True)
called = []
def write():
    if accelerator.is_main_process:
        time.sleep(3)
        called.append("written")
    elif sys.argv[1] == "fails":
        raise OSError(28, "No space left on device")
actions = (lambda: called.append("complete"), lambda: called.append("discard"))
saving = BackgroundWrite(accelerator, Path("checkpoint-1"), write, *actions)
while not saving.has_ended():
    time.sleep(0.1)
called.append("ended")
try:
    saving.finish()
except InputError as error:
    called.append(str(error))
print(called)
"""


@pytest.fixture
def background(tmp_path):
    """Return background(write), which starts a write and records what is called after it."""
    called = []

    def start(write):
        actions = (lambda: called.append("complete"), lambda: called.append("discard"))
        return BackgroundWrite(Accelerator(cpu=True), tmp_path / "checkpoint-1", write, *actions), called

    return start


def test_a_write_goes_on_beside_the_main_thread_and_is_completed_after_it(background):
    go_on = threading.Event()
    saving, called = background(go_on.wait)
    assert not saving.has_ended()
    assert called == []
    go_on.set()
    saving.join()
    assert saving.has_ended()
    saving.finish()
    assert called == ["complete"]


def test_a_failed_write_is_discarded_and_raised_in_one_line(background):
    def fail():
        raise OSError(28, "No space left on device")

    saving, called = background(fail)
    saving.join()
    assert saving.has_ended()
    with pytest.raises(InputError, match=r"checkpoint-1: cannot be written \(No space left on device\)"):
        saving.finish()
    assert called == ["discard"]


def run_two(how, folder):
    (folder / "two.py").write_text(TWO)
    assert statuses(forked_twice([folder / "two.py", how], folder)) == [0, 0]
    return [ast.literal_eval((folder / rank / "stdout").read_text().splitlines()[-1]) for rank in "01"]


def test_several_processes_complete_their_files_when_all_have_written(tmp_path):
    assert run_two("works", tmp_path) == [["written", "ended", "complete"], ["ended", "complete"]]


def test_several_processes_learn_of_a_failed_write_at_once_and_discard_theirs(tmp_path):
    main, other = run_two("fails", tmp_path)
    assert main[:2] == ["ended", "written"]  # not after its own write, for which `finish` waits
    assert main[2] == other[1] == "discard"
    assert main[3] == other[2]
    assert main[3].startswith("checkpoint-1: cannot be written (No space left on device)")


@pytest.mark.parametrize("extra", [["--ema_decay=0.9"], ["--weight_storage=bf16", "--mixed_precision=bf16"]])
def test_a_checkpoint_holds_the_state_of_its_step_when_that_changes(extra, tmp_path):
    runs = [build_run(tmp_path / name, *extra) for name in ("calm", "busy")]
    for run in runs:
        train_one_step(run)
    save(runs[0])
    run, state, sampler = (getattr(runs[1], name) for name in ("run", "state", "sampler"))
    save_checkpoint(run, state, sampler)
    optimizer = state.optimizer.optimizer
    tensors = [*state.trainable.parameters(), *getattr(optimizer, "low_bits", {}).values()]
    tensors += [value for states in optimizer.state.values() for value in states.values()]
    tensors += state.ema.shadow_params if state.ema else []
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(3)
    run.progress.add_validation({"loss": 0.5})
    run.progress.global_step += 1
    run.finish_saving()
    calm, busy = (tmp_path / name / "checkpoint-1" for name in ("calm", "busy"))
    files = [path.relative_to(calm) for path in calm.rglob("*") if path.is_file()]
    assert len(files) == (5 if state.ema else 4)  # weights, config, moments, state, and perhaps the average
    assert all((calm / file).read_bytes() == (busy / file).read_bytes() for file in files)


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    def slow(*arguments):
        time.sleep(0.5)
        save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slow)  # of safetensors
    built = build_run(tmp_path, "--checkpoints_total_limit=2")
    for _ in range(2):
        train_one_step(built)
        save_checkpoint(built.run, built.state, built.sampler)
    # Without waiting, this save would have removed what the one before was writing.
    built.run.finish_saving()
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
