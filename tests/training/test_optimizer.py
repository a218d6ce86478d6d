from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_scheduler

from c2r.models.adversary import DomainClassifier
from c2r.training.optimizer import (
    CLASSIFIER_LEARNING_RATE,
    OptimizerSettings,
    build_lr_scheduler,
    build_optimizer,
    exact_state_dict,
    merge_weight,
    set_schedule,
    split_weight,
)
from tests.helpers.options import options
from tests.helpers.tiny import tiny_inputs, tiny_transformer

CPU = torch.device("cpu")


def settings_of(*argv):
    return OptimizerSettings.of(options(argv))


def test_splitting_a_weight_loses_no_bit():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    edges = torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x3F807FFF, 0x3F808000, 0x7F7F7FFF, -(2**31)])
    weight = torch.cat([bits, edges.to(torch.int32)]).view(torch.float32)
    weight = weight[weight.isfinite()]
    high, low = split_weight(weight)
    assert torch.equal(merge_weight(high, low).view(torch.int32), weight.view(torch.int32))
    ordinary = weight.abs() < 1e38
    error = (high.float() - weight).abs()[ordinary]
    nearest = (weight.to(torch.bfloat16).float() - weight).abs()[ordinary]
    assert torch.equal(error, nearest)


def train(weight_storage, dtype=torch.float32, steps=20, lr=1e-4):
    """Take steps with gradients that bf16 can hold; return module and optimizer."""
    module = torch.nn.Linear(64, 80, bias=False).to(dtype)
    torch.nn.init.ones_(module.weight)
    settings = settings_of(f"--weight_storage={weight_storage}", f"--learning_rate={lr}")
    optimizer = build_optimizer(module, settings, CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        grad = torch.rand(module.weight.shape, generator=generator).to(torch.bfloat16)
        module.weight.grad = grad.to(module.weight.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def test_bf16_storage_keeps_small_updates():
    """Relative updates of 1e-4 change a weight of 1 as in fp32; in plain bf16 they would be lost."""
    whole, whole_optimizer = train("fp32")
    split, split_optimizer = train("bf16")
    assert split.weight.dtype == torch.bfloat16
    exact = exact_state_dict(split, split_optimizer)["weight"]
    assert torch.equal(exact, whole.weight)
    assert (exact < 0.9995).all()
    state, expected = split_optimizer.state[split.weight], whole_optimizer.state[whole.weight]
    assert all(torch.equal(state[key], expected[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    naive, _ = train("fp32", torch.bfloat16)
    assert (naive.weight == 1).all()


def test_low_bits_are_on_the_device_of_the_run():
    """The optimizer is built before Accelerate moves the module, and nothing moves the optimizer's own tensors."""
    device = torch.device("meta")
    module = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(module, settings_of("--weight_storage=bf16"), device)
    assert [low.device for low in optimizer.low_bits.values()] == [device] * 2


@pytest.mark.parametrize("weight_storage", ["fp32", "bf16"])
def test_the_domain_classifier_has_its_own_scheduled_rate_and_stays_fp32(weight_storage):
    module, classifier = torch.nn.Linear(4, 4), DomainClassifier(4, width=8)
    argv = [f"--weight_storage={weight_storage}", "--lr_warmup_steps=4", "--learning_rate=1e-5"]
    args = options(argv)
    optimizer = build_optimizer(module, OptimizerSettings.of(args), CPU, classifier)
    lr_scheduler = build_lr_scheduler(optimizer, args)
    rates = []
    for _ in range(5):
        rates.append(lr_scheduler.get_last_lr())
        for parameter in [*module.parameters(), *classifier.parameters()]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        lr_scheduler.step()
    shares = (0.25, 0.5, 0.75, 1, 1)
    assert rates == [pytest.approx([1e-5 * share, CLASSIFIER_LEARNING_RATE * share]) for share in shares]
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    assert len(optimizer.state) == 2 + len([*classifier.parameters()])


@pytest.mark.parametrize("weight_storage", ["fp32", "bf16"])
def test_adamw8bit_steps_with_8_bit_states(weight_storage):
    pytest.importorskip("bitsandbytes")
    module = torch.nn.Linear(128, 64)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    settings = settings_of("--optimizer=adamw8bit", f"--weight_storage={weight_storage}", "--learning_rate=1e-2")
    optimizer = build_optimizer(module, settings, CPU)
    for _ in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert optimizer.state[module.weight]["state1"].dtype == torch.uint8
    after = exact_state_dict(module, optimizer)
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert (after[name] < tensor - 0.02).all()


def test_bf16_storage_trains_a_transformer_and_keeps_its_fp32_parts():
    transformer = tiny_transformer().train()
    optimizer = build_optimizer(transformer, settings_of("--weight_storage=bf16", "--learning_rate=3e-3"), CPU)
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 4, 2, 4, 4, generator=generator), torch.randn(1, 8, 24, generator=generator)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(latents, torch.tensor([500.0]), prompt, return_dict=False)[0]
        loss = (predicted.float() - latents).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    exact = exact_state_dict(transformer, SimpleNamespace(optimizer=optimizer))
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("--adam_beta1=0.5", lambda group: group["betas"][0] == 0.5),
        ("--adam_beta2=0.5", lambda group: group["betas"][1] == 0.5),
        ("--adam_weight_decay=0.5", lambda group: group["weight_decay"] == 0.5),
        ("--adam_epsilon=0.5", lambda group: group["eps"] == 0.5),
        ("--lr_warmup_steps=4", lambda group: group["lr"] == pytest.approx(0.75e-3)),
        ("--lr_scheduler=constant", lambda group: group["lr"] == pytest.approx(1e-3)),
    ],
)
def test_optimizer_options_reach_the_optimizer(option, read):
    groups = []
    for argv in ([option], []):
        module = torch.nn.Linear(1, 1)
        args = options(argv)
        optimizer = build_optimizer(module, OptimizerSettings.of(args), CPU)
        lr_scheduler = build_lr_scheduler(optimizer, args)
        for _ in range(2):
            optimizer.step()
            lr_scheduler.step()
        groups.append(optimizer.param_groups[0])
    assert read(groups[0])
    assert not read(groups[1])


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "linear", "polynomial"])
def test_step_n_of_a_warm_up_of_w_has_rate_n_over_w(name):
    args = options([f"--lr_scheduler={name}", "--lr_warmup_steps=4", "--max_train_steps=10", "--learning_rate=1"])
    optimizer = build_optimizer(torch.nn.Linear(1, 1), OptimizerSettings.of(args), CPU)
    lr_scheduler = build_lr_scheduler(optimizer, args)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr_scheduler.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    reference = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=10).lr_lambdas[0]
    assert rates[4:] == pytest.approx([reference(done) for done in range(4, 10)])
    assert min(rates) > 0


