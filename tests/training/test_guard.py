import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from c2r import InputError
from c2r.training.guard import MIN_STEPS, StepGuard, spike_bound
from c2r.training.progress import Progress


@pytest.fixture
def guard():
    return StepGuard(Accelerator(cpu=True), Progress(), max_skipped_steps=2)


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_its_clips_named(guard, capsys):
    guard.progress.global_step = 7
    guard.add(torch.tensor([0.5, float("nan")]), ["a.mp4:0", "b.mp4:3"])
    assert not guard.may_step(math.nan)
    out = capsys.readouterr().out
    assert "step 8 skipped" in out
    assert "b.mp4:3" in out
    assert "a.mp4:0" not in out


def test_a_gradient_that_is_not_finite_names_all_clips_of_the_step(guard, capsys):
    guard.add(torch.tensor([0.5]), ["a.mp4:0"])
    guard.add(torch.tensor([0.6]), ["b.mp4:3"])
    assert not guard.may_step(math.inf)
    assert "gradient is not finite; its clips: a.mp4:0, b.mp4:3" in capsys.readouterr().out


def test_one_of_the_processes_with_the_same_clips_names_them(capsys):
    Accelerator(cpu=True)  # the logs need its state
    for index in (0, 1):
        guard = StepGuard(SimpleNamespace(process_index=index), Progress(), max_skipped_steps=2, copies=2)
        guard.add(torch.tensor([0.5]), ["a.mp4:0"])
        assert not guard.may_step(math.nan)
        assert ("a.mp4:0" in capsys.readouterr().out) == (index == 0)


def test_too_many_skipped_steps_in_a_row_end_the_run(guard):
    for _ in range(2):
        assert not guard.may_step(math.nan)
    with pytest.raises(InputError, match=r"number 3 in a row.*--max_skipped_steps 2"):
        guard.may_step(math.nan)


def test_a_good_step_resets_the_count_of_skipped_steps(guard):
    for grad_norm in (math.nan, math.nan, 1.0, math.nan, math.nan):
        assert guard.may_step(grad_norm) == math.isfinite(grad_norm)
    assert guard.progress.skipped_in_a_row == 2


def test_a_spike_is_named_and_does_not_move_the_bound(guard, capsys):
    generator = torch.Generator().manual_seed(0)
    for _ in range(MIN_STEPS):
        assert not guard.finish(float(torch.rand((), generator=generator)) * 0.2 + 0.4)
    before = spike_bound(guard.progress.log_losses)
    guard.add(torch.tensor([0.5, 9.5]), ["a.mp4:0", "b.mp4:3"])
    assert guard.finish(5.0)
    assert "b.mp4:3 (9.5000), a.mp4:0" in capsys.readouterr().out
    assert spike_bound(guard.progress.log_losses) == pytest.approx(before, abs=0.1)
    assert not guard.finish(0.5)


def test_the_bound_is_six_standard_deviations_of_a_normal_distribution():
    log_losses = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.1 - 1).tolist()
    assert spike_bound(log_losses) == pytest.approx(-1 + 0.6, abs=0.02)


def test_there_is_no_bound_before_enough_steps_and_the_losses_are_json(guard):
    for _ in range(MIN_STEPS - 1):
        guard.finish(0.5)
    assert spike_bound(guard.progress.log_losses) == math.inf
    assert json.loads(json.dumps(guard.progress.log_losses)) == guard.progress.log_losses
