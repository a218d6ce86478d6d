"""What the cache lacks of a set of clips, and which process is to make it."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from c2r import InputError
from c2r.data.cache import (
    PROMPT_TENSORS,
    CacheSettings,
    CheckedClips,
    cache_folder,
    clip_key,
    clip_path,
    is_complete,
    prompt_path,
)
from c2r.models.parts import resolve_model_folder
from c2r.models.weights import existing_parent, read_json


@dataclass
class Missing:
    """What the cache lacks, of all processes."""

    count: int = 0  #: clips
    clips: list = field(default_factory=list)  #: (path, Clip) of those that this process is to make
    texts: dict = field(default_factory=dict)  #: {path: text}: captions, and the empty one
    room: dict = field(default_factory=dict)  #: {cache folder: bytes of the latents}
    damaged: int = 0  #: files that are there, but are not whole or not ours
    any_there: bool = False  #: whether the cache has any of the clips

    def require_room(self):
        """Raise InputError if a disk cannot hold the latents."""
        disks = {}  # datasets on one disk share its room
        for folder, needed in self.room.items():
            there = existing_parent(folder)
            disks.setdefault(there.stat().st_dev, []).append((there, needed))
        for parts in disks.values():
            folder, needed = parts[0][0], sum(needed for _, needed in parts)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise InputError(
                    f"{folder}: {needed / 1e9:.2f} GB needed for the latents of {self.count:,} clips, "
                    f"{free / 1e9:.2f} GB free; make room, or give a --cache_dir on another disk"
                )


def is_mine(path: Path, accelerator) -> bool:
    """Whether this process is to make a file of the cache.

    By the file's name: a process that looks a little later sees what others have made meanwhile, so of what is missing
    each would cut other shares.
    """
    return int(path.stem[:16], 16) % accelerator.num_processes == accelerator.process_index


def find_missing(clips, options, accelerator=None) -> Missing:
    """Look for what the cache lacks; see `encode_missing` for the arguments. Without an accelerator all is mine."""
    settings, found, seen, caches = CacheSettings.from_options(options), Missing(), set(), {}
    folder = resolve_model_folder(options.pretrained_model_name_or_path, ["vae"])
    channels = read_json(folder / "vae/config.json")["z_dim"]
    texts = {}
    for clip in clips:
        if clip.folder not in caches:
            caches[clip.folder] = CheckedClips(cache_folder(clip.folder, options))
            texts[prompt_path(caches[clip.folder].cache_dir, "", settings)] = ""
        checked, key = caches[clip.folder], clip_key(clip, settings)
        if (number := int(key[:16], 16)) in seen:
            continue
        seen.add(number)
        if checked.has(key):
            found.any_there = True
            continue
        path = clip_path(checked.cache_dir, clip, settings)
        found.count += 1
        if accelerator is None or is_mine(path, accelerator):
            found.clips.append((path, clip))
        found.damaged += path.exists()
        texts[prompt_path(checked.cache_dir, clip.text, settings)] = clip.text
        # fp32 mean and fp16 log-variance of each number.
        needed = 6 * channels * math.prod(clip.bucket.latent_grid)
        found.room[checked.cache_dir] = found.room.get(checked.cache_dir, 0) + needed
    for checked in caches.values():
        checked.save()
    found.texts = {path: text for path, text in texts.items() if not is_complete(path, PROMPT_TENSORS)}
    found.damaged += sum(path.exists() for path in found.texts)
    return found
