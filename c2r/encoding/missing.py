"""Find clips that are not cached and assign them to processes."""

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState

from c2r import InputError
from c2r.data.clips import Clip
from c2r.data.settings import ClipSettings
from c2r.encoding.cache import (
    CONTROL_TENSORS,
    PROMPT_TENSORS,
    CacheSettings,
    CheckedClips,
    ControlSettings,
    clip_key,
    clip_path,
    control_path,
    prompt_path,
)
from c2r.files import existing_parent, is_complete
from c2r.models.dinov3 import read_dinov3_config
from c2r.models.hub import resolve_model_folder
from c2r.models.parts import read_text_encoder_config, read_vae_config

#: The two kinds of cached files.
LATENTS, CONTROL_FEATURES = "latents", "control features"


def prompt_dtype() -> torch.dtype:
    """Return the dtype in which prompts are encoded and cached on this device."""
    return torch.bfloat16 if PartialState().device.type == "cuda" else torch.float32


class MissingClip(NamedTuple):
    """A clip to encode, and the path of its cache file."""

    path: Path
    clip: Clip


@dataclass
class MissingFiles:
    """The cache files that a set of clips needs and that do not exist yet, counted over all processes."""

    kind: str  #: LATENTS or CONTROL_FEATURES
    total: int = 0  #: different clips in the set
    count: int = 0  #: clips of the set that are not cached
    clips: list[MissingClip] = field(default_factory=list)  #: the share of this process
    prompts: dict[Path, str] = field(default_factory=dict)  #: {path of the cache file: caption, or ""}
    bytes_needed: dict[Path, int] = field(default_factory=dict)  #: {cache folder: size of its missing files}
    damaged: int = 0  #: missing because an existing file is incomplete

    def add(self, cache_dir: Path, missing: MissingClip, size: int, accelerator: Accelerator | None) -> None:
        """Add a clip whose cache file has `size` bytes; without an accelerator this process gets all clips."""
        self.count += 1
        if accelerator is None or is_mine(missing.path, accelerator):
            self.clips.append(missing)
        self.damaged += missing.path.exists()
        self.bytes_needed[cache_dir] = self.bytes_needed.get(cache_dir, 0) + size

    def add_prompt(self, path: Path, text: str, size: int) -> None:
        """Add a caption whose cache file has `size` bytes."""
        cache_dir = path.parents[2]
        self.prompts[path] = text
        self.damaged += path.exists()
        self.bytes_needed[cache_dir] = self.bytes_needed.get(cache_dir, 0) + size

    def require_room(self) -> None:
        """Raise InputError if a disk has too little room for the missing files."""
        folders: dict[Path, int] = {}
        disks: dict[int, Path] = {}  # cache folders on one disk share its room
        for cache_dir, size in self.bytes_needed.items():
            folder = existing_parent(cache_dir)
            folder = disks.setdefault(folder.stat().st_dev, folder)
            folders[folder] = folders.get(folder, 0) + size
        for folder, needed in folders.items():
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise InputError(
                    f"{folder}: {needed / 1e9:.2f} GB needed for the {self.kind} of {self.count:,} clips, "
                    f"{free / 1e9:.2f} GB free; make room, or give a --cache_dir on another disk"
                )


def is_mine(path: Path, accelerator: Accelerator) -> bool:
    """Return True if this process makes this cache file.

    Its name decides, not its position among the missing files: processes that look at different times, while other
    processes already write, see different lists.
    """
    return int(path.stem[:16], 16) % accelerator.num_processes == accelerator.process_index


def find_missing(
    clips: Iterable[Clip], settings: ClipSettings, accelerator: Accelerator | None = None
) -> MissingFiles:
    """Find the latents and prompt embeddings that are not cached; the size of the embeddings is an estimate.

    Args:
        clips: the same on every process.
        settings: the encoders and the cache.
        accelerator: gives the share of this process in `MissingFiles.clips`; None: all clips.

    Raises:
        InputError: there is no such base model.
    """
    cache_settings = CacheSettings.of(settings)
    folder = resolve_model_folder(settings.base_model, ["vae", "text_encoder"])
    channels = read_vae_config(folder / "vae")["z_dim"]
    text_dim = read_text_encoder_config(folder / "text_encoder")["d_model"]

    missing = MissingFiles(LATENTS)
    checked_clips: dict[str, CheckedClips] = {}  # by the dataset's folder
    prompts: dict[Path, str] = {}
    seen: set[int] = set()
    for clip in clips:
        if clip.folder not in checked_clips:
            checked_clips[clip.folder] = CheckedClips(settings.cache_folder(clip.folder))
            prompts[prompt_path(checked_clips[clip.folder].cache_dir, "", cache_settings)] = ""
        checked = checked_clips[clip.folder]
        key = clip_key(clip, cache_settings)
        number = int(key[:16], 16)  # a set of a million numbers is much smaller than one of keys
        if number in seen:
            continue
        seen.add(number)
        if checked.has(key):
            continue
        prompts[prompt_path(checked.cache_dir, clip.text, cache_settings)] = clip.text
        latent_bytes = (4 + 2) * channels * math.prod(clip.bucket.latent_grid)  # fp32 mean, fp16 log-variance
        size = latent_bytes + _prompt_bytes(clip.text, text_dim)  # a clip's file repeats its prompt
        path = clip_path(checked.cache_dir, clip, cache_settings)
        missing.add(checked.cache_dir, MissingClip(path, clip), size, accelerator)
    for checked in checked_clips.values():
        checked.save()
    missing.total = len(seen)
    for path, text in prompts.items():
        if not is_complete(path, PROMPT_TENSORS):
            missing.add_prompt(path, text, _prompt_bytes(text, text_dim))
    return missing


def _prompt_bytes(text, text_dim):
    """Estimate the size of a caption's embeddings: three bytes of text per token, at most Wan's 512 tokens."""
    return min(512, 2 + len(text.encode()) // 3) * text_dim * prompt_dtype().itemsize


def find_missing_control(
    clips: Iterable[Clip],
    settings: ClipSettings,
    dinov3: str,
    dtype: torch.dtype,
    accelerator: Accelerator | None = None,
) -> MissingFiles:
    """Find the control features that are not cached.

    Args:
        clips, settings, accelerator: see `find_missing`.
        dinov3: folder or hub name.
        dtype: dtype of DINOv3's weights and of the features.

    Raises:
        InputError: there is no such DINOv3.
    """
    control_settings = ControlSettings.of(settings, dinov3, dtype)
    config = read_dinov3_config(resolve_model_folder(dinov3))
    missing = MissingFiles(CONTROL_FEATURES)
    seen: set[Path] = set()
    for clip in clips:
        cache_dir = settings.cache_folder(clip.folder)
        path = control_path(cache_dir, clip, control_settings)
        if path not in seen and not is_complete(path, CONTROL_TENSORS):
            size = config["hidden_size"] * dtype.itemsize * math.prod(clip.bucket) // config["patch_size"] ** 2
            missing.add(cache_dir, MissingClip(path, clip), size, accelerator)
        seen.add(path)
    missing.total = len(seen)
    return missing
