"""Attention with less work around it gives the values of Diffusers' own."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from benchmarks.step import build_variants, differences, draw_inputs
from c2r import InputError
from c2r.models.attention import Rotation, try_attention_backend, use_lean_attention
from tests.helpers.attention import recorded_backends
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs, tiny_transformer

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 5}


def stock(model):
    for module in model.modules():
        if isinstance(module, WanAttention):
            module.set_processor(WanAttnProcessor())


def loss_and_gradients(model, dtype):
    model.zero_grad()
    inputs = tiny_inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        velocity_pred = model(*inputs[: 4 if hasattr(model, "controlnet") else 3]).sample
    velocity_pred.float().square().mean().backward()
    return velocity_pred.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", [tiny_transformer, lambda: tiny_c2r_transformer(trained=True)])
def test_lean_attention_gives_the_same_output_and_gradients(build, checkpointing):
    model = build().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    stock(model)
    expected, expected_gradients = loss_and_gradients(model, torch.float32)
    use_lean_attention(model)
    output, gradients = loss_and_gradients(model, torch.float32)
    for found, wanted in zip([output, *gradients], [expected, *expected_gradients], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_under_autocast_the_error_is_not_larger_than_diffusers():
    """Norm and rotation run in fp32 and are rounded once, where autograd of Diffusers' steps rounds each of them."""
    model = tiny_c2r_transformer(trained=True).train()
    stock(model)
    expected, exact = loss_and_gradients(model, torch.float32)
    errors = []
    for prepare in (stock, use_lean_attention):
        prepare(model)
        output, gradients = loss_and_gradients(model, torch.bfloat16)
        pairs = list(zip([output, *gradients], [expected, *exact], strict=True))
        errors.append(sum((found - wanted).norm() / wanted.norm() for found, wanted in pairs) / len(pairs))
    assert 0 < errors[1] < 1.05 * errors[0]


def test_the_gradient_of_the_rotation_is_that_of_its_formula():
    states = torch.randn(2, 3, 2, 4, dtype=torch.float32, requires_grad=True)
    angles = torch.randn(1, 3, 1, 2).repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    x1, x2 = states[..., 0::2], states[..., 1::2]
    expected = torch.empty_like(states)
    expected[..., 0::2] = x1 * cos[..., 0::2] - x2 * sin[..., 0::2]
    expected[..., 1::2] = x1 * sin[..., 0::2] + x2 * cos[..., 0::2]
    weights = torch.randn_like(states)
    (wanted,) = torch.autograd.grad(expected, states, weights)
    rotated = Rotation.apply(states, cos, sin)
    torch.testing.assert_close(rotated, expected)
    torch.testing.assert_close(torch.autograd.grad(rotated, states, weights)[0], wanted)


def test_a_rotation_of_wans_width_equals_diffusers_bit_for_bit():
    attention = tiny_transformer(num_attention_heads=1, attention_head_dim=128).blocks[0].attn1
    rotary_emb = tuple(torch.randn(1, 6, 1, 64).repeat_interleave(2, -1) for _ in range(2))
    states, outputs = torch.randn(2, 6, 128), []
    for prepare in (stock, use_lean_attention):
        prepare(attention)
        outputs.append(attention(states, rotary_emb=rotary_emb))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("phase", [1, 2])
def test_the_step_equals_a_plain_reference(phase):
    inputs, target = draw_inputs(phase, (2, 3, 2))
    reference, *variants = build_variants(phase, **SMALL)
    for variant in variants:
        loss, gradients = differences(variant, reference, inputs, target)
        assert loss < 1e-6
        assert gradients < 1e-5


# ------------------------------------------------------------------------------------------------------------ backends


def test_a_backend_computes_in_both_branches_and_gives_the_same_values():
    model = tiny_c2r_transformer(trained=True).train()
    results = []
    for backend in ("native", "_native_math"):
        use_lean_attention(model, backend)
        with recorded_backends() as calls:
            results.append(loss_and_gradients(model, torch.float32))
        assert calls == [backend] * 2 * (4 + 2)  # self and cross attention of four blocks and two control blocks
    for (output, gradients), (wanted_output, wanted) in [results]:
        for found, expected in zip([output, *gradients], [wanted_output, *wanted], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("backend", [None, "native", "_native_math", "_native_flash"])
def test_backends_that_work_are_accepted(backend):
    for dtype in (torch.float32, torch.bfloat16):
        try_attention_backend(backend, 128, torch.device("cpu"), dtype, backward=True)


@pytest.mark.parametrize(
    ("backend", "reason"), [("flash", "install `flash-attn"), ("flash_hub", "kernels"), ("_native_cudnn", "")]
)
def test_backends_that_do_not_work_are_refused_in_one_line(backend, reason):
    with pytest.raises(InputError) as error:
        try_attention_backend(backend, 128, torch.device("cpu"), torch.bfloat16, backward=True)
    assert str(error.value).startswith(f"--attention_backend {backend}: does not work on cpu in bfloat16 with 128")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
