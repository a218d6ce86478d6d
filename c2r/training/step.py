"""The parts of a training step that both phases share: noisy batch, loss weights, augmentation, the step's end."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from c2r import flow_matching
from c2r.flow_matching import SigmaDensity
from c2r.training.augmentation import augment_control_frames
from c2r.training.batches import Draw
from c2r.training.devices import to_device
from c2r.training.guard import StepGuard
from c2r.training.logs import StepLog
from c2r.training.run import Run, TrainState
from c2r.training.seeds import seeded_generator


@dataclass(frozen=True)
class NoiseSettings:
    """Settings of the randomness of a step."""

    seed: int
    density: SigmaDensity
    prompt_dropout: float = 0.0  #: share of samples trained with the empty prompt
    control_dropout: float = 0.0  #: share of samples trained with a blank control

    @classmethod
    def of(cls, run: Run) -> "NoiseSettings":
        """Return the settings that a run's options give."""
        args = run.args
        return cls(
            seed=args.seed,
            density=SigmaDensity(
                weighting_scheme=args.weighting_scheme,
                logit_mean=args.logit_mean,
                logit_std=args.logit_std,
                mode_scale=args.mode_scale,
                shift=args.flow_shift,
            ),
            prompt_dropout=args.prompt_dropout,
            control_dropout=getattr(args, "control_dropout", 0.0),  # phase 1 has no control
        )


@dataclass
class NoisyBatch:
    """Inputs and target of the model in one micro-step."""

    noisy_latents: torch.Tensor  # (B, C, T, h, w) fp32
    timesteps: torch.Tensor  # (B,) fp32 in [0, 1000]
    prompt_embeds: torch.Tensor  # (B, L, D_text)
    velocity_target: torch.Tensor  # (B, C, T, h, w) fp32
    weights: torch.Tensor  # (B,) fp32, weights of the samples' losses
    sigmas: torch.Tensor  # (B,) fp32
    dropped_control: torch.Tensor  # (B,) bool: train these samples without control


def make_noisy_batch(
    batch: dict, settings: NoiseSettings, draw: Draw, empty_prompt_embeds: torch.Tensor, device: torch.device
) -> NoisyBatch:
    """Draw latents, noise levels, noise and dropped conditions for one micro-batch.

    All randomness comes from the seed and the sample's number, see `seeded_generator`: two processes with a batch of 2
    draw what one process with a batch of 4 draws, or with two micro-batches of 2.

    Args:
        batch: from the data loader: `latents_mean`, `latents_logvar` (B, C, T, h, w), `prompt_embeds` (B, L, D_text).
        settings: see `NoiseSettings`.
        draw: the samples in the batch. The noise levels of an optimizer step are stratified over its micro-batches and
            all processes.
        empty_prompt_embeds: (L, D_text), replaces dropped prompts.
        device: device of the result.
    """
    mean, logvar = batch["latents_mean"], batch["latents_logvar"]
    generators = [seeded_generator(settings.seed, "sample", number) for number in draw.numbers]
    posterior_noise, noise = (
        torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]) for _ in range(2)
    )
    prompt_draws, control_draws = (torch.stack([torch.rand((), generator=g) for g in generators]) for _ in range(2))
    latents = mean + torch.exp(0.5 * logvar) * posterior_noise
    generator = seeded_generator(settings.seed, "sigmas", draw.first_of_step)
    sigmas = flow_matching.sample_sigmas(draw.samples_per_step, settings.density, generator)
    sigmas = sigmas[[number - draw.first_of_step for number in draw.numbers]]
    prompt_embeds = torch.where(
        (prompt_draws < settings.prompt_dropout)[:, None, None], empty_prompt_embeds, batch["prompt_embeds"]
    )
    latents, noise, sigmas = to_device(latents, device), to_device(noise, device), to_device(sigmas, device)
    return NoisyBatch(
        noisy_latents=flow_matching.add_noise(latents, noise, sigmas),
        timesteps=flow_matching.timesteps_from_sigmas(sigmas),
        prompt_embeds=to_device(prompt_embeds, device),
        velocity_target=flow_matching.velocity_target(latents, noise),
        weights=flow_matching.loss_weights(sigmas, settings.density.weighting_scheme),
        sigmas=sigmas,
        dropped_control=to_device(control_draws < settings.control_dropout, device),
    )


