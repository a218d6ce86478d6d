"""Flow matching as Wan 2.1 was trained: straight paths from data to noise, and the model predicts their velocity.

The direction, stated here once for the whole project: σ = 0 is data, σ = 1 is noise. Other codebases run it backwards.
"""

import torch

#: `--weighting_scheme`, by Diffusers' names. `logit_normal` and `mode` change the density of the sigmas;
#: `sigma_sqrt` and `cosmap` change the weight of the loss (`diffusers.training_utils.compute_loss_weighting_for_sd3`).
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")

#: The lowest noise level of Wan's 1000-step schedule before its shift. It bounds `sigma_sqrt`'s weight, σ⁻².
MIN_SIGMA = 1e-3


# σ' = s·σ / (1 + (s − 1)·σ). Source: Esser et al. 2024 (SD3), eq. 23
def shift_sigmas(sigmas, shift):
    """Move sigmas towards noise for shift > 1, as Wan's schedulers do; 0, 1 and order are kept.

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
def add_noise(latents, noise, sigmas):
    """Noisy latents on the straight path from `latents` to `noise`.

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
    _require_full_precision(sigmas)
    if sigmas.shape != latents.shape[:1]:
        raise ValueError(f"sigmas have shape {tuple(sigmas.shape)}: expected one per sample, ({latents.shape[0]},)")
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1))
    return ((1 - sigmas) * latents + sigmas * noise).to(latents.dtype)


# u = dx_σ/dσ = ε − x₀. Source: Lipman et al. 2023, eq. 23
def velocity_target(latents, noise):
    """The velocity of the straight path, `noise - latents`: the same at every σ.

    Args:
        latents: (B, C, T, h, w), normalised clean latents.
        noise: like `latents`, the very noise that `add_noise` was given.

    Returns:
        (B, C, T, h, w), at least fp32.

    Raises:
        ValueError: if the shapes differ.
    """
    _require_same_shape("latents", latents, "noise", noise)
    return _at_least_fp32(noise) - _at_least_fp32(latents)


