"""Flow matching as Wan 2.1 was trained: straight paths from data to noise, and the model predicts their velocity.

The direction, stated here once for the whole project: σ = 0 is data, σ = 1 is noise. Other codebases run it backwards.
"""

from dataclasses import dataclass

import torch

#: Diffusers' names. `logit_normal` and `mode` change the density of the sigmas; `sigma_sqrt` and `cosmap` change the
#: weight of the loss, see `loss_weights`.
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")

#: The lowest noise level of Wan's 1000-step schedule before its shift.
MIN_SIGMA = 1e-3

#: Cap of `sigma_sqrt`'s weight, σ⁻². Without it, at shift 3 the 1 % of the samples with the least noise carry 94 % of
#: the weight (computed). Source: γ of Min-SNR (Hang et al. 2023), Diffusers' `--snr_gamma 5.0`, which caps a weight
#: that grows in the same way towards low noise
MAX_WEIGHT = 5.0


@dataclass(frozen=True)
class SigmaDensity:
    """The density of the noise levels that training draws.

    Args:
        weighting_scheme: one of WEIGHTING_SCHEMES; all but `logit_normal` and `mode` are uniform.
        logit_mean, logit_std: parameters of `logit_normal`; a mean above 0 means more noise.
        mode_scale: parameter of `mode`; in [−1, 2/(π − 2)] the map from uniform numbers is monotonic.
        shift: see `shift_sigmas`; 3 is that of Wan's own 480p inference schedule.

    Raises:
        ValueError: for an unknown scheme.
    """

    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 3.0

    def __post_init__(self):
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            raise ValueError(
                f"weighting_scheme is {self.weighting_scheme!r}: it must be one of {', '.join(WEIGHTING_SCHEMES)}"
            )


# σ' = s·σ / (1 + (s − 1)·σ). Source: Esser et al. 2024 (SD3), eq. 23
def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Move sigmas towards noise for shift > 1, as Wan's schedulers do; 0, 1 and the order are kept.

    Args:
        sigmas: any shape, in [0, 1].
        shift: s > 0. Wan: 3 for 480p, 5 for 720p; 1 changes nothing.

    Returns:
        Like `sigmas`, in [0, 1].

    Raises:
        ValueError: if shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift is {shift}: it must be positive")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


# x_σ = (1 − σ)·x₀ + σ·ε. Source: Lipman et al. 2023, eq. 22, its time reversed to Wan's direction
def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return the noisy latents on the straight path from `latents` to `noise`.

    Args:
        latents: (B, C, T, h, w), normalised clean latents.
        noise: like `latents`, N(0, 1).
        sigmas: (B,) fp32 (or float64, for tests) in [0, 1].

    Returns:
        (B, C, T, h, w) in the latents' dtype; the arithmetic is at least fp32.

    Raises:
        ValueError: if shapes differ or the sigmas are in half precision.
    """
    _require_same_shape("latents", latents, "noise", noise)
    sigmas = _one_per_sample(sigmas, latents)
    return ((1 - sigmas) * latents + sigmas * noise).to(latents.dtype)


# u = dx_σ/dσ = ε − x₀. Source: Lipman et al. 2023, eq. 23
def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the velocity of the straight path, `noise - latents`: the same at every σ.

    Args:
        latents: (B, C, T, h, w), normalised clean latents.
        noise: like `latents`, the same noise as given to `add_noise`.

    Returns:
        (B, C, T, h, w), at least fp32.

    Raises:
        ValueError: if the shapes differ.
    """
    _require_same_shape("latents", latents, "noise", noise)
    return _at_least_fp32(noise) - _at_least_fp32(latents)


