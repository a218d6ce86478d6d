"""Validation: the loss on held-out clips under fixed noise, and the control gain.

Noise and noise levels belong to the clip, not to the step or the process: the number moves only when the model does,
and two runs can be compared.
"""

from math import isfinite

import torch
from torch.utils.data import DataLoader, Subset

from c2r import InputError, flow_matching
from c2r.training import seeded_generator

# Quantiles of the uniform density at which each clip is noised: the mid-points of four equal strata.
QUANTILES = (0.125, 0.375, 0.625, 0.875)


def choose_validation_clips(manifest, count):
    """Up to `count` held-out clips from as many files as possible: first windows before second ones.

    Raises:
        InputError: if the dataset holds none out.
    """
    if not manifest.held_out:
        raise InputError(
            f"{manifest.folder}: no clip is left to validate on; add a second video, or a validation/ folder"
        )
    return sorted(manifest.held_out, key=lambda clip: clip.window)[:count]


@torch.no_grad()
def clip_losses(dataset, predictor_of, accelerator, flow_shift, batch_size=1, go_on=None):
    """Flow-matching loss of each clip, the mean over QUANTILES. Call it on every process.

    Args:
        dataset: a `ClipDataset`; its `latents_mean` is what is noised.
        predictor_of: `batch -> predict_velocity`, called once for each collated batch of clips, so that prompts and
            control are made ready once; `predict_velocity(noisy_latents, timesteps) -> velocity_pred`.
        accelerator: each process takes its share of the clips.
        flow_shift: shift of the noise levels.
        batch_size: clips in one forward pass.
        go_on: called before each batch; where it returns False, which it does on all processes alike, validation ends.

    Returns:
        (len(dataset),) fp32 on CPU, in the dataset's order, the same on every process; None if it was ended.

    Raises:
        InputError: a loss is not finite.
    """
    # Every process runs equally many batches, or a sharded model's collectives would hang: the last shares are filled
    # up with clips that another process counts.
    per_process = -(-len(dataset) // accelerator.num_processes)
    positions = [accelerator.process_index * per_process + i for i in range(per_process)]
    loader = DataLoader(
        Subset(dataset, [p % len(dataset) for p in positions]), batch_size=batch_size, collate_fn=dataset.collate
    )
    losses = torch.zeros(len(dataset), device=accelerator.device)
    for first, batch in zip(range(0, per_process, batch_size), loader):
        if go_on is not None and not go_on():
            return None
        latents = batch["latents_mean"]
        predict_velocity = predictor_of(batch)
        total = torch.zeros(len(latents), device=accelerator.device)
        for quantile in QUANTILES:
            noise = torch.stack(
                [
                    torch.randn(clip.shape, generator=seeded_generator("validation", name, quantile))
                    for clip, name in zip(latents, batch["name"])
                ]
            )
            sigmas = flow_matching.shift_sigmas(torch.full((len(latents),), quantile), flow_shift)
            noisy_latents = flow_matching.add_noise(latents, noise, sigmas).to(accelerator.device)
            timesteps = flow_matching.timesteps_from_sigmas(sigmas).to(accelerator.device)
            velocity_pred = predict_velocity(noisy_latents, timesteps)
            target = flow_matching.velocity_target(latents, noise).to(accelerator.device)
            total += flow_matching.velocity_loss(velocity_pred, target) / len(QUANTILES)
        for position, loss in zip(positions[first : first + batch_size], total):
            if position < len(dataset):
                losses[position] = loss
    losses = accelerator.reduce(losses, reduction="sum").cpu()
    bad = [dataset.clips[i] for i, loss in enumerate(losses.tolist()) if not isfinite(loss)]
    if bad:
        names = ", ".join(f"{clip.name}#{clip.window}" for clip in bad)
        raise InputError(
            f"the validation loss is not finite for {names}: their cached latents are damaged, or the model "
            "has diverged; delete the cache, or lower --learning_rate, and resume"
        )
    return losses


def other_clips(clips, spare):
    """For each clip, one of the same domain from another file: whose control is the wrong one.

    With another clip's control the model must do worse, or it has not learned to follow the control: a real clip that
    is its own control can lower the loss by leaking its look alone.

    Args:
        clips: the validation clips.
        spare: clips to take from where `clips` has only one file of a domain, such as all of the datasets'.

    Returns:
        list of clips, one for each of `clips`.
    """
    chosen = []
    for i, clip in enumerate(clips):
        candidates = [*clips[i + 1 :], *clips[:i], *spare]
        chosen.append(next(c for c in candidates if c.domain == clip.domain and c.file != clip.file))
    return chosen


def control_metrics(right, other, domains):
    """Phase 2's numbers from the clips' losses.

    Args:
        right, other: (n,) losses with the clip's own control and with another clip's.
        domains: n of "real" or "cg".

    Returns:
        dict: `loss` (the mean of the domains' means, so that no domain outweighs the other), `loss_real`, `loss_cg`,
        `loss_other_control`, and `control_gain` = loss_other_control − loss: 0 means that control is ignored.
    """

    def by_domain(losses):
        groups = {d: [x for x, domain in zip(losses.tolist(), domains) if domain == d] for d in ("real", "cg")}
        return {d: sum(group) / len(group) for d, group in groups.items() if group}

    own, others = by_domain(right), by_domain(other)
    loss, loss_other = (sum(means.values()) / len(means) for means in (own, others))
    return {
        "loss": loss,
        **{f"loss_{domain}": value for domain, value in own.items()},
        "loss_other_control": loss_other,
        "control_gain": loss_other - loss,
    }
