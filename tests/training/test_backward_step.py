"""Optimizer steps within the backward pass: the same weights, and one gradient at a time."""

from types import SimpleNamespace

import pytest
import torch

from c2r import InputError
from c2r.training.engine import require_supported
from c2r.training.optimizer import exact_state_dict
from c2r.training.setup import build_train_state
from c2r.training.step import clip_gradients
from tests.helpers.options import options
from tests.helpers.runs import run_of
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs, tiny_transformer

ALONE = ["--gradient_accumulation_steps=1", "--max_grad_norm=0"]


def train(phase, *argv, steps=3, broken=()):
    """Train; return weights, norms of the gradients, and the largest number of gradients that are alive at a time."""
    args = options([*ALONE, "--lr_warmup_steps=2", *argv])
    run = run_of(args)
    model = tiny_transformer() if phase == 1 else tiny_c2r_transformer(2, trained=True)
    backbone, trainable = (model, model) if phase == 1 else (model.transformer, model.controlnet)
    state = build_train_state(run, model, backbone, trainable)
    parameters = [p for p in model.parameters() if p.requires_grad]
    alive = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda p: alive.append(sum(p.grad is not None for p in parameters))
        )
    norms = []
    for number in range(steps):
        loss = state.model(*tiny_inputs(seed=number)[: 3 if phase == 1 else 4]).sample.float().square().mean()
        run.accelerator.backward(loss * (torch.nan if number in broken else 1))
        norms.append(clip_gradients(run.accelerator, state, args.max_grad_norm))
        if norms[-1] < torch.inf:
            state.optimizer.step()
        state.optimizer.zero_grad()
        state.lr_scheduler.step()
    return exact_state_dict(trainable, state.optimizer), norms, max(alive)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(
    "argv",
    [["--mixed_precision=no"], ["--weight_storage=bf16"], ["--optimizer=adamw8bit", "--weight_storage=bf16"]],
    ids=["fp32", "bf16", "8 bit"],
)
def test_the_weights_are_those_of_a_step_after_the_backward_pass(phase, argv):
    if "--optimizer=adamw8bit" in argv:
        pytest.importorskip("bitsandbytes")
    weights, norms, alive = train(phase, "--step_in_backward", *argv, broken=[1])
    expected, expected_norms, all_alive = train(phase, *argv, broken=[1])
    # Gradients in bf16 have their norm computed in bf16 as well, if it is that of all.
    assert norms == pytest.approx(expected_norms, rel=1e-5 if "--mixed_precision=no" in argv else 5e-3, nan_ok=True)
    assert norms[1] != norms[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert alive <= 1 < all_alive


def test_no_clipping_leaves_the_gradients_as_they_are():
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100)
    state = SimpleNamespace(step_in_backward=None, model=model)
    assert clip_gradients(run_of(options(ALONE)).accelerator, state, 0) == pytest.approx(100 * 6**0.5)
    assert all((parameter.grad == 100).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--max_grad_norm=0"], "would step in each of 2 micro-steps; give --gradient_accumulation_steps 1"),
        (["--gradient_accumulation_steps=1"], "is known only after the last step; give --max_grad_norm 0"),
    ],
)
def test_options_that_need_all_gradients_are_refused(argv, part):
    with pytest.raises(InputError, match=f"--step_in_backward: .*{part}"):
        options(["--step_in_backward", *argv])


@pytest.mark.parametrize(("kind", "processes"), [("MULTI_GPU", 2), ("FSDP", 1), ("DEEPSPEED", 1)])
def test_several_processes_are_refused(kind, processes):
    plugin = SimpleNamespace(zero_stage=2)
    accelerator = SimpleNamespace(
        distributed_type=kind, is_fsdp2=True, num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    with pytest.raises(InputError, match="--step_in_backward: gradients of several processes"):
        require_supported(accelerator, options([*ALONE, "--step_in_backward"]))