# x₀ = x_σ − σ·u: the straight path, followed back to its end at σ = 0
def predict_latents(noisy_latents: torch.Tensor, velocity_pred: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return the clean latents that a predicted velocity leads to.

    Args:
        noisy_latents: (B, C, T, h, w), on the path at `sigmas`.
        velocity_pred: like `noisy_latents`, any float dtype.
        sigmas: (B,) fp32 (or float64, for tests) in [0, 1].

    Returns:
        (B, C, T, h, w), at least fp32.

    Raises:
        ValueError: if the shapes differ or the sigmas are in half precision.
    """
    _require_same_shape("noisy_latents", noisy_latents, "velocity_pred", velocity_pred)
    sigmas = _one_per_sample(sigmas, noisy_latents)
    return _at_least_fp32(noisy_latents) - sigmas * _at_least_fp32(velocity_pred)


# L = ‖v_θ(x_σ, σ) − (ε − x₀)‖² / dim. Source: Lipman et al. 2023, eq. 23
def velocity_loss(velocity_pred: torch.Tensor, velocity_target: torch.Tensor) -> torch.Tensor:
    """Flow-matching loss: mean squared error of the velocity.

    Args:
        velocity_pred: (B, C, T, h, w), the model's output, any float dtype.
        velocity_target: (B, C, T, h, w), `noise - latents`.

    Returns:
        (B,) fp32 (float64 only if an input is), mean over all but the batch: the caller weighs and averages.

    Raises:
        ValueError: if the shapes differ.
    """
    _require_same_shape("velocity_pred", velocity_pred, "velocity_target", velocity_target)
    squared_error = (_at_least_fp32(velocity_pred) - _at_least_fp32(velocity_target)) ** 2
    return squared_error.flatten(1).mean(1)


# w = σ⁻², w = 2 / (π·(1 − 2σ + 2σ²)). Source: Diffusers' `compute_loss_weighting_for_sd3`; cosmap: SD3, section 3.1
def loss_weights(sigmas: torch.Tensor, weighting_scheme: str) -> torch.Tensor:
    """Return the weights of samples' losses: Diffusers' weights, but `sigma_sqrt`'s are at most MAX_WEIGHT.

    Args:
        sigmas: any shape, in (0, 1], shifted.
        weighting_scheme: one of WEIGHTING_SCHEMES; all but `sigma_sqrt` and `cosmap` weigh every sample 1.

    Returns:
        like `sigmas`, above 0.
    """
    if weighting_scheme == "sigma_sqrt":
        return (sigmas**-2).clamp(max=MAX_WEIGHT)
    if weighting_scheme == "cosmap":
        return 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def timesteps_from_sigmas(sigmas: torch.Tensor) -> torch.Tensor:
    """Return the timesteps 1000·σ, in which the model takes its noise levels.

    Args:
        sigmas: any shape, fp32 in [0, 1].

    Returns:
        Like `sigmas`, in [0, 1000], not rounded.

    Raises:
        ValueError: if the sigmas are in half precision.
    """
    _require_full_precision(sigmas)
    return 1000 * sigmas


def stratified_uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw uniform numbers, one per stratum.

    [0, 1) is cut into `count` equal strata. Every sample gets its own stratum, in shuffled order, and a uniform place
    within it. So each sample's u is uniform, and the numbers cover the range evenly: the loss varies less from step to
    step than with independent draws.

    Args:
        count: N, samples of an optimizer step: of all processes and micro-batches.
        generator: CPU generator. It must be in the same state in every process and for every micro-batch of the step
            (seed it from the run's seed and the step): each draws all numbers, and takes those of its own samples.

    Returns:
        (N,) float64 in [0, 1), on CPU.
    """
    # Shuffled: otherwise a process would see the same noise levels in every step.
    strata = torch.randperm(count, generator=generator)
    return (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / count


# logit_normal: σ = sigmoid(m + s·Φ⁻¹(u)), mode: σ = 1 − u − s·(cos²(πu/2) − 1 + u). Source: SD3, eq. 19 and 20
def density_from_uniform(uniform: torch.Tensor, density: SigmaDensity) -> torch.Tensor:
    """Turn uniform numbers into sigmas of the density, before its shift.

    The map is monotonic, so strata stay strata (for `mode`, see `mode_scale` of `SigmaDensity`).

    It is `diffusers.training_utils.compute_density_for_timestep_sampling` as a function of u: Diffusers' function
    draws its own numbers and therefore cannot be stratified. As in the paper the result is σ, so `logit_mean` > 0
    means more noise; Diffusers' scripts use the result as an index into descending sigmas, which mirrors `logit_mean`
    (the other schemes are symmetric).

    Args:
        uniform: any shape, in [0, 1).
        density: see `SigmaDensity`.

    Returns:
        Like `uniform`, in [0, 1].
    """
    if density.weighting_scheme == "logit_normal":
        return torch.sigmoid(density.logit_mean + density.logit_std * torch.special.ndtri(uniform))
    if density.weighting_scheme == "mode":
        return 1 - uniform - density.mode_scale * (torch.cos(torch.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform


def sample_sigmas(count: int, density: SigmaDensity, generator: torch.Generator) -> torch.Tensor:
    """Draw the sigmas of an optimizer step: stratified, of the given density, shifted.

    Args:
        count, generator: see `stratified_uniform`.
        density: see `SigmaDensity`.

    Returns:
        (N,) fp32 in [MIN_SIGMA shifted, 1], on CPU.

    Raises:
        ValueError: if the shift is not positive.
    """
    sigmas = density_from_uniform(stratified_uniform(count, generator), density)
    return shift_sigmas(sigmas.clamp(MIN_SIGMA, 1), density.shift).float()


def level_weights(levels: torch.Tensor, density: SigmaDensity) -> torch.Tensor:
    """Return weights that turn losses at a few noise levels into the expectation of the training loss.

    Σ weights·losses is E[w(σ)·L(σ)] over the density of training with its weight w, exactly so if L is linear between
    the levels as a function of the unshifted σ, and constant below the lowest and above the highest one.

    Args:
        levels: (S,) ascending sigmas, shifted; at least two.
        density: see `SigmaDensity`.

    Returns:
        (S,) float64, at least 0. Their sum is the mean weight of a sample.
    """
    count = 2**16
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    sigmas = density_from_uniform(uniform, density).clamp(MIN_SIGMA, 1)
    sample_weights = loss_weights(shift_sigmas(sigmas, density.shift), density.weighting_scheme) / count
    nodes = shift_sigmas(levels.double(), 1 / density.shift)
    right = torch.searchsorted(nodes, sigmas).clamp(1, len(nodes) - 1)
    place = ((sigmas - nodes[right - 1]) / (nodes[right] - nodes[right - 1])).clamp(0, 1)
    weights = torch.zeros_like(nodes)
    weights.index_add_(0, right - 1, sample_weights * (1 - place))
    return weights.index_add_(0, right, sample_weights * place)


def _at_least_fp32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_same_shape(name, tensor, other_name, other):
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {other_name} {tuple(other.shape)}: they must agree")


def _one_per_sample(sigmas, latents):
    """Return (B,) sigmas as (B, 1, ...), ready to multiply latents."""
    _require_full_precision(sigmas)
    if sigmas.shape != latents.shape[:1]:
        raise ValueError(f"sigmas have shape {tuple(sigmas.shape)}: expected one per sample, ({latents.shape[0]},)")
    return sigmas.view(-1, *[1] * (latents.ndim - 1))


def _require_full_precision(sigmas):
    # bf16 keeps 8 bits: 1000·σ would be off by up to 2 steps, and the model would get another σ than the loss.
    if sigmas.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sigmas are {sigmas.dtype}: keep them in torch.float32")
