"""The controller of the CG share: it lowers the share only, after enough looks above the bound, or advises."""

import json
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2r.evaluation.monitor import Score
from c2r.evaluation.ratio_controller import RatioController

#: Of the bound 0.5: the whole interval above it, below it, around it; and no score.
ABOVE, BELOW, AROUND, UNKNOWN = (
    Score(0.6, 0.55, 0.7),
    Score(0.3, 0.2, 0.4),
    Score(0.5, 0.4, 0.6),
    Score(nan, nan, nan),
)
looks = st.lists(st.sampled_from([ABOVE, BELOW, AROUND, UNKNOWN]), max_size=40)


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
        above = 0 if look is BELOW else above + (look is ABOVE)
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


def test_a_look_around_the_bound_keeps_the_count_and_one_below_resets_it():
    controller = RatioController(0.5, 2, 0.1)
    ratios = [controller.step(look, 0.4) for look in (ABOVE, BELOW, ABOVE, AROUND, UNKNOWN, ABOVE)]
    assert ratios == [0.4] * 5 + [0.2]


def test_without_a_minimum_it_only_advises():
    controller = RatioController(0.5, 3)
    advice = []
    for _ in range(3):
        assert controller.step(ABOVE, 0.2) == 0.2
        advice.append(controller.advice(ABOVE, 0.2))
    assert advice == [None, None, "CG look 0.60 [0.55, 0.70] for 3 samplings: consider --cg_ratio 0.1"]
    assert controller.advice(AROUND, 0.2) is None


@pytest.mark.parametrize(("ratio", "minimum"), [(0.1, 0.1), (0.0, None)])
def test_other_remedies_are_advised_if_the_ratio_cannot_be_lowered(ratio, minimum):
    controller = RatioController(0.5, 1, minimum)
    controller.step(ABOVE, ratio)
    assert "--real_weight or --control_augmentation" in controller.advice(ABOVE, ratio)
