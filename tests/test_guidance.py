"""Guidance against its written-out formulas, in float64."""

from functools import partial

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from c2r.guidance import APG_MOMENTUM, guided_velocity, is_control_on

NAMES = ("unconditional", "with_control", "with_both")


class Predictions:
    """Random predictions v(∅,∅), v(c,∅) and v(c,t), and the names of those that guidance computes."""

    def __init__(self, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        for name in NAMES:
            setattr(self, name, torch.randn(2, 4, 2, 3, 3, generator=generator, dtype=dtype))
        self.computed = []

    def compute(self, name):
        self.computed.append(name)
        return getattr(self, name)

    def guided(self, *arguments):
        return guided_velocity(*(partial(self.compute, name) for name in NAMES), *arguments)


def apg_velocities(steps, text_scale, control_scale):
    """The guided velocities of successive steps, written out sample by sample with lists of numbers."""
    averages, velocities = [0.0, 0.0], []
    for v in steps:
        samples = []
        for i in range(2):
            unconditional, with_control, with_both = (getattr(v, name)[i].flatten() for name in NAMES)
            difference = with_both - with_control
            averages[i] = difference - 0.5 * averages[i]
            along = sum(a * b for a, b in zip(averages[i].tolist(), with_both.tolist()))
            length = sum(b * b for b in with_both.tolist())
            orthogonal = averages[i] - along / length * with_both
            if text_scale >= 2:
                text_term = text_scale * orthogonal
            elif text_scale > 1:
                text_term = text_scale * orthogonal + (2 - text_scale) * (difference - orthogonal)
            else:
                text_term = text_scale * difference
            velocity = unconditional + control_scale * (with_control - unconditional) + text_term
            samples.append(velocity.view_as(v.with_both[i]))
        velocities.append(torch.stack(samples))
    return velocities


@pytest.mark.parametrize("text_scale", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("control_scale", [0.0, 0.5, 1.0, 5.0])
def test_predictions_of_weight_zero_are_skipped(text_scale, control_scale):
    v = Predictions()
    full = v.unconditional + control_scale * (v.with_control - v.unconditional)
    full += text_scale * (v.with_both - v.with_control)
    torch.testing.assert_close(v.guided(text_scale, control_scale), full)
    needed = ["unconditional"] if control_scale != 1 else []
    needed += ["with_control"] if text_scale != control_scale else []
    needed += ["with_both"] if text_scale else []
    assert v.computed == needed


@pytest.mark.parametrize("text_scale", [0.0, 0.5, 1.0, 1.25, 2.0, 10.0])
@pytest.mark.parametrize("control_scale", [0.0, 1.0, 3.0])
def test_apg_is_its_formula_over_three_steps(text_scale, control_scale):
    steps, buffer = [Predictions(seed) for seed in range(3)], MomentumBuffer(APG_MOMENTUM)
    expected = apg_velocities(steps, text_scale, control_scale)
    for v, velocity in zip(steps, expected):
        torch.testing.assert_close(v.guided(text_scale, control_scale, buffer), velocity, rtol=1e-9, atol=1e-9)
        assert ("unconditional" in v.computed) == (control_scale != 1)


def test_apg_is_the_guider_of_diffusers():
    guider = AdaptiveProjectedGuidance(
        guidance_scale=10.0,
        adaptive_projected_guidance_momentum=APG_MOMENTUM,
        adaptive_projected_guidance_rescale=0.0,
        eta=0.0,
    )
    guider.momentum_buffer, buffer = MomentumBuffer(APG_MOMENTUM), MomentumBuffer(APG_MOMENTUM)
    for seed in range(3):
        v = Predictions(seed)
        expected = guider.forward(v.with_both, v.with_control).pred
        torch.testing.assert_close(v.guided(10.0, 1.0, buffer), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["apg", "cfg"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_scales_have_no_jump(kind, scale):
    def guided(text_scale, control_scale):
        buffer = MomentumBuffer(APG_MOMENTUM) if kind == "apg" else None
        return [Predictions(seed).guided(text_scale, control_scale, buffer) for seed in range(2)][1]

    def distance(*scales):
        return ((guided(*scales) - guided(scale, scale)).norm() / guided(scale, scale).norm()).item()

    assert distance(scale + 1e-6, scale) < 1e-5
    assert distance(scale, scale + 1e-6) < 1e-5
    if scale:
        assert distance(scale - 1e-6, scale) < 1e-5


def test_text_scale_one_turns_text_guidance_off_also_with_apg():
    v = Predictions()
    assert torch.equal(v.guided(1.0, 1.0, MomentumBuffer(-0.5)), v.with_both)
    assert v.computed == ["with_both"]


def test_single_precision_stays_single():
    v = Predictions(dtype=torch.float32)
    for scale in (0.5, 1.5, 10.0):
        assert v.guided(scale, 2.0, MomentumBuffer(-0.5)).dtype == torch.float32


def test_control_is_on_in_steps_that_lie_between_the_fractions():
    assert [is_control_on(step, 8, 0.25, 0.8) for step in range(8)] == [False] * 2 + [True] * 4 + [False] * 2
    assert all(is_control_on(step, 3, 0.0, 1.0) for step in range(3))
