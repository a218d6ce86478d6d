"""What the cache lacks of a set of clips, and which process is to make it."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from c2r import InputError
from c2r.data.clips import cache_folder
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
from c2r.files import existing_parent, is_complete, read_json
from c2r.models.hub import resolve_model_folder


def prompt_dtype():
    """What prompts are encoded and kept in."""
    return torch.bfloat16 if PartialState().device.type == "cuda" else torch.float32


@dataclass
class Missing:
    """What the cache lacks, of all processes."""

    kind: str  #: "latents" or "control features"
    total: int = 0  #: clips that were looked for
    count: int = 0  #: of these, the missing ones
    clips: list = field(default_factory=list)  #: (path, Clip) of those that this process is to make
    texts: dict = field(default_factory=dict)  #: {path: text}: captions, and the empty one
    room: dict = field(default_factory=dict)  #: {cache folder: bytes needed}
    damaged: int = 0  #: files that are there, but are not whole or not ours

    def add(self, cache_dir, path, clip, needed, accelerator):
        """Add a clip whose file of so many bytes is missing; without an accelerator it is this process's to make."""
        self.count += 1
        if accelerator is None or is_mine(path, accelerator):
            self.clips.append((path, clip))
        self.damaged += path.exists()
        self.room[cache_dir] = self.room.get(cache_dir, 0) + needed

    def require_room(self):
        """Raise InputError if a disk cannot hold it."""
        disks = {}  # datasets on one disk share its room
        for folder, needed in self.room.items():
            there = existing_parent(folder)
            disks.setdefault(there.stat().st_dev, []).append((there, needed))
        for parts in disks.values():
            folder, needed = parts[0][0], sum(needed for _, needed in parts)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise InputError(
                    f"{folder}: {needed / 1e9:.2f} GB needed for the {self.kind} of {self.count:,} clips, "
                    f"{free / 1e9:.2f} GB free; make room, or give a --cache_dir on another disk"
                )


def is_mine(path: Path, accelerator) -> bool:
    """Whether this process is to make a file of the cache.

    By the file's name: a process that looks a little later sees what others have made meanwhile, so of what is missing
    each would cut other shares.
    """
    return int(path.stem[:16], 16) % accelerator.num_processes == accelerator.process_index


def find_missing(clips, options, accelerator=None) -> Missing:
    """Look for latents and prompt embeddings that the cache lacks. The room for the latter is an estimate.

    Args:
        clips, options: see `encode_missing`.
        accelerator: whose share `clips` is to have; None: all.
    """
    settings, found, seen, caches = CacheSettings.from_options(options), Missing("latents"), set(), {}
    folder = resolve_model_folder(options.pretrained_model_name_or_path, ["vae", "text_encoder"])
    channels = read_json(folder / "vae/config.json")["z_dim"]
    text_dim = read_json(folder / "text_encoder/config.json")["d_model"]
    texts = {}

    def prompt_bytes(text):
        # About three bytes of text to a token, and no more than Wan takes. A clip's file repeats its prompt's.
        return min(512, 2 + len(text.encode()) // 3) * text_dim * prompt_dtype().itemsize

    for clip in clips:
        if clip.folder not in caches:
            caches[clip.folder] = CheckedClips(cache_folder(clip.folder, options))
            texts[prompt_path(caches[clip.folder].cache_dir, "", settings)] = ""
        checked, key = caches[clip.folder], clip_key(clip, settings)
        if (number := int(key[:16], 16)) in seen:
            continue
        seen.add(number)
        if checked.has(key):
            continue
        texts[prompt_path(checked.cache_dir, clip.text, settings)] = clip.text
        # fp32 mean and fp16 log-variance of each number.
        needed = 6 * channels * math.prod(clip.bucket.latent_grid) + prompt_bytes(clip.text)
        found.add(checked.cache_dir, clip_path(checked.cache_dir, clip, settings), clip, needed, accelerator)
    for checked in caches.values():
        checked.save()
    found.total = len(seen)
    found.texts = {path: text for path, text in texts.items() if not is_complete(path, PROMPT_TENSORS)}
    for path, text in found.texts.items():
        cache_dir = path.parents[2]
        found.room[cache_dir] = found.room.get(cache_dir, 0) + prompt_bytes(text)
        found.damaged += path.exists()
    return found


def find_missing_control(clips, options, dtype, accelerator=None) -> Missing:
    """Look for control features that the cache lacks.

    Args:
        clips, options, dtype: see `encode_control`.
        accelerator: whose share `clips` is to have; None: all.
    """
    settings, found, seen = ControlSettings.from_options(options, dtype), Missing("control features"), set()
    config = read_json(resolve_model_folder(options.dinov3) / "config.json")
    for clip in clips:
        cache_dir = cache_folder(clip.folder, options)
        path = control_path(cache_dir, clip, settings)
        if path not in seen and not is_complete(path, CONTROL_TENSORS):
            needed = config["hidden_size"] * dtype.itemsize * math.prod(clip.bucket) // config["patch_size"] ** 2
            found.add(cache_dir, path, clip, needed, accelerator)
        seen.add(path)
    found.total = len(seen)
    return found
