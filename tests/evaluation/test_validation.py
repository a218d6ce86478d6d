"""Losses of held-out clips and the numbers computed from them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch.utils.data import default_collate

from c2r import InputError, flow_matching
from c2r.evaluation.validation import (
    QUANTILES,
    clip_losses,
    leak_warning,
    loss_as_trained,
    noise_levels,
    validation_metrics,
)
from c2r.flow_matching import WEIGHTING_SCHEMES, SigmaDensity
from c2r.training.batches import Draw
from c2r.training.seeds import seeded_generator
from c2r.training.step import NoiseSettings, make_noisy_batch
from tests.helpers.clips import clip


class Latents(torch.utils.data.Dataset):
    """Clips of random latents, with the interface of `ClipDataset`."""

    collate = staticmethod(default_collate)

    def __init__(self, count):
        self.clips = [clip(str(i)) for i in range(count)]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        latents = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(index))
        return {"latents_mean": latents, "name": f"clip {index}", "index": index}


def predict_zero(batch):
    return {"right": lambda noisy_latents, timesteps: torch.zeros_like(noisy_latents)}


def test_losses_are_computed_with_the_fixed_noise_of_the_clip():
    dataset = Latents(3)
    losses = clip_losses(dataset, predict_zero, Accelerator(cpu=True), 3.0)["right"]
    for index, row in enumerate(losses):
        clip = dataset[index]
        expected = [
            flow_matching.velocity_target(
                clip["latents_mean"],
                torch.randn(4, 2, 4, 4, generator=seeded_generator("validation", clip["name"], quantile)),
            )
            .square()
            .mean()
            for quantile in QUANTILES
        ]
        torch.testing.assert_close(row, torch.stack(expected))


def test_conditions_share_clip_noise_and_level_and_leave_the_global_rng_alone():
    seen = {"right": [], "other_control": []}

    def predictors_of(batch):
        def predictor(name):
            def predict(noisy_latents, timesteps):
                seen[name].append((noisy_latents, timesteps))
                return torch.full_like(noisy_latents, 0.0 if name == "right" else 1.0)

            return predict

        return {name: predictor(name) for name in seen}

    state = torch.get_rng_state()
    losses = clip_losses(Latents(3), predictors_of, Accelerator(cpu=True), 3.0, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(losses) == ["right", "other_control"]
    assert losses["right"].shape == (3, len(QUANTILES))
    assert not torch.equal(losses["right"], losses["other_control"])
    for (noisy, timesteps), (other_noisy, other_timesteps) in zip(*seen.values(), strict=True):
        assert torch.equal(noisy, other_noisy)
        assert torch.equal(timesteps, other_timesteps)
    assert sorted({t.item() for _, batch in seen["right"] for t in batch}) == pytest.approx(
        (1000 * noise_levels(3.0)).tolist()
    )


def test_a_loss_that_is_not_finite_names_its_clip():
    dataset = Latents(3)
    dataset.clips = [clip(f"{i}.mp4", window=2) for i in range(3)]

    def predictors_of(batch):
        factor = torch.where(torch.tensor(batch["name"][0] == "clip 1"), torch.nan, 1.0)
        bad = {"other_control": lambda noisy_latents, timesteps: noisy_latents * factor}
        return {"right": lambda noisy_latents, timesteps: noisy_latents} | bad

    with pytest.raises(InputError, match=r"not finite for 1\.mp4#2: "):
        clip_losses(dataset, predictors_of, Accelerator(cpu=True), 3.0)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_losses_do_not_depend_on_the_batch_size(batch_size):
    def predictors_of(batch):
        return {"right": lambda noisy_latents, timesteps: noisy_latents * timesteps.view(-1, 1, 1, 1, 1) / 1000}

    accelerator = Accelerator(cpu=True)
    single = clip_losses(Latents(5), predictors_of, accelerator, 3.0)["right"]
    assert len(set(single.flatten().tolist())) == 5 * len(QUANTILES)
    torch.testing.assert_close(clip_losses(Latents(5), predictors_of, accelerator, 3.0, batch_size)["right"], single)
    assert not torch.equal(clip_losses(Latents(5), predictors_of, accelerator, 5.0)["right"], single)


def test_every_process_runs_equally_many_forward_passes():
    """Three processes share four clips: two forward passes each, and the sum equals the losses of one process."""
    calls, tables = [], []
    for index in range(3):
        share = SimpleNamespace(
            num_processes=3, process_index=index, device=torch.device("cpu"), reduce=lambda losses, reduction: losses
        )

        def predictors_of(batch, index=index):
            calls.append(index)
            return predict_zero(batch)

        tables.append(clip_losses(Latents(4), predictors_of, share, 3.0)["right"])
    assert calls == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(sum(tables), clip_losses(Latents(4), predict_zero, Accelerator(cpu=True), 3.0)["right"])


def test_go_on_ends_the_validation():
    answers = iter([True, False])
    assert clip_losses(Latents(3), predict_zero, Accelerator(cpu=True), 3.0, go_on=lambda: next(answers)) is None


def losses_of(**conditions):
    """Return {condition: (n, 4)} with the same loss at each noise level."""
    return {name: torch.tensor(values)[:, None].repeat(1, 4) for name, values in conditions.items()}


def test_both_domains_have_the_same_weight():
    losses = losses_of(
        right=[1.0, 3.0, 5.0],
        other_control=[2.0, 4.0, 9.0],
        no_control=[4.0, 4.0, 6.0],
        other_prompt=[1.0, 3.0, 6.0],
    )
    metrics = validation_metrics(losses, ["real", "real", "cg"], 3.0)
    expected = {
        "loss": 3.5,
        "loss_real": 2.0,
        "loss_cg": 5.0,
        "loss_other_control": 6.0,
        "loss_no_control": 5.0,
        "loss_other_prompt": 4.0,
        "control_gain": 2.5,
        "control_gain_real": 1.0,
        "control_gain_cg": 4.0,
        "prompt_gain": 0.5,
        "prompt_gain_real": 0.0,
        "prompt_gain_cg": 1.0,
    }
    for name, value in {"loss": 3.5, "control_gain": 2.5, "prompt_gain": 0.5}.items():
        expected |= {f"{name}_sigma_{level}": value for level in ("0.30", "0.64", "0.83", "0.95")}
    assert metrics == expected


def test_metrics_contain_each_noise_level():
    right = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    metrics = validation_metrics({"right": right, "other_prompt": 2 * right}, ["real"], 3.0)
    for level, value in zip(("0.30", "0.64", "0.83", "0.95"), right[0].tolist()):
        assert metrics[f"loss_sigma_{level}"] == metrics[f"prompt_gain_sigma_{level}"] == value
    assert "control_gain" not in metrics


def test_leak_share_is_relative_to_the_control_gain_of_the_same_clips():
    nan = torch.nan
    losses = losses_of(
        right=[1.0, 1.0, 1.0],
        other_control=[3.0, 2.0, 9.0],
        other_prompt=[1.0, 1.0, 1.0],
        augmented=[1.5, 1.0, nan],
        coarse=[2.5, nan, nan],
    )
    metrics = validation_metrics(losses, ["real", "real", "cg"], 3.0)
    assert metrics["leak_augmented"] == 0.25
    assert metrics["leak_share_augmented"] == pytest.approx(0.25 / 1.5)
    assert metrics["leak_coarse"] == 1.5
    assert metrics["leak_share_coarse"] == 0.75
    assert leak_warning(metrics, 0.0, projected=True).startswith(
        "leak 0.75: real clips follow the look of their own control"
    )
    assert "consider --control_augmentation 0.5" in leak_warning(metrics, 0.0, projected=True)
    assert "raise --control_augmentation" in leak_warning(metrics, 0.5, projected=True)
    assert "--control_projection" not in leak_warning(metrics, 0.5, projected=True)
    assert ", or --control_projection fit, which needs CG pairs," in leak_warning(metrics, 0.5, projected=False)
    del metrics["leak_share_coarse"]
    assert leak_warning(metrics, 0.0, projected=True) is None


@pytest.mark.parametrize("gain", [0.0, -0.5, 0.005])
def test_there_is_no_leak_share_without_a_control_gain(gain):
    losses = losses_of(right=[1.0], other_control=[1.0 + gain], other_prompt=[1.0], augmented=[1.5])
    metrics = validation_metrics(losses, ["real"], 3.0)
    assert metrics["leak_augmented"] == 0.5
    assert not any(name.startswith("leak_share") for name in metrics)
    assert leak_warning(metrics, 0.0, projected=True) is None


# --------------------------------------------------------------------------------- training loss and validation loss

#: Variances of the latents' channels: with real clips some directions are far larger than others.
VARIANCES = torch.tensor([4.0, 1.0, 0.3, 0.1, 0.03, 0.01]).view(6, 1, 1, 1)
#: Validation's four levels stand for all: the largest relative error for these variances, computed, is 0.011.
QUADRATURE_ERROR = 0.012
CG_RATIO, CG_SCALE, CONTROL_DROPOUT = 0.25, 1.5, 0.2


class Spectrum(Latents):
    """Half real and half CG clips; CG latents are larger."""

    def __init__(self, count):
        self.clips = [clip(str(i), domain="real" if i < count // 2 else "cg") for i in range(count)]

    def __getitem__(self, index):
        latents = draw_latents(index, is_cg=self.clips[index].domain == "cg")
        return {"latents_mean": latents, "name": f"clip {index}", "index": index}


def draw_latents(number, is_cg):
    generator = torch.Generator().manual_seed(number)
    return (CG_SCALE if is_cg else 1) * VARIANCES.sqrt() * torch.randn(6, 1, 4, 4, generator=generator)


def ideal_velocity(noisy_latents, timesteps):
    """E[noise - latents | noisy latents] for the real clips' Gaussian latents."""
    sigmas = timesteps.view(-1, 1, 1, 1, 1) / 1000
    return (sigmas - (1 - sigmas) * VARIANCES) / ((1 - sigmas) ** 2 * VARIANCES + sigmas**2) * noisy_latents