def domain_weights(domains: torch.Tensor, real_weight: float, cg_ratio: float) -> torch.Tensor:
    """Return the loss weights of `--real_weight`: a real sample weighs `real_weight` times a CG sample.

    Args:
        domains: (B,) 0 real, 1 CG.
        real_weight: above 0; 1 gives all samples the weight 1.
        cg_ratio: share of CG samples among those drawn now, in [0, 1].

    Returns:
        (B,) fp32, 1 on average over the run: the gradient does not grow with `real_weight`.
    """
    mean = cg_ratio + real_weight * (1 - cg_ratio)
    # Filled on the device: a tensor of Python numbers would be copied there, and the host would wait for the copy.
    return torch.full(domains.shape, real_weight / mean, device=domains.device).masked_fill(domains == 1, 1 / mean)


def augment_real_control(
    control_frames: torch.Tensor, domains: torch.Tensor, share: float, seed: int, draw: Draw
) -> torch.Tensor:
    """Alter the look of the control of some real clips by `augment_control_frames`.

    As in `make_noisy_batch`, the randomness comes from the seed and the sample's number.

    Args:
        control_frames: (B, F, 3, H, W) floats in [0, 1].
        domains: (B,) 0 real, 1 CG. CG pairs stay as they are.
        share: share of real clips that are altered, in [0, 1].
        seed: the run's.
        draw: the samples in the batch.

    Returns:
        (B, F, 3, H, W) in [0, 1]; with a share of 0 `control_frames` itself.
    """
    if share == 0:
        return control_frames
    clips = []
    for frames, domain, number in zip(control_frames, domains.tolist(), draw.numbers):
        generator = seeded_generator(seed, "augmentation", number)
        chosen = torch.rand((), generator=generator) < share
        clips.append(augment_control_frames(frames, generator) if chosen and domain == 0 else frames)
    return torch.stack(clips)


def kept_directions(num_directions: int, share: float, seed: int, draw: Draw) -> torch.Tensor | None:
    """Draw how many directions of the control's projection each sample keeps (`--control_tail_drop`).

    As in `make_noisy_batch`, the randomness comes from the seed and the sample's number.

    Args:
        num_directions: K.
        share: share of samples that keep a random number from 1 to K; the others keep all.
        seed: the run's.
        draw: the samples in the batch.

    Returns:
        (B,) int64 on the CPU; None with a share of 0.

    Source of the tail drop: arXiv 2602.06159.
    """
    if share == 0:
        return None
    kept = []
    for number in draw.numbers:
        generator = seeded_generator(seed, "tail drop", number)
        chosen = torch.rand((), generator=generator) < share
        kept.append(int(torch.randint(1, num_directions + 1, (), generator=generator)) if chosen else num_directions)
    return torch.tensor(kept)


def clip_gradients(accelerator: Accelerator, state: TrainState, max_grad_norm: float) -> float:
    """Clip the gradients of a step to a norm, and return the norm that they had before.

    Args:
        accelerator, state: the script's.
        max_grad_norm: 0 clips nothing.
    """
    if state.step_in_backward is not None:
        return state.step_in_backward.take_grad_norm()
    return float(accelerator.clip_grad_norm_(state.model.parameters(), max_grad_norm or math.inf))


def finish_step(run: Run, state: TrainState, log: StepLog, guard: StepGuard, grad_norm: float, **numbers: float):
    """Advance schedule and progress by one optimizer step, log the step, and agree on an interruption.

    Args:
        run, state: the script's.
        log, guard: have collected the numbers of this step.
        grad_norm: norm of the gradient before clipping.
        numbers: other numbers to log.
    """
    learning_rate = state.lr_scheduler.get_last_lr()[0]
    state.lr_scheduler.step()
    progress = run.progress
    progress.global_step += 1
    logs = log.finish(
        learning_rate=learning_rate, grad_norm=grad_norm, skipped_in_a_row=progress.skipped_in_a_row, **numbers
    )
    logs["train/loss_spike"] = guard.finish(logs["train/loss"])
    run.timings.add_step(run.samples_per_step, logs["train/samples_per_second"])
    progress.logs = logs
    run.accelerator.log(logs, progress.global_step)
    shown = {"loss": f"{logs['train/loss']:.4f}", "grad_norm": f"{grad_norm:.2f}"}
    if "cg_share" in numbers:
        shown["cg"] = f"{numbers['cg_share']:.3f}"
    run.bar.set_postfix(shown, refresh=False)  # else a log file would get a line for every step
    run.bar.update()
    run.interruption.agree(run.accelerator)
