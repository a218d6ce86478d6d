"""Validation: flow-matching losses of held-out clips under fixed noise, and the numbers computed from them.

Noise and noise levels depend on the clip alone, not on the step or the process. The numbers change only when the model
does, and two runs can be compared.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from c2r import InputError, flow_matching
from c2r.bars import progress_bar
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.shares import equal_share
from c2r.training.seeds import seeded_generator

#: Quantiles of the uniform density at which each clip is noised: the mid-points of four equal strata.
QUANTILES = (0.125, 0.375, 0.625, 0.875)

#: Largest leak by coarse versions without a warning. Above it, real clips owe more of their control gain to the look
#: of the control than to its layout. Augmented frames have no such bound: they are also harder to read, and on the toy
#: dataset their loss does not reveal a leak.
LEAK_BOUND = 0.5

#: Smallest relative control gain for which a leak is reported as a share of that gain.
MIN_RELATIVE_GAIN = 0.01

#: Each gain and the condition that it is measured against.
GAINS = {"control_gain": "other_control", "prompt_gain": "other_prompt"}

#: (noisy_latents (B, C, T, h, w), timesteps (B,)) -> velocity_pred (B, C, T, h, w)
VelocityPredictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def noise_levels(flow_shift: float) -> torch.Tensor:
    """Return the sigma of each of QUANTILES, (S,) fp32."""
    return flow_matching.shift_sigmas(torch.tensor(QUANTILES), flow_shift)


@torch.no_grad()
def clip_losses(
    dataset: ClipDataset,
    predictors_of: Callable[[dict], dict[str, VelocityPredictor]],
    accelerator: Accelerator,
    flow_shift: float,
    batch_size: int = 1,
    go_on: Callable[[], bool] | None = None,
) -> dict[str, torch.Tensor] | None:
    """Compute the loss of each clip at each noise level under several conditions. Call it on every process.

    Args:
        dataset: noise is added to its `latents_mean`.
        predictors_of: batch -> {condition: predictor}. It is called once for each collated batch of clips, so that
            prompts and control are prepared once. It must give the same conditions in the same order on every
            process, otherwise the collectives of a sharded model would hang.
        accelerator: each process computes its share of the clips.
        flow_shift: shift of the noise levels.
        batch_size: clips in one forward pass.
        go_on: called before each batch; validation ends when it returns False, on all processes alike.

    Returns:
        {condition: (len(dataset), S) fp32 on CPU}, rows in the order of the dataset, columns in that of
        `noise_levels`, the same on every process; None if `go_on` ended the validation.

    Raises:
        InputError: a loss is not finite.
    """
    if len({clip.bucket for clip in dataset.clips}) > 1:
        batch_size = 1  # clips of two buckets cannot be stacked, and every process needs equally many batches
    positions = equal_share(len(dataset), accelerator)
    loader = DataLoader(
        Subset(dataset, [position % len(dataset) for position in positions]),
        batch_size=batch_size,
        collate_fn=dataset.collate,
        generator=torch.Generator(),  # otherwise a seed for the workers is drawn from the global generator
    )
    levels = noise_levels(flow_shift)
    losses: dict[str, torch.Tensor] = {}
    firsts = range(0, len(positions), batch_size)
    with progress_bar(len(firsts), "validation", "batch", accelerator.process_index == 0) as bar:
        for first, batch in zip(firsts, loader):
            if go_on is not None and not go_on():
                return None
            latents, predictors = batch["latents_mean"], predictors_of(batch)
            for column, (quantile, level) in enumerate(zip(QUANTILES, levels)):
                noise = _validation_noise(latents, batch["name"], quantile)
                sigmas = level.repeat(len(latents))
                noisy_latents = flow_matching.add_noise(latents, noise, sigmas).to(accelerator.device)
                timesteps = flow_matching.timesteps_from_sigmas(sigmas).to(accelerator.device)
                target = flow_matching.velocity_target(latents, noise).to(accelerator.device)
                for condition, predict_velocity in predictors.items():
                    if condition not in losses:
                        losses[condition] = torch.zeros(len(dataset), len(QUANTILES), device=accelerator.device)
                    velocity_pred = predict_velocity(noisy_latents, timesteps)
                    batch_losses = flow_matching.velocity_loss(velocity_pred, target)  # (B,)
                    for position, loss in zip(positions[first : first + batch_size], batch_losses):
                        if position < len(dataset):
                            losses[condition][position, column] = loss
            bar.update()
    summed = accelerator.reduce(torch.stack([*losses.values()]), reduction="sum").cpu()  # (conditions, n, S)
    _require_finite(summed, dataset.clips)
    return dict(zip(losses, summed))


def _validation_noise(latents, names, quantile):
    """Return the noise of each clip at one noise level, like `latents`."""
    return torch.stack(
        [
            torch.randn(clip.shape, generator=seeded_generator("validation", name, quantile))
            for clip, name in zip(latents, names)
        ]
    )


def _require_finite(losses, clips):
    """Raise InputError naming the clips that have a loss in (conditions, n, S) that is not finite."""
    finite = losses.isfinite().all(-1).all(0)  # (n,)
    if not finite.all():
        names = ", ".join(f"{clips[i].name}#{clips[i].window}" for i in (~finite).nonzero().flatten().tolist())
        raise InputError(
            f"the validation loss is not finite for {names}: their cached latents are damaged, or the model "
            "has diverged; delete their cached files, or lower --learning_rate, and resume"
        )


def validation_metrics(losses: dict[str, torch.Tensor], domains: list[str], flow_shift: float) -> dict[str, float]:
    """Compute the numbers of a validation from its losses. Both domains have the same weight.

    Args:
        losses: {condition: (n, S)} of `PromptConditions` or `ControlConditions`.
        domains: "real" or "cg" for each of the n clips.
        flow_shift: shift of the noise levels, which appear in names.

    Returns:
        `loss`, `loss_<condition>`: with the right conditions and with each wrong one.
        `control_gain`, `prompt_gain`: loss with the wrong control or prompt − `loss`; 0 if the model ignores it.
        `loss_real`, `control_gain_real`, …: of one domain.
        `loss_sigma_0.30`, `control_gain_sigma_0.30`, …: at one noise level.
        `leak_augmented`, `leak_coarse`: of real clips, loss with this control − loss with their own.
        `leak_share_augmented`, `leak_share_coarse`: the leak divided by the control gain of the same clips. With 0
        only the layout of the control matters; with 1 this control is as useless as that of another clip. Absent if
        the control gain is too small.
    """
    groups = {domain: [i for i, d in enumerate(domains) if d == domain] for domain in ("real", "cg")}
    groups = {domain: rows for domain, rows in groups.items() if rows}
    levels = [f"{level:.2f}" for level in noise_levels(flow_shift).tolist()]

    right = losses["right"]
    mean = _mean_over_domains(right, groups)
    metrics = {"loss": mean.mean().item()}
    metrics |= {f"loss_{domain}": right[rows].double().mean().item() for domain, rows in groups.items()}
    for condition in ("other_control", "no_control", "other_prompt"):
        if condition in losses:
            metrics[f"loss_{condition}"] = _mean_over_domains(losses[condition], groups).mean().item()
    metrics |= {f"loss_sigma_{level}": value for level, value in zip(levels, mean.tolist())}
    for name, condition in GAINS.items():
        if condition in losses:
            gains = losses[condition].double() - right.double()
            mean = _mean_over_domains(gains, groups)
            metrics[name] = mean.mean().item()
            metrics |= {f"{name}_{domain}": gains[rows].mean().item() for domain, rows in groups.items()}
            metrics |= {f"{name}_sigma_{level}": value for level, value in zip(levels, mean.tolist())}
    for kind in ("augmented", "coarse"):
        if kind in losses:
            metrics |= _leak_metrics(losses, kind)
    return metrics


def loss_as_trained(
    losses: dict[str, torch.Tensor],
    domains: list[str],
    density: flow_matching.SigmaDensity,
    control_dropout: float = 0.0,
    cg_ratio: float = 0.0,
) -> float:
    """Estimate the expectation that `train/loss` has on the validation clips.

    `loss` is the mean over noise levels and domains, so that it does not depend on how a run weighs them. This number
    has the density and weight of the noise levels, the share of CG and the control dropout of training. It lacks the
    dropout of prompts, the augmentation of controls and the spread of the sampled latents about `latents_mean`; a run
    that averages its weights validates the average.

    Args:
        losses: {condition: (n, S)} of `PromptConditions` or `ControlConditions`, S levels of `noise_levels`.
        domains: "real" or "cg" for each of the n clips.
        density: of the noise levels of training.
        control_dropout: share of samples trained without control.
        cg_ratio: share of CG samples.
    """
    table = losses["right"].double()
    if "no_control" in losses:
        table = (1 - control_dropout) * table + control_dropout * losses["no_control"].double()
    by_clip = table @ flow_matching.level_weights(noise_levels(density.shift), density)  # (n,)
    shares = {"real": 1 - cg_ratio, "cg": cg_ratio}
    # One domain's share is divided among its clips, however many they are.
    weights = torch.tensor([shares[domain] / domains.count(domain) for domain in domains], dtype=torch.float64)
    return (by_clip @ weights / weights.sum()).item()


def _mean_over_domains(table, groups):
    """(n, S) -> (S,) fp64: the mean over the clips of each domain, then over the domains."""
    return sum(table[rows].double().mean(0) for rows in groups.values()) / len(groups)


def _leak_metrics(losses, kind):
    """Return the leak by one kind of altered control, "augmented" or "coarse"."""
    rows = (~losses[kind].isnan().any(1)).nonzero().flatten().tolist()
    own, altered, other = (losses[name][rows].double().mean().item() for name in ("right", kind, "other_control"))
    metrics = {f"leak_{kind}": altered - own}
    if other - own > MIN_RELATIVE_GAIN * own:
        metrics[f"leak_share_{kind}"] = (altered - own) / (other - own)
    return metrics


def leak_warning(metrics: dict[str, float], control_augmentation: float, projected: bool) -> str | None:
    """Return a line with advice if the leak by coarse versions is above LEAK_BOUND, else None.

    Args:
        metrics: see `validation_metrics`.
        control_augmentation: the run's.
        projected: whether its control has a projection.
    """
    leak = metrics.get("leak_share_coarse", 0.0)
    if leak <= LEAK_BOUND:
        return None
    advice = "consider --control_augmentation 0.5" if control_augmentation < 0.5 else "raise --control_augmentation"
    if not projected:
        advice += ", or --control_projection fit, which needs CG pairs, in another run that starts from these weights "
        advice += "(--resume_controlnet_from)"
    return f"leak {leak:.2f}: real clips follow the look of their own control rather than its layout; {advice}"
