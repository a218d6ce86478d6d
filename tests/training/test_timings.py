"""The time that a run still takes, from the times that were measured."""

import math

import pytest

from c2r.training.timings import Timings, times_left
from tests.helpers.options import options, phase2_options
from tests.helpers.runs import run_of


@pytest.mark.parametrize("last_step", [1, 7, 10, 12])
@pytest.mark.parametrize("interval", [1, 3, 4, 10, 50])
def test_times_left_counts_the_steps_at_which_something_is_due(last_step, interval):
    run = run_of(options([f"--max_train_steps={last_step}"]))

    def is_due(step):
        run.progress.global_step = step
        return run.is_due(interval)

    for step in range(last_step + 1):
        due = [later for later in range(step + 1, last_step + 1) if is_due(later)]
        assert times_left(step, last_step, interval) == len(due)


def test_remaining_time_is_that_of_steps_and_of_all_evaluations_to_come():
    timings = Timings(last={"validation": 100.0, "checkpoint": 7.0, "sampling": 1000.0})
    assert math.isnan(timings.remaining(0, 10, {})[0])
    for _ in range(5):
        timings.add_step(samples=8, samples_per_second=4.0)
    assert timings.samples_per_second == 4.0
    intervals = {"validation": 4, "checkpoint": 5, "sampling": 10}
    # From step 3 to 10: 7 steps of 2 s, validations at 4, 8 and 10, checkpoints at 5 and 10, samples at 10.
    assert timings.remaining(3, 10, intervals) == (7 * 2 + 3 * 100 + 2 * 7 + 1000, True)
    assert timings.remaining(10, 10, intervals) == (0, True)
    del timings.last["sampling"]
    assert timings.remaining(3, 10, intervals) == (7 * 2 + 3 * 100 + 2 * 7, False)
    assert timings.remaining(3, 10, intervals | {"sampling": 0}) == (7 * 2 + 3 * 100 + 2 * 7, True)


def test_a_step_counts_a_twentieth_of_the_average():
    timings = Timings()
    timings.add_step(1, 1.0)
    timings.add_step(1, 1 / 21)
    assert timings.step_seconds == pytest.approx(2.0)


def test_the_bar_shows_the_time_with_a_plus_while_a_part_is_unknown():
    run = run_of(phase2_options(["--max_train_steps=10", "--validation_steps=5", "--sample_steps=10"]))
    assert run.time_left() == "?"
    run.timings.add_step(1, 0.1)
    run.timings.last |= {"validation": 30.0, "checkpoint": 1.0}
    assert run.time_left() == "02:41+"
    run.timings.last["sampling"] = 60.0
    assert run.time_left() == "03:41"
    run.args.num_samples = 0
    assert run.time_left() == "02:41"
