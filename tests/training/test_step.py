import pytest
import torch
from accelerate import Accelerator

from c2r import flow_matching
from c2r.training.batches import Draw
from c2r.training.logs import StepLog
from c2r.training.seeds import seeded_generator
from c2r.training.step import NoiseSettings, domain_weights, make_noisy_batch
from tests.helpers.options import options
from tests.helpers.runs import run_of


def test_seeded_generators_depend_on_every_part():
    draws = {torch.rand((), generator=seeded_generator(*parts)).item() for parts in ((0, 0), (0, 1), (1, 0), ("0", 0))}
    assert len(draws) == 4
    assert torch.equal(
        torch.rand(3, generator=seeded_generator(5, "a")), torch.rand(3, generator=seeded_generator(5, "a"))
    )


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 4, 2, 4, 6)
    return {
        "latents_mean": torch.randn(shape, generator=generator),
        "latents_logvar": torch.randn(shape, generator=generator),
        "prompt_embeds": torch.ones(size, 5, 3),
    }


def draw(args, numbers=(24, 25), first_of_step=24, samples_per_step=8, clips=None):
    clips = batch(len(numbers)) if clips is None else clips
    draw = Draw(list(numbers), first_of_step, samples_per_step)
    return make_noisy_batch(clips, NoiseSettings.of(run_of(args)), draw, torch.zeros(5, 3), torch.device("cpu"))


def test_a_noisy_batch_is_consistent_and_repeatable():
    args = options()
    noisy = draw(args)
    sigmas = noisy.sigmas.view(-1, 1, 1, 1, 1)
    # x_sigma - sigma * v = x0 and x_sigma + (1 - sigma) * v = noise, so the two ends are recovered.
    latents = noisy.noisy_latents - sigmas * noisy.velocity_target
    noise = noisy.noisy_latents + (1 - sigmas) * noisy.velocity_target
    torch.testing.assert_close(flow_matching.add_noise(latents, noise, noisy.sigmas), noisy.noisy_latents)
    spread = (latents - batch(2)["latents_mean"]) / torch.exp(0.5 * batch(2)["latents_logvar"])
    assert 0.8 < spread.std() < 1.2  # a sample of the distribution, not its mean
    torch.testing.assert_close(noisy.timesteps, 1000 * noisy.sigmas)
    assert torch.equal(draw(args).noisy_latents, noisy.noisy_latents)


def test_noise_differs_between_samples_and_steps():
    args, same = options(), {name: tensor[:1].expand(2, *tensor.shape[1:]) for name, tensor in batch(1).items()}
    noisy = draw(args, clips=same).noisy_latents
    assert not torch.equal(noisy[0], noisy[1])
    for changed in ({"numbers": (26, 27)}, {"numbers": (32, 33), "first_of_step": 32}):
        assert not torch.equal(draw(args, clips=same, **changed).noisy_latents, noisy)


def test_processes_and_micro_batches_do_not_change_the_draw():
    """Four samples at once draw what they draw in two micro-batches, or on two processes, in any order."""
    args, whole = options(), batch(4)
    alone = draw(args, numbers=(24, 25, 26, 27), clips=whole)
    for parts in ([[0, 1], [2, 3]], [[3], [1], [0, 2]]):
        drawn = [
            draw(
                args,
                numbers=[24 + place for place in places],
                clips={name: tensor[places] for name, tensor in whole.items()},
            )
            for places in parts
        ]
        order = torch.tensor([place for places in parts for place in places])
        for name, tensor in vars(alone).items():
            assert torch.equal(torch.cat([getattr(part, name) for part in drawn]), tensor[order]), name
    assert not torch.equal(*alone.velocity_target[2:])


def test_sigmas_of_a_global_step_are_stratified():
    args = options()
    shifted = torch.cat([draw(args, numbers=(n, n + 1)).sigmas for n in range(24, 32, 2)]).double()
    uniform = shifted / (3 - 2 * shifted)  # undo shift 3
    assert sorted((uniform * 8).long().tolist()) == list(range(8))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_prompt_dropout_replaces_by_the_empty_prompt(share, expected):
    noisy = draw(options([f"--prompt_dropout={share}"]))
    assert (noisy.prompt_embeds == expected).all()


def test_dropouts_are_drawn_at_each_step_and_have_their_share():
    args = options()
    args.control_dropout = 0.3
    drawn = [draw(args, range(8 * i, 8 * i + 8), 8 * i) for i in range(200)]
    prompts = torch.cat([noisy.prompt_embeds[:, 0, 0] == 0 for noisy in drawn]).float().mean()
    controls = torch.cat([noisy.dropped_control for noisy in drawn]).float().mean()
    assert 0.07 < prompts < 0.13
    assert 0.26 < controls < 0.34


def test_the_two_dropouts_are_independent():
    args = options(["--prompt_dropout=0.5"])
    args.control_dropout = 0.5
    drawn = [draw(args, range(8 * i, 8 * i + 8), 8 * i) for i in range(200)]
    prompts = torch.cat([noisy.prompt_embeds[:, 0, 0] == 0 for noisy in drawn]).double()
    controls = torch.cat([noisy.dropped_control for noisy in drawn]).double()
    assert torch.corrcoef(torch.stack([prompts, controls]))[0, 1].abs() < 0.1


def test_weights_follow_from_the_sigmas():
    noisy = draw(options(["--weighting_scheme=sigma_sqrt"]), range(24, 32))
    torch.testing.assert_close(noisy.weights, (noisy.sigmas**-2).clamp(max=5))
    noisy = draw(options(["--weighting_scheme=cosmap"]))
    expected = 2 / (torch.pi * (1 - 2 * noisy.sigmas + 2 * noisy.sigmas**2))
    torch.testing.assert_close(noisy.weights, expected)
    assert (draw(options(["--weighting_scheme=logit_normal"])).weights == 1).all()