def expected_loss(sigmas, scale):
    """Loss of `ideal_velocity` on latents of `scale` times the standard deviation, (N,)."""
    s, variances = sigmas.double()[:, None], VARIANCES.flatten().double()
    slope = (s - (1 - s) * variances) / ((1 - s) ** 2 * variances + s**2)
    on_latents, on_noise = -1 - slope * (1 - s), 1 - slope * s
    return (scale**2 * variances * on_latents**2 + on_noise**2).mean(1)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_the_training_loss_has_the_expectation_that_validation_estimates(scheme, shift):
    density, count = SigmaDensity(scheme, shift=shift), 1600

    # The expectation: noise levels drawn by Diffusers, the loss of a Gaussian's best prediction in closed form.
    drawn = compute_density_for_timestep_sampling(
        scheme, 200_000, 0.0, 1.0, 1.29, generator=torch.Generator().manual_seed(0)
    )
    sigmas = flow_matching.shift_sigmas(drawn.clamp(1e-3, 1), shift)
    by_domain = (1 - CG_RATIO) * expected_loss(sigmas, 1) + CG_RATIO * expected_loss(sigmas, CG_SCALE)
    zero = 1 + VARIANCES.mean() * (1 - CG_RATIO + CG_RATIO * CG_SCALE**2)  # a dropped control predicts zero
    samples = compute_loss_weighting_for_sd3(scheme, sigmas).double().clamp(max=5)
    samples = samples * ((1 - CONTROL_DROPOUT) * by_domain + CONTROL_DROPOUT * zero)
    expectation, error = samples.mean(), samples.std() / len(samples) ** 0.5

    # Training: one large step of exactly CG_RATIO CG samples.
    is_cg = [number % 4 == 0 for number in range(count)]
    latents = torch.stack([draw_latents(number, cg) for number, cg in enumerate(is_cg)])
    batch = {"latents_mean": latents, "latents_logvar": torch.full_like(latents, -1e4)}
    batch["prompt_embeds"] = torch.zeros(count, 1, 1)
    settings = NoiseSettings(0, density, control_dropout=CONTROL_DROPOUT)
    draw = Draw(list(range(count)), 0, count)
    noisy = make_noisy_batch(batch, settings, draw, torch.zeros(1, 1), torch.device("cpu"))
    prediction = ideal_velocity(noisy.noisy_latents, noisy.timesteps)
    prediction[noisy.dropped_control] = 0
    losses = noisy.weights * flow_matching.velocity_loss(prediction, noisy.velocity_target)
    training_error = losses.std() / count**0.5
    assert abs(losses.mean() - expectation) < 4 * (training_error + error)

    # Validation: other clips, their own noise, four levels, both domains alike.
    def predictors_of(batch):
        return {"right": ideal_velocity, "no_control": lambda noisy, timesteps: torch.zeros_like(noisy)}

    dataset = Spectrum(160)
    tables = clip_losses(dataset, predictors_of, Accelerator(cpu=True), shift, 160)
    domains = [clip.domain for clip in dataset.clips]
    estimate = loss_as_trained(tables, domains, density, CONTROL_DROPOUT, CG_RATIO)
    by_clip = tables["right"].double() @ flow_matching.level_weights(noise_levels(shift), density)
    validation_error = by_clip.std() / len(by_clip) ** 0.5
    assert abs(estimate - expectation) < 4 * validation_error + QUADRATURE_ERROR * expectation


def test_the_loss_as_trained_has_the_shares_of_training():
    losses = losses_of(right=[1.0, 3.0, 5.0], no_control=[4.0, 4.0, 6.0])
    domains = ["real", "real", "cg"]
    assert loss_as_trained(losses, domains, SigmaDensity()) == pytest.approx(2)
    assert loss_as_trained(losses, domains, SigmaDensity(), cg_ratio=0.2) == pytest.approx(0.8 * 2 + 0.2 * 5)
    assert loss_as_trained(losses, domains, SigmaDensity(), 0.1) == pytest.approx(0.9 * 2 + 0.1 * 4)
    assert loss_as_trained({"right": losses["right"][:2]}, domains[:2], SigmaDensity()) == pytest.approx(2)
