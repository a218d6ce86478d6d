"""ClipDataset: cached latents, prompts and control features of clips, and frames decoded from their files."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate
from typing_extensions import TypedDict

from c2r.data.clips import Clip
from c2r.data.folders import read_frames
from c2r.data.settings import ClipSettings
from c2r.encoding.cache import (
    CLIP_TENSORS,
    CONTROL_TENSORS,
    PROMPT_TENSORS,
    CacheSettings,
    ControlSettings,
    clip_path,
    control_path,
    prompt_path,
)
from c2r.files import damaged_cache_error, load_tensors

DOMAINS = {"real": 0, "cg": 1}


class _PromptMetadata(TypedDict):
    """The part of a cached prompt's metadata that is read."""

    max_sequence_length: Annotated[int, Field(ge=1, le=512)]


class ClipDataset(Dataset):
    """Encoded clips of one or more datasets.

    Args:
        clips: `Clips` or a list, encoded by `encode_missing`.
        settings: the settings that the clips were encoded with.
        with_control: items also hold the control: the coarse video of a CG pair, a real clip's own video.
        control_settings: items hold the control's cached features (see `encode_control`) instead of its frames.

    An item is a dict. F, H and W are the frames, height and width of the clip's bucket; C, T, h and w the channels,
    frames, height and width of its latents; L the length to which prompts are padded:
        latents_mean, latents_logvar: (C, T, h, w) fp32, the distribution of the normalised latents.
        prompt_embeds: (L, D_text) fp32, zeros after the prompt's end.
        control_frames: (F, 3, H, W) uint8 RGB in [0, 255]; only with_control and without control_settings.
        control_features: (F, h, w, Dd), see `DINOv3FeatureExtractor`; only with_control and control_settings.
        domain: 0 for real, 1 for CG.
        name: the file's name and the window's number.
        index: the position in this dataset.
    A batch can only hold clips of one bucket.

    Raises:
        InputError: on access to an item that is not encoded or whose control cannot be decoded; it names the file.
    """

    collate = staticmethod(default_collate)

    def __init__(
        self,
        clips: Sequence[Clip],
        settings: ClipSettings,
        with_control: bool = False,
        control_settings: ControlSettings | None = None,
    ):
        self.clips = clips
        self.settings = settings
        self.with_control = with_control
        self.control_settings = control_settings
        self.cache_settings = CacheSettings.of(settings)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.clips[index]
        cache_dir = self.settings.cache_folder(clip.folder)
        path = clip_path(cache_dir, clip, self.cache_settings)
        tensors, _ = load_tensors(path, CLIP_TENSORS)
        mean, logvar, prompt_embeds = (tensors[name] for name in ("latents_mean", "latents_logvar", "prompt_embeds"))
        # A cache may come with a dataset.
        if (
            not all(tensor.is_floating_point() for tensor in tensors.values())
            or mean.shape[1:] != clip.bucket.latent_grid
            or logvar.shape != mean.shape
            or prompt_embeds.shape[1:] != self._empty_prompt[0].shape[1:]
        ):
            raise damaged_cache_error(path)
        item = {
            "latents_mean": mean.float(),
            "latents_logvar": logvar.float(),
            "prompt_embeds": self._padded(prompt_embeds.float()),
            "domain": DOMAINS[clip.domain],
            "name": f"{clip.name}#{clip.window}",
            "index": index,
        }
        if self.with_control and self.control_settings:
            path = control_path(cache_dir, clip, self.control_settings)
            tensors, _ = load_tensors(path, CONTROL_TENSORS)
            features = tensors["control_features"]
            if not features.is_floating_point() or features.ndim != 4 or len(features) != clip.bucket.num_frames:
                raise damaged_cache_error(path)
            item["control_features"] = features
        elif self.with_control:
            item["control_frames"] = self.control_frames(index)
        return item

    def target_frames(self, index: int) -> torch.Tensor:
        """Decode the frames of a clip that were encoded: (F, 3, H, W) uint8 RGB."""
        clip = self.clips[index]
        return read_frames(clip.target_file, clip, self.settings)

    def control_frames(self, index: int) -> torch.Tensor:
        """Decode the control of a clip: (F, 3, H, W) uint8 RGB."""
        clip = self.clips[index]
        return read_frames(clip.control_file, clip, self.settings)

    def coarse_frames(self, index: int) -> torch.Tensor:
        """Decode the coarse version of a clip that has one, real or CG: (F, 3, H, W) uint8 RGB."""
        clip = self.clips[index]
        return read_frames(clip.coarse_file, clip, self.settings)

    @property
    def empty_prompt_embeds(self) -> torch.Tensor:
        """(L, D_text) fp32 embeddings of the empty prompt, which replaces dropped prompts."""
        return self._padded(self._empty_prompt[0])

    @property
    def max_sequence_length(self) -> int:
        """Number of tokens L to which prompts are padded, as in WanPipeline."""
        return self._empty_prompt[1]

    @cached_property
    def _empty_prompt(self):
        cache_dir = self.settings.cache_folder(self.clips[0].folder)
        path = prompt_path(cache_dir, "", self.cache_settings)
        tensors, metadata = load_tensors(path, PROMPT_TENSORS, _PromptMetadata)
        embeds = tensors["prompt_embeds"]
        if embeds.ndim != 2 or not embeds.is_floating_point():
            raise damaged_cache_error(path)
        return embeds.float(), metadata["max_sequence_length"]

    def _padded(self, prompt_embeds):
        return F.pad(prompt_embeds, (0, 0, 0, self.max_sequence_length - len(prompt_embeds)))