# x₀ = x_σ − σ·u: the straight path, followed back to its end at σ = 0
def predict_latents(noisy_latents, velocity_pred, sigmas):
    """The clean latents that a predicted velocity leads to.

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
    _require_full_precision(sigmas)
    sigmas = sigmas.view(-1, *[1] * (noisy_latents.ndim - 1))
    return _at_least_fp32(noisy_latents) - sigmas * _at_least_fp32(velocity_pred)


# L = ‖v_θ(x_σ, σ) − (ε − x₀)‖² / dim. Source: Lipman et al. 2023, eq. 23
def velocity_loss(velocity_pred, velocity_target):
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


def timesteps_from_sigmas(sigmas):
    """What the model is called with: 1000·σ.

    Args:
        sigmas: any shape, fp32 in [0, 1].

    Returns:
        Like `sigmas`, in [0, 1000], not rounded.

    Raises:
        ValueError: if the sigmas are in half precision.
    """
    _require_full_precision(sigmas)
    return 1000 * sigmas


def stratified_uniform(
    batch_size, generator, num_processes=1, process_index=0, num_micro_batches=1, micro_batch_index=0
):
    """This process's part of one uniform draw per stratum of the optimizer step's global batch.

    [0, 1) is cut into G = batch_size · num_processes · num_micro_batches equal strata, every sample of the global
    batch gets its own, in shuffled order, and lands uniformly within it. So each sample's u is uniform, and the step's
    sigmas cover the range evenly: the loss varies less from step to step than with independent draws.

    Args:
        batch_size: B, samples in one micro-batch of one process.
        generator: CPU `torch.Generator`. It must stand in the same state in every process and for every micro-batch of
            the step (seed it from the run's seed and the step): each call draws the whole global batch.
        num_processes, process_index: this process among all.
        num_micro_batches, micro_batch_index: this micro-batch among those accumulated into the step.

    Returns:
        (B,) float64 in [0, 1), on CPU.

    Raises:
        ValueError: if a size is below 1 or an index is out of its range.
    """
    for name, size in [("batch_size", batch_size), ("num_processes", num_processes)]:
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index is {process_index}: it must be in 0..{num_processes - 1}")
    if not 0 <= micro_batch_index < num_micro_batches:
        raise ValueError(f"micro_batch_index is {micro_batch_index}: it must be in 0..{num_micro_batches - 1}")
    global_batch_size = batch_size * num_processes * num_micro_batches
    # Shuffled, or a process would see the same noise levels in every step.
    strata = torch.randperm(global_batch_size, generator=generator)
    offsets = torch.rand(global_batch_size, generator=generator, dtype=torch.float64)
    start = (micro_batch_index * num_processes + process_index) * batch_size
    return ((strata + offsets) / global_batch_size)[start : start + batch_size]


# logit_normal: σ = sigmoid(m + s·Φ⁻¹(u)), mode: σ = 1 − u − s·(cos²(πu/2) − 1 + u). Source: SD3, eq. 19 and 20
def density_from_uniform(uniform, weighting_scheme="none", logit_mean=0.0, logit_std=1.0, mode_scale=1.29):
    """Turn uniform numbers into sigmas of the scheme's density, monotonously, so that strata stay strata.

    It is `diffusers.training_utils.compute_density_for_timestep_sampling` as a function of u: that one draws by itself
    and therefore cannot be stratified. As in the paper the result is σ, so `logit_mean` > 0 means more noise;
    Diffusers' scripts use it as an index into descending sigmas, which mirrors `logit_mean` (the other schemes are
    symmetric).

    Args:
        uniform: any shape, in [0, 1).
        weighting_scheme: one of WEIGHTING_SCHEMES; all but `logit_normal` and `mode` are uniform.
        logit_mean, logit_std: of `logit_normal`.
        mode_scale: of `mode`; in [−1, 2/(π − 2)] the map is monotonous.

    Returns:
        Like `uniform`, in [0, 1].

    Raises:
        ValueError: for an unknown scheme.
    """
    if weighting_scheme not in WEIGHTING_SCHEMES:
        raise ValueError(f"weighting_scheme is {weighting_scheme!r}: it must be one of {', '.join(WEIGHTING_SCHEMES)}")
    if weighting_scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(uniform))
    if weighting_scheme == "mode":
        return 1 - uniform - mode_scale * (torch.cos(torch.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform


def sample_sigmas(
    batch_size,
    generator,
    shift=3.0,
    weighting_scheme="none",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    num_processes=1,
    process_index=0,
    num_micro_batches=1,
    micro_batch_index=0,
):
    """Sigmas of one micro-batch for training: stratified over the global batch, of the scheme's density, shifted.

    Args:
        batch_size, generator, num_processes, process_index, num_micro_batches, micro_batch_index: see
            `stratified_uniform`.
        shift: see `shift_sigmas`; 3 is what Wan's own 480p inference schedule uses.
        weighting_scheme, logit_mean, logit_std, mode_scale: see `density_from_uniform`.

    Returns:
        (B,) fp32 in [MIN_SIGMA shifted, 1], on CPU.

    Raises:
        ValueError: for a bad argument, as the three functions say.
    """
    uniform = stratified_uniform(
        batch_size, generator, num_processes, process_index, num_micro_batches, micro_batch_index
    )
    sigmas = density_from_uniform(uniform, weighting_scheme, logit_mean, logit_std, mode_scale)
    return shift_sigmas(sigmas.clamp(MIN_SIGMA, 1), shift).float()


def _at_least_fp32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_same_shape(name, tensor, other_name, other):
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {other_name} {tuple(other.shape)}: they must agree")


def _require_full_precision(sigmas):
    # bf16 keeps 8 bits: 1000·σ would be off by up to 2 steps, and the model would be told another σ than the loss.
    if sigmas.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sigmas are {sigmas.dtype}: keep them in torch.float32")
