"""Validation: the loss on held-out clips under fixed noise, with the right conditions and with wrong ones.

Noise and noise levels belong to the clip, not to the step or the process: the numbers move only when the model does,
and two runs can be compared.
"""

from functools import partial
from itertools import chain

import torch
from torch.utils.data import DataLoader, Subset

from c2r import InputError, flow_matching
from c2r.encoding.dataset import ClipDataset
from c2r.training.augmentation import augment_control_frames
from c2r.training.seeds import seeded_generator

# Quantiles of the uniform density at which each clip is noised: the mid-points of four equal strata.
QUANTILES = (0.125, 0.375, 0.625, 0.875)

#: Above this leak by coarse versions a run is told of it: its real clips owe more of their control gain to the look
#: than to the layout. Not by altered frames: they are also harder to read, and on the toy do not tell a leak.
LEAK_BOUND = 0.5

#: A leak is a share of the control gain; below this share of the loss there is no gain that could be shared out.
LEAST_GAIN = 0.01

# So many clips of a dataset are looked through for another file or caption.
SPARE = 10_000

#: Each gain and the condition that it is measured against.
GAINS = {"control_gain": "other_control", "prompt_gain": "other_prompt"}


def choose_validation_clips(manifest, count):
    """Up to `count` held-out clips from as many files as possible: first windows before second ones.

    Raises:
        InputError: if the dataset holds none out.
    """
    if not manifest.held_out:
        raise InputError(
            f"{manifest.name}: no clip is left to validate on; add a second video, or a validation/ folder"
        )
    return list(manifest.held_out.first_windows(count))


def other_clips(clips, spare, differ="source"):
    """For each clip, one of the same domain whose `differ` is another one: whose control, or prompt, is the wrong one.

    With another clip's control the model must do worse, or it has not learned to follow the control: a real clip that
    is its own control can lower the loss by leaking its look alone.

    Args:
        clips: the validation clips.
        spare: sequences of clips to take from where `clips` has none that fits, such as all of the datasets'.
        differ: "source" or "text".

    Returns:
        list of clips, one for each of `clips`, of its domain and bucket; the clip itself where there is no other.
    """
    chosen = []
    for i, clip in enumerate(clips):
        candidates = chain(clips[i + 1 :], clips[:i], *(clips[:SPARE] for clips in spare))
        wanted = (
            c
            for c in candidates
            if (c.domain, c.bucket) == (clip.domain, clip.bucket) and getattr(c, differ) != getattr(clip, differ)
        )
        chosen.append(next(wanted, clip))
    return chosen


def noise_levels(flow_shift):
    """(S,) fp32: the noise level of each of QUANTILES."""
    return flow_matching.shift_sigmas(torch.tensor(QUANTILES), flow_shift)


