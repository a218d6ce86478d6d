"""The cache: outputs of the frozen encoders, one safetensors file per clip, prompt or control.

    <cache>/clips/ab/abcd….safetensors     latents_mean, latents_logvar and prompt_embeds of one clip
    <cache>/prompts/ef/efab….safetensors   prompt_embeds of one caption, or of the empty prompt
    <cache>/control/cd/cdef….safetensors   control_features of one clip's control, if asked for
    <cache>/failures/….json                why a file could not be encoded; `read_manifest` then drops it

A file's name is a hash of everything that its content depends on, so no file is ever out of date, and any folder may
be deleted at any time. A failure note that names the encoders applies to these encoders only.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load
from safetensors.numpy import save as save_arrays

from c2r.data.clips import Clip
from c2r.data.settings import ClipSettings
from c2r.data.video_info import PIXELS_VERSION
from c2r.files import digest, is_complete, write_atomic
from c2r.models.hub import resolve_model_folder

MIB = 2**20

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".model"}

CLIP_TENSORS = {"latents_mean", "latents_logvar", "prompt_embeds"}

PROMPT_TENSORS = {"prompt_embeds"}

CONTROL_TENSORS = {"control_features"}


@cache
def encoder_fingerprint(folder: Path) -> str:
    """Return a SHA-256 in hex of a model folder.

    It covers configs and vocabularies completely, and the name, size, first MiB and last MiB of each weight file: to
    hash all 11 GB of the text encoder at each start would take longer than to load it. A safetensors file begins with
    the names, shapes and offsets of its tensors, and retrained weights differ in every MiB.
    """
    content = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_SUFFIXES:
            size = path.stat().st_size
            content.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                content.update(file.read(MIB))
                file.seek(max(0, size - MIB))
                content.update(file.read(MIB))
        elif path.suffix in (".json", ".txt"):
            content.update(f"{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while part := file.read(MIB):
                    content.update(part)
    return content.hexdigest()


# The names, fields and field order of the next two classes are hashed into the names of cache files.


@dataclass(frozen=True)
class CacheSettings:
    """The frame rate and encoders that every cached clip of a command depends on; encoders as fingerprints."""

    fps: float
    vae: str  #: with its dtype, unless that is fp32
    text_encoder: str
    pixels: int = PIXELS_VERSION

    @classmethod
    def of(cls, settings: ClipSettings) -> "CacheSettings":
        """Fingerprint the encoders of the base model.

        Raises:
            InputError: there is no such model.
        """
        parts = ["vae", "text_encoder", "tokenizer"]
        folder = resolve_model_folder(settings.base_model, parts)
        vae, text_encoder, tokenizer = (encoder_fingerprint(folder / part) for part in parts)
        if settings.vae_dtype != "fp32":  # files from before there was a choice keep their names
            vae = f"{vae} {settings.vae_dtype}"
        return cls(float(settings.fps), vae, digest([text_encoder, tokenizer]))


@dataclass(frozen=True)
class ControlSettings:
    """The frame rate, DINOv3 (as a fingerprint) and its dtype that all cached control features depend on."""

    fps: float
    dinov3: str
    dtype: str
    pixels: int = PIXELS_VERSION

    @classmethod
    def of(cls, settings: ClipSettings, dinov3: str, dtype: torch.dtype) -> "ControlSettings":
        """Fingerprint DINOv3, given as a folder or hub name, with weights of this dtype.

        Raises:
            InputError: there is no such model.
        """
        return cls(float(settings.fps), encoder_fingerprint(resolve_model_folder(dinov3)), str(dtype))


def current_encoders(settings: ClipSettings) -> Callable[[], dict[str, Any]]:
    """Return a function that gives the `CacheSettings` as a dict, for `read_manifest`, which rarely needs them."""
    return lambda: asdict(CacheSettings.of(settings))


def clip_key(clip: Clip, settings: CacheSettings) -> str:
    """Return a SHA-256 in hex of everything that a clip's latents and prompt embeddings depend on."""
    content = (clip.name, clip.size, clip.mtime_ns, clip.start, *clip.bucket, clip.text)
    return hashlib.sha256(repr((content, settings)).encode()).hexdigest()


def clip_path(cache_dir: str | Path, clip: Clip, settings: CacheSettings) -> Path:
    """Return the path of a clip's latents and prompt embeddings; the file need not exist."""
    return Path(_clip_path(cache_dir, clip_key(clip, settings)))


def _clip_path(cache_dir, key):
    return f"{cache_dir}/clips/{key[:2]}/{key}.safetensors"


def control_path(cache_dir: str | Path, clip: Clip, settings: ControlSettings) -> Path:
    """Return the path of a clip's control features, which clips with the same control share; it need not exist."""
    file = clip.control_file
    key = digest([file.name, file.size, file.mtime_ns, clip.start, *clip.bucket, vars(settings)])
    return Path(cache_dir) / "control" / key[:2] / f"{key}.safetensors"


def prompt_path(cache_dir: str | Path, text: str, settings: CacheSettings) -> Path:
    """Return the path of a caption's embeddings, or of the empty prompt's; the file need not exist."""
    key = digest([text, settings.text_encoder])
    return Path(cache_dir) / "prompts" / key[:2] / f"{key}.safetensors"


class CheckedClips:
    """Remembers which clip files of a cache were found complete, so that they are opened again only if they change.

    Args:
        cache_dir: the cache folder. Its file checked.safetensors holds 16 bytes for each complete file.
    """

    def __init__(self, cache_dir: Path):
        self.cache_dir = cache_dir
        self._store = cache_dir / "checked.safetensors"
        stored = np.empty((0, 16), np.uint8)
        with suppress(OSError, SafetensorError, KeyError):  # without it the files are checked again
            files = load(self._store.read_bytes())["files"]
            if files.dtype == np.uint8 and files.shape[1:] == (16,):
                stored = files
        self._complete = {file.tobytes() for file in stored}
        self._changed = False

    def has(self, key: str) -> bool:
        """Return True if the cache holds a complete file for this `clip_key`."""
        path = _clip_path(self.cache_dir, key)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return False
        file = hashlib.sha256(f"{key} {status.st_size} {status.st_mtime_ns}".encode()).digest()[:16]
        if file not in self._complete:
            if not is_complete(path, CLIP_TENSORS):
                return False
            self._complete.add(file)
            self._changed = True
        return True

    def save(self) -> None:
        """Write newly checked files to checked.safetensors."""
        if self._changed:
            files = np.frombuffer(b"".join(sorted(self._complete)), np.uint8).reshape(-1, 16)
            with suppress(OSError):  # the files are then checked again next time
                write_atomic(self._store, save_arrays({"files": files}))
