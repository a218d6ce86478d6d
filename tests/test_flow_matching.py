"""Flow matching: identities of the path, agreement with Diffusers, and stratified noise levels."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from hypothesis import given
from hypothesis import strategies as st

from c2r import flow_matching as fm
from c2r.flow_matching import SigmaDensity

SHAPE = (3, 4, 2, 6, 8)


def draw(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(2))
    sigmas = torch.rand(SHAPE[0], generator=generator, dtype=torch.float64)
    return latents, noise, sigmas if dtype == torch.float64 else sigmas.float()


def step_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_path_leads_from_data_at_zero_to_noise_at_one():
    latents, noise, sigmas = draw()
    assert torch.equal(fm.add_noise(latents, noise, torch.zeros_like(sigmas)), latents)
    assert torch.equal(fm.add_noise(latents, noise, torch.ones_like(sigmas)), noise)


def test_noisy_latents_and_velocity_give_back_data_and_noise():
    latents, noise, sigmas = draw()
    noisy_latents, velocity = fm.add_noise(latents, noise, sigmas), fm.velocity_target(latents, noise)
    sigmas = sigmas.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy_latents - sigmas * velocity, latents, rtol=0, atol=1e-14)
    torch.testing.assert_close(noisy_latents + (1 - sigmas) * velocity, noise, rtol=0, atol=1e-14)


def test_the_predicted_latents_are_the_end_of_the_path():
    latents, noise, sigmas = draw()
    noisy_latents, velocity = fm.add_noise(latents, noise, sigmas), fm.velocity_target(latents, noise)
    torch.testing.assert_close(fm.predict_latents(noisy_latents, velocity, sigmas), latents, rtol=0, atol=1e-14)
    half = fm.predict_latents(noisy_latents.float(), velocity.bfloat16(), sigmas.float())
    assert half.dtype == torch.float32


def test_the_velocity_is_the_derivative_of_the_path():
    latents, noise, sigmas = draw()
    _, derivative = torch.func.jvp(lambda s: fm.add_noise(latents, noise, s), (sigmas,), (torch.ones_like(sigmas),))
    torch.testing.assert_close(fm.velocity_target(latents, noise), derivative)


def test_the_gradient_of_the_loss_agrees_with_the_formula():
    latents, noise, _ = draw()
    velocity_pred = torch.randn(SHAPE, dtype=torch.float64, generator=step_generator(1)).requires_grad_()
    target = fm.velocity_target(latents, noise)
    loss = fm.velocity_loss(velocity_pred, target)
    assert loss.shape == (SHAPE[0],)
    loss.sum().backward()
    torch.testing.assert_close(velocity_pred.grad, 2 * (velocity_pred.detach() - target) / target[0].numel())
    torch.testing.assert_close(loss[1], torch.nn.functional.mse_loss(velocity_pred[1], target[1]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_noise_timestep_and_shift_agree_with_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    latents, noise, _ = draw(dtype=torch.float32)
    steps = torch.tensor([1000, 400, 1])  # of the 1000 in training
    sigmas = fm.shift_sigmas(steps / 1000, shift)
    timesteps = fm.timesteps_from_sigmas(sigmas)
    their_timesteps = scheduler.timesteps[1000 - steps]
    torch.testing.assert_close(timesteps, their_timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        fm.add_noise(latents, noise, sigmas), scheduler.scale_noise(latents, their_timesteps, noise)
    )


def test_one_euler_step_on_the_target_leads_from_noise_to_data():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1)
    latents, noise, _ = draw(dtype=torch.float32)
    target = fm.velocity_target(latents, noise)
    torch.testing.assert_close(scheduler.step(target, scheduler.timesteps[0], noise).prev_sample, latents)


def test_wans_sampler_on_the_target_leads_from_noise_to_data():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(7)
    latents, noise, _ = draw(dtype=torch.float32)
    target, sample = fm.velocity_target(latents, noise), noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(target, timestep, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=0, atol=1e-4)


@given(st.floats(0.1, 20), st.floats(0, 1), st.floats(0, 1))
def test_shift_keeps_ends_and_order_and_has_an_inverse(shift, low, high):
    sigmas = torch.tensor([0, *sorted([low, high]), 1], dtype=torch.float64)
    shifted = fm.shift_sigmas(sigmas, shift)
    assert shifted[0] == 0
    assert shifted[-1] == pytest.approx(1, abs=1e-15)
    assert (shifted.diff() >= 0).all()
    torch.testing.assert_close(fm.shift_sigmas(shifted, 1 / shift), sigmas)


@given(st.integers(1, 60), st.integers(0, 2**32))
def test_every_sample_of_a_step_has_its_own_stratum(count, seed):
    uniform = fm.stratified_uniform(count, step_generator(seed))
    assert uniform.shape == (count,)
    assert sorted((uniform * count).floor().long().tolist()) == list(range(count))


def test_noise_levels_are_uniform_at_every_place_of_the_batch():
    draws = torch.stack([fm.stratified_uniform(4, step_generator(seed)) for seed in range(2000)])
    quantiles = draws.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=0)
    expected = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64).expand_as(quantiles)
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("scheme", fm.WEIGHTING_SCHEMES)
def test_density_agrees_with_diffusers(scheme):
    options = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": 1.29}
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    ours = fm.density_from_uniform(uniform, SigmaDensity(scheme, **options)).sort().values
    theirs = compute_density_for_timestep_sampling(scheme, 20000, generator=step_generator(), **options)
    torch.testing.assert_close(ours, theirs.sort().values.double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("scheme", fm.WEIGHTING_SCHEMES)
def test_densities_and_shift_keep_one_sample_per_stratum(scheme):
    density = SigmaDensity(scheme, shift=3.0)
    edges = fm.density_from_uniform(torch.linspace(0, 1, 9, dtype=torch.float64), density).clamp(fm.MIN_SIGMA, 1)
    edges = fm.shift_sigmas(edges, 3.0).sort().values.float()
    sigmas = fm.sample_sigmas(8, density, step_generator())
    assert sigmas.dtype == torch.float32
    assert sorted(torch.bucketize(sigmas, edges[1:-1]).tolist()) == list(range(8))


def test_positive_logit_mean_means_more_noise():
    def mean(logit_mean):
        density = SigmaDensity("logit_normal", logit_mean, shift=1.0)
        return fm.sample_sigmas(512, density, step_generator()).mean()

    assert mean(1.0) > mean(0.0) + 0.1 > mean(-1.0) + 0.2


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_never_fall_below_the_trained_schedule(shift):
    lowest = fm.sample_sigmas(20000, SigmaDensity(shift=shift), step_generator()).min().item()
    assert lowest == pytest.approx(shift * 1e-3 / (1 + (shift - 1) * 1e-3))


@pytest.mark.parametrize("scheme", fm.WEIGHTING_SCHEMES)
def test_weights_are_those_of_diffusers_up_to_the_cap(scheme):
    sigmas = torch.linspace(0.003, 1, 500)
    theirs = compute_loss_weighting_for_sd3(scheme, sigmas)
    ours = fm.loss_weights(sigmas, scheme)
    torch.testing.assert_close(ours, theirs.clamp(max=5) if scheme == "sigma_sqrt" else theirs)
    assert (ours == 5).any() == (scheme == "sigma_sqrt")


@pytest.mark.parametrize(("shift", "before", "after"), [(1, 0.950, 0.014), (3, 0.940, 0.020), (5, 0.927, 0.024)])
def test_the_cap_takes_the_weight_from_the_least_noisy_samples(shift, before, after):
    """Share of `sigma_sqrt`'s weight that the 1 % of the samples with the least noise carry."""

    def share(weights):
        return (weights[:1000].sum() / weights.sum()).item()

    sigmas = fm.shift_sigmas(((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000).clamp(1e-3), shift)
    assert share(compute_loss_weighting_for_sd3("sigma_sqrt", sigmas).double()) == pytest.approx(before, abs=6e-4)
    assert share(fm.loss_weights(sigmas, "sigma_sqrt")) == pytest.approx(after, abs=6e-4)


QUARTERS = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("scheme", fm.WEIGHTING_SCHEMES)
def test_level_weights_give_the_expectation_of_a_loss_that_is_linear_between_levels(scheme, shift):
    density, losses = SigmaDensity(scheme, 0.0, 1.0, 1.29, shift), torch.tensor([0.9, 0.2, 0.4, 1.7]).double()
    weights = fm.level_weights(fm.shift_sigmas(QUARTERS, shift), density)
    assert (weights >= 0).all()
    # Diffusers draws the density; it is symmetric at a mean of 0.
    drawn = compute_density_for_timestep_sampling(scheme, 400_000, 0.0, 1.0, 1.29, generator=step_generator()).double()
    sigmas = fm.shift_sigmas(drawn.clamp(1e-3, 1), shift)
    values = torch.from_numpy(np.interp(drawn.numpy(), QUARTERS.numpy(), losses.numpy()))
    samples = compute_loss_weighting_for_sd3(scheme, sigmas).clamp(max=5) * values
    error = samples.std() / len(samples) ** 0.5
    assert abs(weights @ losses - samples.mean()) < 4 * error


def test_the_default_density_weighs_its_quantiles_alike():
    weights = fm.level_weights(fm.shift_sigmas(QUARTERS, 3.0), SigmaDensity())
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25), rtol=0, atol=1e-12)


