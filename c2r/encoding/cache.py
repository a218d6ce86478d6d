"""The cache of what frozen models give: one safetensors file per window, named by what it was made from.

    <cache>/clips/ab/abcd….safetensors     latents_mean, latents_logvar, prompt_embeds of one window
    <cache>/prompts/ef/efab….safetensors   prompt_embeds of one caption, and of the empty prompt
    <cache>/control/cd/cdef….safetensors   control_features of one window of a control, if asked for
    <cache>/failures/….json                a file that failed within: the manifest drops it, with this reason

Whatever changes the content changes the name, so nothing here is ever out of date; folders may be deleted at any time.
A failure that is the encoders' names their settings, and counts for these alone.
"""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load
from safetensors.numpy import save as save_arrays

from c2r.files import digest, is_complete, write_atomic
from c2r.models.hub import resolve_model_folder

MIB = 2**20

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".model"}

CLIP_TENSORS = {"latents_mean", "latents_logvar", "prompt_embeds"}

PROMPT_TENSORS = {"prompt_embeds"}

CONTROL_TENSORS = {"control_features"}


@cache
def encoder_fingerprint(folder: Path) -> str:
    """SHA-256 hex of a model folder: its configs and vocabularies whole, of each weight file name, size, first MiB and
    last MiB.

    Hashing all of the text encoder's 11 GB would take longer than to load it, at each start. A safetensors file begins
    with the names, shapes and places of its tensors, and retrained weights differ in every MiB.
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
            content.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return content.hexdigest()


@dataclass(frozen=True)
class CacheSettings:
    """What every cached clip of a command depends on: the rate and the encoders."""

    fps: float
    vae: str
    text_encoder: str

    @classmethod
    def from_options(cls, options) -> "CacheSettings":
        """From a command's options: fps, pretrained_model_name_or_path.

        Raises:
            InputError: no such model.
        """
        parts = ["vae", "text_encoder", "tokenizer"]
        folder = resolve_model_folder(options.pretrained_model_name_or_path, parts)
        vae, text_encoder, tokenizer = (encoder_fingerprint(folder / part) for part in parts)
        return cls(float(options.fps), vae, digest([text_encoder, tokenizer]))


@dataclass(frozen=True)
class ControlSettings:
    """What the cached features of every control of a command depend on: the rate, DINOv3 and its dtype."""

    fps: float
    dinov3: str
    dtype: str

    @classmethod
    def from_options(cls, options, dtype) -> "ControlSettings":
        """From a command's options: fps, dinov3; and the torch dtype of DINOv3's weights.

        Raises:
            InputError: no such model.
        """
        return cls(float(options.fps), encoder_fingerprint(resolve_model_folder(options.dinov3)), str(dtype))


def clip_key(clip, settings: CacheSettings) -> str:
    """SHA-256 hex of all that the latents and prompt embeddings of one window depend on."""
    source = (clip.name, clip.size, clip.mtime_ns, clip.start, *clip.bucket, clip.text)
    return hashlib.sha256(repr((source, settings)).encode()).hexdigest()


def clip_path(cache_dir, clip, settings: CacheSettings) -> Path:
    """Where the latents and prompt embeddings of one window are, or will be."""
    return Path(_clip_path(cache_dir, clip_key(clip, settings)))


def _clip_path(cache_dir, key):
    return f"{cache_dir}/clips/{key[:2]}/{key}.safetensors"


def control_path(cache_dir, clip, settings: ControlSettings) -> Path:
    """Where the features of one window of a clip's control are, or will be; clips with one control share them."""
    source = clip.control_source
    key = digest([source.name, source.size, source.mtime_ns, clip.start, *clip.bucket, vars(settings)])
    return Path(cache_dir) / "control" / key[:2] / f"{key}.safetensors"


class CheckedClips:
    """Which clips are in a cache, whole. What was looked into once is not opened again while it stays as it is.

    Args:
        cache_dir: the cache's; checked.safetensors in it has 16 bytes for each file that was found whole.
    """

    def __init__(self, cache_dir):
        self.cache_dir, self._store = cache_dir, Path(cache_dir) / "checked.safetensors"
        try:
            stored = load(self._store.read_bytes())["files"]
        except (OSError, SafetensorError, KeyError):
            stored = np.empty((0, 16), np.uint8)
        self._known = {file.tobytes() for file in stored}
        self._is_new = False

    def has(self, key) -> bool:
        """Whether the clip of this `clip_key` is there in its full length."""
        path = _clip_path(self.cache_dir, key)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return False
        file = hashlib.sha256(f"{key} {status.st_size} {status.st_mtime_ns}".encode()).digest()[:16]
        if file not in self._known:
            if not is_complete(path, CLIP_TENSORS):
                return False
            self._known.add(file)
            self._is_new = True
        return True

    def save(self):
        """Keep what was found."""
        if self._is_new:
            files = np.frombuffer(b"".join(sorted(self._known)), np.uint8).reshape(-1, 16)
            with suppress(OSError):  # then it is looked into again
                write_atomic(self._store, save_arrays({"files": files}))


def prompt_path(cache_dir, text, settings: CacheSettings) -> Path:
    """Where the embeddings of one caption are, or will be; the empty one serves prompt dropout."""
    key = digest([text, settings.text_encoder])
    return Path(cache_dir) / "prompts" / key[:2] / f"{key}.safetensors"
