"""ClipDataset: what a training step needs of a clip, from the cache, and control frames from the video itself."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from c2r.data.clips import Clip, cache_folder
from c2r.data.folders import read_source
from c2r.encoding.cache import CacheSettings, clip_path, control_path, prompt_path
from c2r.files import load_tensors

DOMAINS = {"real": 0, "cg": 1}


class ClipDataset(Dataset):
    """Encoded clips (see `c2r.encode`), of one dataset or of several.

    Args:
        clips: sequence of `Clip`: `Clips` or a list.
        options: has fps, pretrained_model_name_or_path, and perhaps cache_dir; the same as at encoding.
        with_control: also give the control: the coarse video of a CG pair, a real clip's own video.
        control_settings: `ControlSettings`: give the control's cached features (see `encode_control`), not its frames.

    An item is a dict; F, H, W are the clip's bucket, C, T, h, w the latents' channels, frames, height and width, L and
    D_text the length that the prompt is padded to and the text encoder's width:
        latents_mean, latents_logvar: (C, T, h, w) fp32, the distribution of the normalised latents.
        prompt_embeds: (L, D_text) fp32, zeros behind the prompt's end.
        control_frames: (F, 3, H, W) uint8 RGB in [0, 255]; only with_control, without control_settings.
        control_features: (F, h, w, Dd), see `DINOv3FeatureExtractor`; only with_control and control_settings.
        domain: 0 real, 1 CG.
        name: the clip's file and window.
        index: its place in this dataset.
    Only clips of one bucket can be collated.

    Raises:
        InputError: from an item: not encoded, or a video that cannot be decoded; it names the file.
    """

    collate = staticmethod(default_collate)

    def __init__(self, clips: Sequence[Clip], options, with_control=False, control_settings=None):
        self.clips = clips
        self.with_control, self.control_settings = with_control, control_settings
        self.options = options
        self.settings = CacheSettings.from_options(options)

    def __len__(self):
        return len(self.clips)

    @cached_property
    def _empty_prompt(self):
        clip = self.clips[0]
        tensors, metadata = load_tensors(prompt_path(cache_folder(clip.folder, self.options), "", self.settings))
        return tensors["prompt_embeds"].float(), metadata["max_sequence_length"]

    @property
    def max_sequence_length(self) -> int:
        """L: what prompts are padded to, as in WanPipeline."""
        return self._empty_prompt[1]

    @property
    def empty_prompt_embeds(self) -> torch.Tensor:
        """(L, D_text) fp32: what a dropped prompt is replaced by."""
        return self._padded(self._empty_prompt[0])

    def _padded(self, prompt_embeds):
        return F.pad(prompt_embeds, (0, 0, 0, self.max_sequence_length - len(prompt_embeds)))

    def source_frames(self, index) -> torch.Tensor:
        """(F, 3, H, W) uint8 RGB: what was encoded."""
        clip = self.clips[index]
        return read_source(clip.source, clip, self.options)

    def control_frames(self, index) -> torch.Tensor:
        """(F, 3, H, W) uint8 RGB: the control of one clip."""
        clip = self.clips[index]
        return read_source(clip.control_source, clip, self.options)

    def coarse_frames(self, index) -> torch.Tensor:
        """(F, 3, H, W) uint8 RGB: the coarse version of a clip that has one, real clips included."""
        clip = self.clips[index]
        return read_source(clip.coarse_source, clip, self.options)

    def __getitem__(self, index):
        clip = self.clips[index]
        tensors, _ = load_tensors(clip_path(cache_folder(clip.folder, self.options), clip, self.settings))
        item = {
            "latents_mean": tensors["latents_mean"].float(),
            "latents_logvar": tensors["latents_logvar"].float(),
            "prompt_embeds": self._padded(tensors["prompt_embeds"].float()),
            "domain": DOMAINS[clip.domain],
            "name": f"{clip.name}#{clip.window}",
            "index": index,
        }
        if self.with_control and self.control_settings:
            path = control_path(cache_folder(clip.folder, self.options), clip, self.control_settings)
            item["control_features"] = load_tensors(path)[0]["control_features"]
        elif self.with_control:
            item["control_frames"] = self.control_frames(index)
        return item