def test_half_precision_latents_are_noised_in_full_precision():
    latents, noise, sigmas = draw(dtype=torch.float32)
    half = latents.bfloat16()
    noisy_latents = fm.add_noise(half, noise, sigmas)
    assert noisy_latents.dtype == torch.bfloat16
    assert torch.equal(noisy_latents, fm.add_noise(half.float(), noise, sigmas).bfloat16())
    target = fm.velocity_target(half, noise.bfloat16())
    assert target.dtype == torch.float32
    assert fm.velocity_loss(target.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fm.shift_sigmas(x, 0), "shift is 0"),
        (lambda x: fm.add_noise(x, x[:1], torch.zeros(3)), "latents has shape"),
        (lambda x: fm.add_noise(x, x, torch.zeros(2)), "one per sample"),
        (lambda x: fm.predict_latents(x, x, torch.zeros(1)), "one per sample"),
        (lambda x: fm.add_noise(x, x, torch.zeros(3, dtype=torch.bfloat16)), "keep them in torch.float32"),
        (lambda x: fm.timesteps_from_sigmas(x.bfloat16()), "keep them in torch.float32"),
        (lambda x: fm.velocity_target(x, x[:1]), "noise"),
        (lambda x: fm.velocity_loss(x, x[:1]), "velocity_target"),
        (lambda x: SigmaDensity("uniform"), "weighting_scheme is 'uniform'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(SHAPE))