def test_a_resumed_schedule_has_rate_and_length_of_the_command_line():
    def schedule(*argv):
        args = options(["--lr_scheduler=cosine", "--lr_warmup_steps=2", *argv])
        optimizer = build_optimizer(torch.nn.Linear(1, 1), OptimizerSettings.of(args), CPU)
        return optimizer, build_lr_scheduler(optimizer, args)

    for argv in (["--learning_rate=1e-3", "--max_train_steps=8"], ["--learning_rate=1e-5", "--max_train_steps=20"]):
        whole, whole_schedule = schedule(*argv)
        resumed, resumed_schedule = schedule(*argv)
        for _ in range(5):
            whole.step()
            whole_schedule.step()
        set_schedule(resumed_schedule, 5)
        for _ in range(3):
            assert resumed.param_groups[0]["lr"] == whole.param_groups[0]["lr"]
            assert resumed_schedule.get_last_lr() == whole_schedule.get_last_lr()
            for optimizer, lr_scheduler in ((whole, whole_schedule), (resumed, resumed_schedule)):
                optimizer.step()
                lr_scheduler.step()


def accumulated_gradient(micro_steps, weight_storage=None):
    """Return the fp64 gradient of a transformer in all, summed over micro-steps; without a storage in fp64 itself."""
    model = tiny_transformer().train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # so that all storages begin with the same weights
    dtype = torch.float64 if weight_storage is None else torch.float32
    if weight_storage is None:
        model.double()
    else:
        build_optimizer(model, settings_of(f"--weight_storage={weight_storage}"), CPU)
    for micro_step in range(micro_steps):
        noisy_latents, timesteps, prompt_embeds, _ = tiny_inputs(dtype=dtype, seed=micro_step)
        target = torch.randn(noisy_latents.shape, generator=torch.Generator().manual_seed(100 + micro_step))
        with torch.autocast("cpu", torch.bfloat16, enabled=weight_storage is not None):
            velocity_pred = model(noisy_latents, timesteps, prompt_embeds).sample
        ((velocity_pred.to(dtype) - target).square().mean() / micro_steps).backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


def test_sums_over_micro_steps_in_bf16_have_the_error_that_the_docs_give():
    """One micro-step has the error of bf16 autocast in both storages; more add errors of the sum in bf16 alone."""
    errors = {}
    for micro_steps in (1, 32):
        exact = accumulated_gradient(micro_steps)
        for storage in ("fp32", "bf16"):
            gradient = accumulated_gradient(micro_steps, storage)
            errors[storage, micro_steps] = ((gradient - exact).norm() / exact.norm()).item()
    assert errors["fp32", 1] == pytest.approx(errors["bf16", 1], rel=0.05)
    assert errors["fp32", 32] < 0.0015
    assert 0.004 < errors["bf16", 32] < 0.008
