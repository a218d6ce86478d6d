"""Held-out clips with their own conditions and with wrong ones.

With a wrong condition the loss must rise, otherwise the model ignores the condition. The loss alone does not show
this: in phase 2 a real clip is its own control, and the model can lower the loss by copying its look.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from c2r import InputError
from c2r.data.clips import Clip
from c2r.data.manifest import clips_fingerprint
from c2r.data.mixture import Mixture
from c2r.data.settings import ClipSettings
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.validation import QUANTILES, VelocityPredictor, clip_losses
from c2r.files import digest
from c2r.training.augmentation import augment_control_frames
from c2r.training.seeds import seeded_generator

#: Largest number of clips of a mixture that are searched for another file or text.
MAX_SEARCHED = 10_000


def choose_validation_clips(mixture: Mixture, count: int) -> list[Clip]:
    """Return up to `count` held-out clips from as many files as possible.

    Raises:
        InputError: no clip is held out.
    """
    if not mixture.held_out:
        raise InputError(
            f"{mixture.name}: no clip is left to validate on; add a second video, or a validation/ folder"
        )
    return list(mixture.held_out.first_windows(count))


def other_clips(
    clips: Sequence[Clip], spare: Sequence[Sequence[Clip]], differ: Literal["file", "text"] = "file"
) -> list[Clip]:
    """Choose for each clip another one, whose control or prompt is the wrong one for it.

    Args:
        clips: the validation clips, which are searched first.
        spare: sequences of clips that are searched next, such as all clips of each mixture.
        differ: the entry in which the other clip must differ, its file or its text.

    Returns:
        list of clips, one for each of `clips`, of its domain and bucket; the clip itself if no other one is found.
    """
    chosen = []
    for position, clip in enumerate(clips):
        searched = chain(clips[position + 1 :], clips[:position], *(group[:MAX_SEARCHED] for group in spare))
        chosen.append(next((other for other in searched if _can_replace(clip, other, differ)), clip))
    return chosen


def _can_replace(clip, other, differ):
    """Return True if another clip has the domain and bucket of a clip, but another file or text."""
    if (other.domain, other.bucket) != (clip.domain, clip.bucket):
        return False
    return other.text != clip.text if differ == "text" else other.target_file != clip.target_file


class _HeldOutClips:
    """The validation clips, each with another clip whose prompt is wrong for it.

    Args:
        clips: the validation clips.
        spare: see `other_clips`.
        settings: the settings that the clips are cut and encoded with.
        flow_shift: shift of the noise levels.
        batch_size: clips in one forward pass.
    """

    def __init__(
        self,
        clips: list[Clip],
        spare: Sequence[Sequence[Clip]],
        settings: ClipSettings,
        *,
        flow_shift: float,
        batch_size: int,
    ):
        self.clips, self.settings = clips, settings
        self.flow_shift, self.batch_size = flow_shift, batch_size
        self.other_prompt_clips = other_clips(clips, spare, "text")
        self.other_prompt = ClipDataset(self.other_prompt_clips, settings)

    @property
    def to_encode(self) -> list[Clip]:
        """The clips that must be in the cache. The clips of wrong controls need not be: their videos are decoded."""
        return [*self.clips, *self.other_prompt_clips]

    @property
    def domains(self) -> list[str]:
        """The domain of each validation clip, "real" or "cg"."""
        return [clip.domain for clip in self.clips]


class PromptConditions(_HeldOutClips):
    """The held-out clips of phase 1 with their own prompt and with a wrong one.

    right            the clip's own prompt
    other_prompt     the prompt of another clip of its domain

    Its arguments are those of `_HeldOutClips`: clips, spare, settings, flow_shift and batch_size.
    """

    @property
    def setting(self) -> str:
        """Fingerprint of all that the numbers depend on besides the model."""
        return digest([clips_fingerprint(self.to_encode), self.flow_shift])

    def losses(
        self, model: nn.Module, accelerator: Accelerator, go_on: Callable[[], bool] | None = None
    ) -> dict[str, torch.Tensor] | None:
        """Compute `clip_losses` under both conditions.

        Args:
            model: `WanTransformer3DModel`, prepared, in eval mode.
            accelerator, go_on: see `clip_losses`.

        Returns:
            {condition: (n, S)}; None if `go_on` ended the validation.
        """
        predictors_of = partial(self._predictors, model, accelerator.device)
        dataset = ClipDataset(self.clips, self.settings)
        return clip_losses(dataset, predictors_of, accelerator, self.flow_shift, self.batch_size, go_on)

    def _predictors(self, model, device, batch) -> dict[str, VelocityPredictor]:
        prompts = {"right": batch["prompt_embeds"], "other_prompt": _prompt_embeds(self.other_prompt, batch)}
        return {name: partial(_predict, model, (embeds.to(device),)) for name, embeds in prompts.items()}


class ControlConditions(_HeldOutClips):
    """The held-out clips of phase 2 with their own control and prompt and with wrong ones.

    right            the clip's own control and prompt
    other_control    the control of another clip of its domain
    no_control       zero features, as control dropout trains them and guidance uses them
    other_prompt     the prompt of another clip of its domain
    augmented        real clips: their own control with another look, see `augment_control_frames`
    coarse           real clips that have a coarse version: that version as control

    Args:
        clips: the validation clips.
        spare: see `other_clips`.
        settings: the settings that the clips are cut and encoded with.
        flow_shift: shift of the noise levels.
        batch_size: clips in one forward pass.
        conditioning_scale: factor of the control residuals.
    """

    def __init__(
        self,
        clips: list[Clip],
        spare: Sequence[Sequence[Clip]],
        settings: ClipSettings,
        *,
        flow_shift: float,
        batch_size: int,
        conditioning_scale: float,
    ):
        super().__init__(clips, spare, settings, flow_shift=flow_shift, batch_size=batch_size)
        self.conditioning_scale = conditioning_scale
        self.other_control = ClipDataset(other_clips(clips, spare, "file"), settings)

    @property
    def setting(self) -> str:
        """Fingerprint of all that the numbers depend on besides the model."""
        clips = [clips_fingerprint(clips) for clips in (self.to_encode, self.other_control.clips)]
        return digest([*clips, self.flow_shift, self.conditioning_scale])

    def losses(
        self,
        model: nn.Module,
        control_features_of: Callable[[torch.Tensor], torch.Tensor],
        accelerator: Accelerator,
        go_on: Callable[[], bool] | None = None,
    ) -> dict[str, torch.Tensor] | None:
        """Compute `clip_losses` under every condition.

        Args:
            model: `C2RTransformer`, or one with an adversary, prepared, in eval mode.
            control_features_of: (B, F, 3, H, W) floats in [0, 1] on the device -> (B, F, h, w, Dd).
            accelerator, go_on: see `clip_losses`.

        Returns:
            {condition: (n, S)}, NaN in the rows of clips without this condition; None if `go_on` ended the validation.
        """
        branch = _ControlBranch(model, control_features_of, self.conditioning_scale, accelerator.device)
        every = list(range(len(self.clips)))
        real = [i for i in every if self.clips[i].domain == "real"]
        with_coarse = [i for i in real if self.clips[i].coarse_file is not None]
        passes = ((every, self._own_and_wrong), (real, self._augmented), (with_coarse, self._coarse))
        tables = {}
        for rows, predictors_of in passes:
            if not rows:
                continue
            dataset = ClipDataset([self.clips[i] for i in rows], self.settings)
            losses = clip_losses(
                dataset, partial(predictors_of, branch, dataset), accelerator, self.flow_shift, self.batch_size, go_on
            )
            if losses is None:
                return None
            for condition, table in losses.items():
                tables[condition] = torch.full((len(every), len(QUANTILES)), torch.nan)
                tables[condition][rows] = table
        return tables

    def _own_and_wrong(self, branch, dataset, batch) -> dict[str, VelocityPredictor]:
        own_prompt, other_prompt = batch["prompt_embeds"], _prompt_embeds(self.other_prompt, batch)
        own_control = branch.features(branch.frames(dataset.control_frames, batch))
        other_control = branch.features(branch.frames(self.other_control.control_frames, batch))
        return {
            "right": branch.predictor(own_prompt, own_control),
            "other_control": branch.predictor(own_prompt, other_control),
            "no_control": branch.predictor(own_prompt, torch.zeros_like(own_control)),
            "other_prompt": branch.predictor(other_prompt, own_control),
        }

    def _augmented(self, branch, dataset, batch) -> dict[str, VelocityPredictor]:
        generators = [seeded_generator("augmentation", name) for name in batch["name"]]
        clips = zip(branch.frames(dataset.control_frames, batch), generators)
        altered = torch.stack([augment_control_frames(frames, own, chance=1.0) for frames, own in clips])
        return {"augmented": branch.predictor(batch["prompt_embeds"], branch.features(altered))}

    def _coarse(self, branch, dataset, batch) -> dict[str, VelocityPredictor]:
        control = branch.features(branch.frames(dataset.coarse_frames, batch))
        return {"coarse": branch.predictor(batch["prompt_embeds"], control)}


@dataclass(frozen=True)
class _ControlBranch:
    """The model and the encoder of its control during one validation."""

    model: nn.Module
    features: Callable[[torch.Tensor], torch.Tensor]  # (B, F, 3, H, W) in [0, 1] -> (B, F, h, w, Dd)
    conditioning_scale: float
    device: torch.device

    def frames(self, frames_of, batch):
        """Return what `frames_of` reads for each clip of a batch, (B, F, 3, H, W) in [0, 1] on the device."""
        return torch.stack([frames_of(i) for i in _positions(batch)]).to(self.device).float() / 255

    def predictor(self, prompt_embeds, control_features) -> VelocityPredictor:
        conditions = (prompt_embeds.to(self.device), control_features, self.conditioning_scale)
        return partial(_predict, self.model, conditions)


def _predict(model, conditions, noisy_latents, timesteps):
    return model(noisy_latents, timesteps, *conditions).sample


def _prompt_embeds(dataset, batch):
    """Return the prompts of another dataset for the clips of a batch, (B, L, D_text)."""
    return torch.stack([dataset[i]["prompt_embeds"] for i in _positions(batch)])


def _positions(batch) -> Iterator[int]:
    return map(int, batch["index"])