def test_a_noisy_batch_is_in_full_precision():
    half = {name: tensor.bfloat16() for name, tensor in batch(2).items()}
    noisy = draw(options(), clips=half | {"latents_mean": batch(2)["latents_mean"]})
    floats = {
        name: tensor.dtype for name, tensor in vars(noisy).items() if name not in ("dropped_control", "prompt_embeds")
    }
    assert set(floats.values()) == {torch.float32}


def test_flow_options_change_the_draw():
    plain = draw(options())
    assert not torch.equal(draw(options(["--flow_shift=5"])).sigmas, plain.sigmas)
    for scheme, option in (
        ("logit_normal", "--logit_mean=1"),
        ("logit_normal", "--logit_std=2"),
        ("mode", "--mode_scale=0.5"),
    ):
        base = draw(options([f"--weighting_scheme={scheme}"])).sigmas
        assert not torch.equal(base, plain.sigmas)
        assert not torch.equal(draw(options([f"--weighting_scheme={scheme}", option])).sigmas, base)
    assert not torch.equal(draw(options(["--weighting_scheme=cosmap"])).weights, plain.weights)


def test_step_log_groups_losses():
    log = StepLog(Accelerator(cpu=True))
    log.start()
    log.add(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 1.0]), torch.tensor([0, 1]))
    log.add(torch.tensor([5.0, 7.0]), torch.tensor([0.25, 0.2]), torch.tensor([0, 0]))
    logs = log.finish(learning_rate=0.5)
    assert logs.pop("train/samples_per_second") > 0
    assert logs == {
        "train/loss": 4.0,
        "train/loss_real": pytest.approx(13 / 3),
        "train/loss_cg": 3.0,
        "train/loss_sigma_0.0-0.25": 4.0,
        "train/loss_sigma_0.25-0.5": 5.0,
        "train/loss_sigma_0.75-1.0": 3.0,
        "train/learning_rate": 0.5,
    }
    log.start()
    log.add(torch.tensor([2.0]), torch.tensor([0.6]), torch.tensor([1]))
    assert log.finish()["train/loss"] == 2.0


def test_step_log_counts_clips_that_two_processes_share_once(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 10.0)
    speeds = []
    for copies in (1, 2):
        log = StepLog(Accelerator(cpu=True), copies=copies)
        log.start()
        log.add(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 1.0]), torch.tensor([0, 1]))
        monkeypatch.setattr("time.perf_counter", lambda: 14.0)
        logs = log.finish()
        assert logs["train/loss"] == 2
        speeds.append(logs["train/samples_per_second"])
        monkeypatch.setattr("time.perf_counter", lambda: 10.0)
    assert speeds == [0.5, 0.25]


@pytest.mark.parametrize("cg_ratio", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_the_weights_of_the_domains_keep_their_mean(cg_ratio):
    domains = torch.tensor([0, 1])
    real, cg = domain_weights(domains, 2.5, cg_ratio)
    torch.testing.assert_close(real, 2.5 * cg)
    assert ((1 - cg_ratio) * real + cg_ratio * cg).item() == pytest.approx(1)
    assert domain_weights(domains, 1.0, cg_ratio).tolist() == [1, 1]  # exactly: training is the same bit for bit


def test_step_log_has_the_share_of_the_real_clips_in_the_loss():
    log = StepLog(Accelerator(cpu=True))
    log.start()
    log.add_weighted(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
    log.add_weighted(torch.tensor([2.0, 2.0]), torch.tensor([0, 0]))
    assert log.finish()["train/real_loss_share"] == 5 / 8


def test_step_log_averages_the_accuracy_of_the_classifier_over_steps():
    domains, logits = torch.tensor([0, 0, 0, 1]), torch.tensor([-1.0, -1.0, 1.0, -1.0])
    losses, everyone = torch.tensor([0.1, 0.2, 0.6, 0.9]), torch.ones(4, dtype=torch.bool)

    def step(log, *added):
        log.start()
        log.add(losses, torch.full((4,), 0.5), domains)
        if added:
            log.add_domain_logits(*added)
        return {name: value for name, value in log.finish().items() if "domain" in name}

    log = StepLog(Accelerator(cpu=True))
    for _ in range(200):
        logs = step(log, losses, logits, domains, everyone)
    assert logs == {
        "train/domain_loss": pytest.approx(0.45),
        "train/domain_accuracy_real": pytest.approx(2 / 3, abs=1e-3),
        "train/domain_accuracy_cg": pytest.approx(0, abs=1e-3),
        "train/domain_accuracy": pytest.approx(1 / 3, abs=1e-3),
    }
    # Samples that do not count are left out. A step in which none counts leaves the averages unchanged.
    real = step(log, losses, logits, domains, torch.tensor([True, True, False, False]))
    assert real["train/domain_loss"] == pytest.approx(0.15)
    assert real["train/domain_accuracy_cg"] == logs["train/domain_accuracy_cg"]
    assert real["train/domain_accuracy_real"] > logs["train/domain_accuracy_real"]
    nothing = step(log, losses, logits, domains, ~everyone)
    assert nothing.keys() == real.keys() - {"train/domain_loss"}
    assert all(value == pytest.approx(real[name]) for name, value in nothing.items())
    # A resumed run continues from the logged averages.
    again = StepLog(Accelerator(cpu=True), nothing)
    assert step(again, losses, logits, domains, everyone) == step(log, losses, logits, domains, everyone)
