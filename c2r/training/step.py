"""The randomness and the noisy batch of one training step."""

from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from c2r import flow_matching
from c2r.training.augmentation import augment_control_frames
from c2r.training.seeds import seeded_generator


@dataclass
class NoisyBatch:
    """What the model is given in one micro-step, and what it should answer."""

    noisy_latents: torch.Tensor  # (B, C, T, h, w) fp32
    timesteps: torch.Tensor  # (B,) fp32 in [0, 1000]
    prompt_embeds: torch.Tensor  # (B, L, D_text)
    velocity_target: torch.Tensor  # (B, C, T, h, w) fp32
    weights: torch.Tensor  # (B,) fp32, of the samples' losses
    sigmas: torch.Tensor  # (B,) fp32
    dropped_control: torch.Tensor  # (B,) bool: train these without control


def make_noisy_batch(batch, args, *, empty_prompt_embeds, micro_step, process_index, num_processes, device):
    """Draw latents, noise levels, noise and dropped conditions for one micro-batch.

    All randomness comes from the seed, the micro-step and the sample's place in the micro-batch of all processes; see
    `seeded_generator`. So two processes with a batch of 2 draw what one with a batch of 4 draws.

    Args:
        batch: what the data loader gives: `latents_mean`, `latents_logvar` (B, C, T, h, w), `prompt_embeds` (B, L, D).
        args: the run's options.
        empty_prompt_embeds: (L, D), what a dropped prompt is replaced by.
        micro_step: the run's micro-steps done, over all optimizer steps. The noise levels of one optimizer step, which
            is `gradient_accumulation_steps` of them on all processes, are stratified together.
        process_index, num_processes: this process among all.
        device: where the result goes.
    """
    mean, logvar = batch["latents_mean"], batch["latents_logvar"]
    batch_size = len(mean)
    first = process_index * batch_size
    own = [seeded_generator(args.seed, "sample", micro_step, first + i) for i in range(batch_size)]
    spread, noise = (torch.stack([torch.randn(mean.shape[1:], generator=g) for g in own]) for _ in range(2))
    dropped_prompt, dropped_control = (torch.stack([torch.rand((), generator=g) for g in own]) for _ in range(2))
    latents = mean + torch.exp(0.5 * logvar) * spread
    sigmas = flow_matching.sample_sigmas(
        batch_size,
        seeded_generator(args.seed, "sigmas", micro_step // args.gradient_accumulation_steps),
        args.flow_shift,
        args.weighting_scheme,
        args.logit_mean,
        args.logit_std,
        args.mode_scale,
        num_processes=num_processes,
        process_index=process_index,
        num_micro_batches=args.gradient_accumulation_steps,
        micro_batch_index=micro_step % args.gradient_accumulation_steps,
    )
    prompt_embeds = torch.where(
        (dropped_prompt < args.prompt_dropout)[:, None, None], empty_prompt_embeds, batch["prompt_embeds"]
    )
    latents, noise, sigmas = latents.to(device), noise.to(device), sigmas.to(device)
    return NoisyBatch(
        noisy_latents=flow_matching.add_noise(latents, noise, sigmas),
        timesteps=flow_matching.timesteps_from_sigmas(sigmas),
        prompt_embeds=prompt_embeds.to(device),
        velocity_target=flow_matching.velocity_target(latents, noise),
        weights=compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas),
        sigmas=sigmas,
        dropped_control=(dropped_control < getattr(args, "control_dropout", 0)).to(device),
    )


def domain_weights(domains, real_weight, cg_ratio):
    """`--real_weight`: weights of the samples' losses, those of real ones `real_weight` times those of CG ones.

    Args:
        domains: (B,) 0 real, 1 CG.
        real_weight: above 0; 1 gives all the weight 1.
        cg_ratio: share of CG samples among those that are drawn, in [0, 1].

    Returns:
        (B,) fp32, 1 on average over the run: the gradient does not grow with `real_weight`.
    """
    mean = cg_ratio + real_weight * (1 - cg_ratio)
    return torch.tensor([real_weight / mean, 1 / mean], device=domains.device)[domains]


def augment_real_control(control_frames, domains, args, *, micro_step, process_index):
    """Alter the look of the control of `--control_augmentation` of the real clips; see `augment_control_frames`.

    As in `make_noisy_batch` the randomness comes from the seed, the micro-step and the sample's place.

    Args:
        control_frames: (B, F, 3, H, W) floats in [0, 1].
        domains: (B,), 0 real and 1 CG. CG pairs are left as they are.

    Returns:
        (B, F, 3, H, W): the tensor itself where nothing is to be altered.
    """
    if args.control_augmentation == 0:
        return control_frames
    clips, first = [], process_index * len(domains)
    for i, (frames, domain) in enumerate(zip(control_frames, domains.tolist())):
        own = seeded_generator(args.seed, "augmentation", micro_step, first + i)
        chosen = torch.rand((), generator=own) < args.control_augmentation
        clips.append(augment_control_frames(frames, own) if chosen and domain == 0 else frames)
    return torch.stack(clips)