@torch.no_grad()
def clip_losses(dataset, predictors_of, accelerator, flow_shift, batch_size=1, go_on=None):
    """Flow-matching loss of each clip at each noise level, under several conditions. Call it on every process.

    Args:
        dataset: a `ClipDataset`; its `latents_mean` is what is noised.
        predictors_of: `batch -> {condition: predict_velocity}`, called once for each collated batch of clips, so that
            prompts and control are made ready once; the conditions are always the same ones in the same order, or a
            sharded model's collectives would hang. `predict_velocity(noisy_latents, timesteps) -> velocity_pred`.
        accelerator: each process takes its share of the clips.
        flow_shift: shift of the noise levels.
        batch_size: clips in one forward pass.
        go_on: called before each batch; where it returns False, which it does on all processes alike, validation ends.

    Returns:
        {condition: (len(dataset), S) fp32 on CPU}, in the dataset's order and that of `noise_levels`, the same on
        every process; None if it was ended.

    Raises:
        InputError: a loss is not finite.
    """
    # Every process runs equally many batches, or a sharded model's collectives would hang: the last shares are filled
    # up with clips that another process counts.
    if len({clip.bucket for clip in dataset.clips}) > 1:
        batch_size = 1  # no two clips that cannot be stacked, and equally many batches on every process
    per_process = -(-len(dataset) // accelerator.num_processes)
    positions = [accelerator.process_index * per_process + i for i in range(per_process)]
    loader = DataLoader(
        Subset(dataset, [p % len(dataset) for p in positions]),
        batch_size=batch_size,
        collate_fn=dataset.collate,
        generator=torch.Generator(),  # or it would draw a seed for its workers from the global one
    )
    levels = noise_levels(flow_shift)
    losses = {}
    for first, batch in zip(range(0, per_process, batch_size), loader):
        if go_on is not None and not go_on():
            return None
        latents, predictors = batch["latents_mean"], predictors_of(batch)
        for column, (quantile, level) in enumerate(zip(QUANTILES, levels)):
            noise = torch.stack(
                [
                    torch.randn(clip.shape, generator=seeded_generator("validation", name, quantile))
                    for clip, name in zip(latents, batch["name"])
                ]
            )
            sigmas = level.repeat(len(latents))
            noisy_latents = flow_matching.add_noise(latents, noise, sigmas).to(accelerator.device)
            timesteps = flow_matching.timesteps_from_sigmas(sigmas).to(accelerator.device)
            target = flow_matching.velocity_target(latents, noise).to(accelerator.device)
            for condition, predict_velocity in predictors.items():
                table = losses.setdefault(
                    condition, torch.zeros(len(dataset), len(QUANTILES), device=accelerator.device)
                )
                batch_losses = flow_matching.velocity_loss(predict_velocity(noisy_latents, timesteps), target)  # (B,)
                for position, loss in zip(positions[first : first + batch_size], batch_losses):
                    if position < len(dataset):
                        table[position, column] = loss
    summed = accelerator.reduce(torch.stack([*losses.values()]), reduction="sum").cpu()  # (conditions, n, S)
    finite = summed.isfinite().all(-1).all(0)  # (n,)
    if not finite.all():
        bad = [dataset.clips[i] for i, good in enumerate(finite.tolist()) if not good]
        names = ", ".join(f"{clip.name}#{clip.window}" for clip in bad)
        raise InputError(
            f"the validation loss is not finite for {names}: their cached latents are damaged, or the model "
            "has diverged; delete the cache, or lower --learning_rate, and resume"
        )
    return dict(zip(losses, summed))


class ControlConditions:
    """Phase 2's held-out clips with their own conditions and with wrong ones.

    right            the clip's own control and prompt
    other_control    the control of another clip of its domain
    no_control       zero features, as control dropout trains them and guidance takes them for no control
    other_prompt     the prompt of another clip of its domain
    augmented        real clips: their own control in another look, see `augment_control_frames`
    coarse           real clips that have a coarse version: that one as control

    Args:
        clips: the validation clips.
        spare: see `other_clips`.
        args: the run's options.
    """

    def __init__(self, clips, spare, args):
        self.clips, self.args = clips, args
        self.other_prompt_clips = other_clips(clips, spare, "text")
        self.other_control = ClipDataset(other_clips(clips, spare), args)
        self.other_prompt = ClipDataset(self.other_prompt_clips, args)

    @property
    def to_encode(self):
        """The clips that must be in the cache."""
        return [*self.clips, *self.other_prompt_clips]

    def losses(self, model, control_features_of, accelerator, go_on=None):
        """`clip_losses` under every condition.

        Args:
            model: `C2RTransformer`, prepared, in eval mode.
            control_features_of: (B, F, 3, H, W) floats in [0, 1] on the device -> (B, F, h, w, Dd).
            accelerator, go_on: see `clip_losses`.

        Returns:
            {condition: (n, S)}, NaN in the rows of clips that have no such condition; None if it was ended.
        """
        device, args = accelerator.device, self.args

        def pixels(frames_of, batch):
            """(B, F, 3, H, W) in [0, 1] on the device."""
            return torch.stack([frames_of(int(i)) for i in batch["index"]]).to(device).float() / 255

        def predictor(prompt_embeds, control_frames=None, control_features=None):
            if control_features is None:
                control_features = control_features_of(control_frames)
            prompt_embeds = prompt_embeds.to(device)
            return lambda noisy, timesteps: model(
                noisy, timesteps, prompt_embeds, control_features, args.conditioning_scale
            )

        def all_conditions(dataset, batch):
            prompt_embeds = batch["prompt_embeds"]
            other_prompt = torch.stack([self.other_prompt[int(i)]["prompt_embeds"] for i in batch["index"]])
            right = control_features_of(pixels(dataset.control_frames, batch))
            return {
                "right": predictor(prompt_embeds, control_features=right),
                "other_control": predictor(prompt_embeds, pixels(self.other_control.control_frames, batch)),
                "no_control": predictor(prompt_embeds, control_features=torch.zeros_like(right)),
                "other_prompt": predictor(other_prompt, control_features=right),
            }

        def augmented(dataset, batch):
            frames = pixels(dataset.control_frames, batch)
            generators = [seeded_generator("augmentation", name) for name in batch["name"]]
            frames = [augment_control_frames(*pair, chance=1.0) for pair in zip(frames, generators)]
            return {"augmented": predictor(batch["prompt_embeds"], torch.stack(frames))}

        def coarse(dataset, batch):
            return {"coarse": predictor(batch["prompt_embeds"], pixels(dataset.coarse_frames, batch))}

        every = list(range(len(self.clips)))
        real = [i for i in every if self.clips[i].domain == "real"]
        with_coarse = [i for i in real if self.clips[i].coarse_source is not None]
        tables = {}
        for rows, conditions_of in ((every, all_conditions), (real, augmented), (with_coarse, coarse)):
            if not rows:
                continue
            dataset = ClipDataset([self.clips[i] for i in rows], args)
            predictors_of = partial(conditions_of, dataset)
            losses = clip_losses(dataset, predictors_of, accelerator, args.flow_shift, args.train_batch_size, go_on)
            if losses is None:
                return None
            for condition, table in losses.items():
                tables[condition] = torch.full((len(every), len(QUANTILES)), torch.nan)
                tables[condition][rows] = table
        return tables


def validation_metrics(losses, domains, flow_shift):
    """A validation's numbers from its losses.

    Args:
        losses: {condition: (n, S)}; has "right" and "other_prompt", in phase 2 all of `ControlConditions`.
        domains: n of "real" or "cg".
        flow_shift: shift of the noise levels, for their names.

    Returns:
        dict of floats. Each is the mean of the domains' means, so that no domain outweighs the other:
        `loss`, `loss_<condition>`: with the right conditions and with a wrong one.
        `control_gain`, `prompt_gain`: loss_other_… − loss; 0 means that this condition is ignored.
        `loss_real`, `control_gain_real`, …: of one domain.
        `loss_sigma_0.30`, `control_gain_sigma_0.30`, …: at one noise level.
        `leak_augmented`, `leak_coarse`: of real clips, loss with this control − loss with their own.
        `leak_share_augmented`, `leak_share_coarse`: that as a share of the same clips' control gain. 0: only the
        layout matters; 1: it serves no better than another clip's control. Absent where there is no gain to share.
    """
    groups = {domain: [i for i, d in enumerate(domains) if d == domain] for domain in ("real", "cg")}
    groups = {domain: rows for domain, rows in groups.items() if rows}

    def mean(table):
        return sum(table[rows].double().mean(0) for rows in groups.values()) / len(groups)  # (S,)

    right = losses["right"]
    metrics = {"loss": mean(right).mean().item()}
    metrics |= {f"loss_{domain}": right[rows].double().mean().item() for domain, rows in groups.items()}
    for condition in ("other_control", "no_control", "other_prompt"):
        if condition in losses:
            metrics[f"loss_{condition}"] = mean(losses[condition]).mean().item()
    levels = [f"{level:.2f}" for level in noise_levels(flow_shift).tolist()]
    metrics |= {f"loss_sigma_{level}": value for level, value in zip(levels, mean(right).tolist())}
    for name, condition in GAINS.items():
        if condition not in losses:
            continue
        gains = losses[condition].double() - right.double()
        metrics[name] = mean(gains).mean().item()
        metrics |= {f"{name}_{domain}": gains[rows].mean().item() for domain, rows in groups.items()}
        metrics |= {f"{name}_sigma_{level}": value for level, value in zip(levels, mean(gains).tolist())}
    for kind in ("augmented", "coarse"):
        if kind not in losses:
            continue
        rows = [i for i in range(len(domains)) if not losses[kind][i].isnan().any()]
        own, altered, other = (losses[name][rows].double().mean().item() for name in ("right", kind, "other_control"))
        metrics[f"leak_{kind}"] = altered - own
        if other - own > LEAST_GAIN * own:
            metrics[f"leak_share_{kind}"] = (altered - own) / (other - own)
    return metrics


def leak_warning(metrics, control_augmentation):
    """One line if the leak by coarse versions is above LEAK_BOUND, else None."""
    leak = metrics.get("leak_share_coarse", 0.0)
    if leak <= LEAK_BOUND:
        return None
    advice = "consider --control_augmentation 0.5" if control_augmentation < 0.5 else "raise --control_augmentation"
    return f"leak {leak:.2f}: real clips follow the look of their own control rather than its layout: {advice}"
