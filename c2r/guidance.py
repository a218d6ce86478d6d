"""Guidance: combine predictions with and without control and prompt into one velocity."""

from collections.abc import Callable

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

#: Default text guidance scale of each kind of guidance: the released C2R's, and Wan's own.
DEFAULT_GUIDANCE_SCALE = {"apg": 10.0, "cfg": 5.0}

APG_MOMENTUM = -0.5

#: From this text scale on, APG keeps nothing of the parallel part; at 1 it keeps all of it.
APG_WHOLE = 2.0


# v = v(∅,∅) + s_c·[v(c,∅) − v(∅,∅)] + s_t·[v(c,t) − v(c,∅)]. Source: the released C2R
def guided_velocity(
    predict_unconditional: Callable[[], torch.Tensor],
    predict_with_control: Callable[[], torch.Tensor],
    predict_with_both: Callable[[], torch.Tensor],
    guidance_scale: float,
    control_guidance_scale: float = 1.0,
    momentum_buffer: MomentumBuffer | None = None,
) -> torch.Tensor:
    """Combine predictions into the guided velocity; one whose weight is zero is not computed.

    Without a momentum buffer this is classifier-free guidance with the terms above. With one, the text term is that
    of adaptive projected guidance (APG). With Δ = v(c,t) − v(c,∅), its running average Δ̄ ← Δ + momentum·Δ̄ over the
    steps, and P the projection that removes the part parallel to v(c,t), the text term is

        s_t·P(Δ̄)                            for s_t ≥ 2, as in Diffusers' guider with η = 0,
        s_t·P(Δ̄) + (2 − s_t)·[Δ − P(Δ̄)]     for 1 < s_t < 2,
        s_t·Δ                               for s_t ≤ 1, as in classifier-free guidance.

    So the velocity is continuous in both scales, and v(c,t) at s_t = s_c = 1. Diffusers' guider alone jumps there: it
    is switched off at a scale of exactly 1, but next to it gives v(c,∅) + P(Δ̄), without the parallel part.

    Differences from the paper: it projects denoised predictions x0, here velocities are projected, as in the released
    C2R; it adds (s_t − 1)·P(Δ̄) to v(c,t), here s_t·P(Δ̄) is added to v(c,∅); and its limit on the norm of Δ̄ is left
    out. The projection is over all but the batch dimension.

    Args:
        predict_unconditional: computes v(∅,∅), (B, C, T, h, w), fp32 or fp64.
        predict_with_control: computes v(c,∅), with control and without prompt.
        predict_with_both: computes v(c,t), with control and prompt.
        guidance_scale: s_t ≥ 0, of the text; 1 is no text guidance, with or without momentum.
        control_guidance_scale: s_c ≥ 0, of the control.
        momentum_buffer: one for all steps of a video; None is plain classifier-free guidance.

    Returns:
        (B, C, T, h, w) in the predictions' dtype.

    Source: Sadat et al. 2024 (APG), algorithm 1; `diffusers.AdaptiveProjectedGuidance`.
    """
    if momentum_buffer is None or guidance_scale <= 1:
        weighted = [
            (1 - control_guidance_scale, predict_unconditional),
            (control_guidance_scale - guidance_scale, predict_with_control),
            (guidance_scale, predict_with_both),
        ]
        return sum((weight * predict() for weight, predict in weighted if weight != 0), torch.zeros(()))
    with_control, with_both = predict_with_control(), predict_with_both()
    velocity = normalized_guidance(with_both, with_control, guidance_scale, momentum_buffer, eta=0.0)
    if guidance_scale < APG_WHOLE:
        projected = (velocity - with_control) / guidance_scale
        velocity = velocity + (APG_WHOLE - guidance_scale) * (with_both - with_control - projected)
    if control_guidance_scale != 1:
        velocity = velocity + (1 - control_guidance_scale) * (predict_unconditional() - with_control)
    return velocity


def move_momentum(momentum_buffer: MomentumBuffer | None, device: torch.device) -> None:
    """Move the running average of APG, if there is one yet, to a device."""
    if momentum_buffer is not None and isinstance(momentum_buffer.running_average, torch.Tensor):
        momentum_buffer.running_average = momentum_buffer.running_average.to(device)


def is_control_on(step: int, num_steps: int, start: float, end: float) -> bool:
    """Return True if a step lies as a whole between two fractions of the steps, as in Diffusers' ControlNets.

    Args:
        step: 0 to num_steps - 1.
        num_steps: at least 1.
        start, end: in [0, 1].
    """
    return step / num_steps >= start and (step + 1) / num_steps <= end
