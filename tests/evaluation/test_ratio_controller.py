"""The controller of the CG share: it lowers the share only, after enough looks above the bound, or advises."""

import json
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2r.evaluation.monitor import Score
from c2r.evaluation.ratio_controller import RatioController

#: Of the bound 0.5: the whole interval above it, below it, around it; no score; and above it, but of too few samples.
ABOVE, BELOW, AROUND, UNKNOWN, FEW = (
    Score(0.6, 0.01, 8, 4),
    Score(0.3, 0.01, 8, 4),
    Score(0.52, 0.01, 8, 4),
    Score(nan, nan, nan, 0),
    Score(0.6, 0.001, 8, 3),
)
looks = st.lists(st.sampled_from([ABOVE, BELOW, AROUND, UNKNOWN, FEW]), max_size=40)


@given(looks, st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_the_ratio_never_rises_nor_falls_below_the_minimum(looks, ratio, minimum, patience):
    controller = RatioController(0.5, patience, minimum)
    for look in looks:
        new = controller.step(look, ratio)
        assert new <= ratio
        assert new >= min(ratio, minimum)
        assert new in (ratio, ratio / 2, minimum)
        ratio = new


@given(looks, st.integers(1, 5))
def test_the_ratio_is_halved_after_patience_looks_above_the_bound(looks, patience):
    controller, ratio, above = RatioController(0.5, patience, 0.0), 1.0, 0
    for look in looks:
        above = above + 1 if look is ABOVE else 0 if look in (BELOW, AROUND) else above
        halved = above == patience
        above = 0 if halved else above
        new = controller.step(look, ratio)
        assert new == (ratio / 2 if halved else ratio)
        ratio = new


@given(looks, looks, st.floats(0, 1))
def test_a_restored_controller_continues_exactly(before, after, ratio):
    controller, restored = RatioController(0.5, 3, 0.01), RatioController(0.5, 3, 0.01)
    for look in before:
        ratio = controller.step(look, ratio)
    restored.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    restored_ratio = ratio
    for look in after:
        ratio, restored_ratio = controller.step(look, ratio), restored.step(look, restored_ratio)
        assert ratio == restored_ratio


def test_the_interval_has_a_confidence_of_99_percent():
    half = 3.355387 * 0.01  # quantile 0.995 of Student's t with 8 degrees of freedom, from a table
    for mean, ratio in ((0.5 + half + 1e-4, 0.1), (0.5 + half - 1e-4, 0.2)):
        assert RatioController(0.5, 1, 0.0).step(Score(mean, 0.01, 8, 4), 0.2) == ratio


def test_fewer_than_four_scenes_change_nothing_and_give_no_advice():
    controller = RatioController(0.5, 1, None)
    controller.step(FEW, 0.2)
    assert controller.count == 0
    controller.step(ABOVE, 0.2)
    assert controller.advice(FEW, 0.2) is None
    assert controller.advice(ABOVE, 0.2) is not None


def test_without_a_minimum_it_only_advises():
    controller = RatioController(0.5, 3)
    advice = []
    for _ in range(3):
        assert controller.step(ABOVE, 0.2) == 0.2
        advice.append(controller.advice(ABOVE, 0.2))
    assert advice == [None, None, "CG look 0.60 [0.58, 0.62] for 3 samplings: consider --cg_ratio 0.1"]
    controller.step(AROUND, 0.2)
    assert controller.advice(AROUND, 0.2) is None


@pytest.mark.parametrize(("ratio", "minimum"), [(0.1, 0.1), (0.0, None)])
def test_other_remedies_are_advised_if_the_ratio_cannot_be_lowered(ratio, minimum):
    controller = RatioController(0.5, 1, minimum)
    controller.step(ABOVE, ratio)
    assert "--real_weight or --control_augmentation" in controller.advice(ABOVE, ratio)
