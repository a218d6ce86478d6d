import math

from c2r.training.progress import Progress


def test_changing_the_criterion_discards_the_previous_best():
    progress = Progress()
    found = []
    for step, (loss, gain) in enumerate([(3.0, 0.1), (2.0, 0.3), (2.5, 0.2), (2.2, 0.4)]):
        progress.global_step = step
        progress.add_validation({"loss": loss, "control_gain": gain})
        found.append(progress.record_best("loss" if step < 2 else "control_gain"))
    assert found == [True, True, True, True]
    assert progress.best == {"control_gain": 0.4}
    assert progress.best_text == "validation control gain 0.4000"
    assert [entry["step"] for entry in progress.history] == [0, 1, 2, 3]


def test_only_a_better_finite_number_is_the_best():
    progress = Progress()
    for gain, is_best in ((0.3, True), (0.4, True), (0.4, False), (0.1, False), (math.nan, False)):
        progress.add_validation({"control_gain": gain})
        assert progress.record_best("control_gain") is is_best
    for loss, is_best in ((9.0, True), (9.0, False), (8.0, True)):
        progress.add_validation({"loss": loss})
        assert progress.record_best() is is_best


def test_other_validation_clips_start_a_new_baseline():
    progress = Progress()
    assert not progress.start_baseline("a")
    progress.add_validation({"loss": 1.0})
    assert progress.record_best()
    progress.global_step = 5
    assert not progress.start_baseline("a")
    progress.add_validation({"loss": 2.0})
    assert not progress.record_best()
    progress.global_step = 10
    assert progress.start_baseline("b")
    assert progress.metrics == {}
    progress.add_validation({"loss": 3.0})
    assert progress.record_best()  # not compared with the losses before
    assert [("new_baseline" in entry, entry["step"]) for entry in progress.history] == [
        (False, 0),
        (False, 5),
        (True, 10),
        (False, 10),
    ]
