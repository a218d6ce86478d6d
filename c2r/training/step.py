"""The parts of a training step that both phases share: noisy batch, loss weights, augmentation, the step's end."""

from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from c2r import flow_matching
from c2r.flow_matching import BatchPlace, SigmaDensity
from c2r.training.augmentation import augment_control_frames
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
    num_micro_batches: int = 1  #: micro-batches of one optimizer step, per process
    num_processes: int = 1
    process_index: int = 0

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
            num_micro_batches=args.gradient_accumulation_steps,
            num_processes=run.accelerator.num_processes,
            process_index=run.accelerator.process_index,
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
    batch: dict, settings: NoiseSettings, micro_step: int, empty_prompt_embeds: torch.Tensor, device: torch.device
) -> NoisyBatch:
    """Draw latents, noise levels, noise and dropped conditions for one micro-batch.

    All randomness comes from the seed, the micro-step and the sample's place in the micro-batch of all processes, see
    `seeded_generator`: two processes with a batch of 2 draw what one process with a batch of 4 draws.

    Args:
        batch: from the data loader: `latents_mean`, `latents_logvar` (B, C, T, h, w), `prompt_embeds` (B, L, D_text).
        settings: see `NoiseSettings`.
        micro_step: micro-steps done since the start of training. The noise levels of one optimizer step are stratified
            over its micro-batches and all processes.
        empty_prompt_embeds: (L, D_text), replaces dropped prompts.
        device: device of the result.
    """
    mean, logvar = batch["latents_mean"], batch["latents_logvar"]
    batch_size = len(mean)
    first = settings.process_index * batch_size
    generators = [seeded_generator(settings.seed, "sample", micro_step, first + i) for i in range(batch_size)]
    posterior_noise, noise = (
        torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]) for _ in range(2)
    )
    prompt_draws, control_draws = (torch.stack([torch.rand((), generator=g) for g in generators]) for _ in range(2))
    latents = mean + torch.exp(0.5 * logvar) * posterior_noise
    step, micro_batch_index = divmod(micro_step, settings.num_micro_batches)
    place = BatchPlace(
        batch_size=batch_size,
        num_processes=settings.num_processes,
        process_index=settings.process_index,
        num_micro_batches=settings.num_micro_batches,
        micro_batch_index=micro_batch_index,
    )
    sigmas = flow_matching.sample_sigmas(place, settings.density, seeded_generator(settings.seed, "sigmas", step))
    prompt_embeds = torch.where(
        (prompt_draws < settings.prompt_dropout)[:, None, None], empty_prompt_embeds, batch["prompt_embeds"]
    )
    latents, noise, sigmas = latents.to(device), noise.to(device), sigmas.to(device)
    return NoisyBatch(
        noisy_latents=flow_matching.add_noise(latents, noise, sigmas),
        timesteps=flow_matching.timesteps_from_sigmas(sigmas),
        prompt_embeds=prompt_embeds.to(device),
        velocity_target=flow_matching.velocity_target(latents, noise),
        weights=compute_loss_weighting_for_sd3(settings.density.weighting_scheme, sigmas),
        sigmas=sigmas,
        dropped_control=(control_draws < settings.control_dropout).to(device),
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
    return torch.tensor([real_weight / mean, 1 / mean], device=domains.device)[domains]


def augment_real_control(
    control_frames: torch.Tensor, domains: torch.Tensor, share: float, settings: NoiseSettings, micro_step: int
) -> torch.Tensor:
    """Alter the look of the control of some real clips by `augment_control_frames`.

    As in `make_noisy_batch`, the randomness comes from the seed, the micro-step and the sample's place.

    Args:
        control_frames: (B, F, 3, H, W) floats in [0, 1].
        domains: (B,) 0 real, 1 CG. CG pairs stay as they are.
        share: share of real clips that are altered, in [0, 1].
        settings, micro_step: see `make_noisy_batch`.

    Returns:
        (B, F, 3, H, W) in [0, 1]; with a share of 0 `control_frames` itself.
    """
    if share == 0:
        return control_frames
    clips, first = [], settings.process_index * len(domains)
    for i, (frames, domain) in enumerate(zip(control_frames, domains.tolist())):
        generator = seeded_generator(settings.seed, "augmentation", micro_step, first + i)
        chosen = torch.rand((), generator=generator) < share
        clips.append(augment_control_frames(frames, generator) if chosen and domain == 0 else frames)
    return torch.stack(clips)


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
    run.timings.samples_per_second = logs["train/samples_per_second"]
    progress.logs = logs
    run.accelerator.log(logs, progress.global_step)
    shown = {"loss": f"{logs['train/loss']:.4f}", "grad_norm": f"{grad_norm:.2f}"}
    if "cg_share" in numbers:
        shown["cg"] = f"{numbers['cg_share']:.3f}"
    run.bar.set_postfix(shown)
    run.bar.update()
    run.interruption.agree(run.accelerator)
