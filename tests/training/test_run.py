"""The steps at which a run validates, samples and saves."""

import errno
from types import SimpleNamespace

import pytest

from c2r import InputError
from c2r.training import run as run_module
from tests.helpers.options import options
from tests.helpers.runs import run_of


@pytest.fixture
def run():
    """A run of ten steps that validates and samples every fourth step."""
    args = options(["--max_train_steps=10", "--validation_steps=4"])
    args.sample_steps, args.num_samples = 4, 1
    return run_of(args)


def due_steps(run, is_due):
    steps = []
    for run.progress.global_step in range(11):
        if is_due():
            steps.append(run.progress.global_step)
    return steps


def test_neighbours_that_share_clips_are_one_group(run):
    run.args.context_parallel_degree = 2
    run.accelerator = SimpleNamespace(num_processes=6, process_index=3)
    assert (run.num_groups, run.group_index) == (3, 1)
    assert run.samples_per_step == 2 * 2 * 3


@pytest.mark.parametrize("failing", ["start_logs", "write_start"])
def test_logs_that_cannot_be_started_end_every_process_in_one_line(failing, tmp_path, monkeypatch):
    def fail(*values):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(run_module, "start_logs", lambda *values: None)
    monkeypatch.setattr(run_module, failing, fail)
    with pytest.raises(InputError, match=f"{tmp_path}: cannot be written"):
        run_of(options(["--output_dir", str(tmp_path)])).start_training()


def test_validation_is_due_at_its_interval_and_at_the_last_step(run):
    assert due_steps(run, run.validation_is_due) == [0, 4, 8, 10]


def test_samples_are_due_likewise_but_not_before_the_first_step(run):
    assert due_steps(run, run.sampling_is_due) == [4, 8, 10]
    run.args.num_samples = 0
    assert due_steps(run, run.sampling_is_due) == []


def test_an_evaluation_that_was_cut_off_is_still_due(run):
    run.progress.global_step = 8
    assert run.validation_is_due()
    assert run.sampling_is_due()
    run.progress.validated_step = run.progress.sampled_step = 4
    assert run.validation_is_due()
    assert run.sampling_is_due()
    run.progress.validated_step = run.progress.sampled_step = 8
    assert not run.validation_is_due()
    assert not run.sampling_is_due()
