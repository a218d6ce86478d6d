"""The two encoders whose output is cached: the VAE makes latents, DINOv3 makes control features."""

from typing import Any, ClassVar, Protocol

import torch

from c2r.data.buckets import Bucket
from c2r.data.clips import Clip, DatasetFile
from c2r.data.settings import ClipSettings
from c2r.encoding.cache import (
    CLIP_TENSORS,
    CONTROL_TENSORS,
    PROMPT_TENSORS,
    CacheSettings,
    ControlSettings,
    prompt_path,
)
from c2r.files import load_tensors
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.parts import load_pipeline_part
from c2r.models.vae import encode_frames

Tensors = dict[str, torch.Tensor]

#: Values of `ClipSettings.vae_dtype`.
VAE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Encoder(Protocol):
    """The interface of both encoders, as the encoding pass uses it."""

    tensors: ClassVar[set[str]]  #: names of the tensors in each cache file
    model_name: str  #: folder or hub name

    @property
    def cache_settings(self) -> CacheSettings | ControlSettings:
        """Settings that the content of the cache files depends on."""

    @staticmethod
    def files_to_decode(clip: Clip) -> list[DatasetFile]:
        """Return the files of a clip that must be decodable; the frames of the last one are encoded."""

    @staticmethod
    def clips_at_once(bucket: Bucket) -> int:
        """Return the number of clips that are encoded in one batch."""

    def encode(self, frames: torch.Tensor) -> list[Tensors]:
        """Encode a batch of clips.

        Args:
            frames: (B, F, 3, H, W) uint8 RGB in [0, 255] on the encoder's device; B is at most `clips_at_once`.

        Returns:
            the tensors of each clip, by name.
        """

    def file_content(self, clip: Clip, encoded: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """Return all tensors of a clip's cache file, and metadata that names the file and text they come from."""


class LatentEncoder:
    """Encodes clips to the distributions of their latents; the cache files also hold the prompt embeddings.

    Args:
        settings: the base model, the VAE's dtype, and the cache that holds the prompt embeddings already.
        device: device to encode on.
    """

    tensors: ClassVar = CLIP_TENSORS

    def __init__(self, settings: ClipSettings, device: torch.device):
        self.settings = settings
        self.model_name = settings.base_model
        self.cache_settings = CacheSettings.of(settings)
        dtype = VAE_DTYPES[settings.vae_dtype]
        self._vae = load_pipeline_part(self.model_name, "vae", torch_dtype=dtype).to(device)

    @staticmethod
    def files_to_decode(clip: Clip) -> list[DatasetFile]:
        """Return the coarse file, if there is one, and the target file.

        The coarse file is decoded only to find one that fails here, rather than during training or validation.
        """
        return [clip.coarse_file, clip.target_file] if clip.coarse_file else [clip.target_file]

    @staticmethod
    def clips_at_once(bucket: Bucket) -> int:
        """Return a batch size, up to 8, that needs no more memory than one clip of 480×832; larger clips get 1.

        The VAE encodes four frames at a time.
        """
        return max(1, min(8, 4 * 480 * 832 // (min(4, bucket.num_frames) * bucket.height * bucket.width)))

    def encode(self, frames: torch.Tensor) -> list[Tensors]:
        """Encode a batch of clips, see `Encoder` and `encode_frames`.

        Each batch is filled up with black clips to `clips_at_once`: the last bits of a clip's latents depend on the
        size of its batch, but not on the other clips in it. So the cache depends neither on which clips were missing
        nor on the number of processes.
        """
        batch_size, num_frames, _, height, width = frames.shape
        bucket = Bucket(num_frames, height, width)
        black = frames.new_zeros(self.clips_at_once(bucket) - batch_size, *frames.shape[1:])
        means, logvars = encode_frames(self._vae, torch.cat([frames, black]))
        # The log-variance only scales added noise: half precision is enough.
        return [
            {"latents_mean": mean, "latents_logvar": logvar.half()}
            for mean, logvar in zip(means[:batch_size], logvars[:batch_size])
        ]

    def file_content(self, clip: Clip, encoded: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """Return the clip's latents and prompt embeddings, and the file and caption that they come from."""
        cache_dir = self.settings.cache_folder(clip.folder)
        prompt, _ = load_tensors(prompt_path(cache_dir, clip.text, self.cache_settings), PROMPT_TENSORS)
        return encoded | prompt, _file_identity(clip.target_file) | {"text": clip.text}


class ControlEncoder:
    """Encodes controls to DINOv3 features.

    Args:
        settings: the frame rate.
        dinov3: folder or hub name.
        device: device to encode on.
        dtype: dtype of DINOv3's weights and of the features.
    """

    tensors: ClassVar = CONTROL_TENSORS

    def __init__(self, settings: ClipSettings, dinov3: str, device: torch.device, dtype: torch.dtype):
        self.model_name = dinov3
        self.cache_settings = ControlSettings.of(settings, dinov3, dtype)
        self._dinov3 = DINOv3FeatureExtractor.from_pretrained(dinov3, torch_dtype=dtype).to(device)

    @staticmethod
    def files_to_decode(clip: Clip) -> list[DatasetFile]:
        """Return the control file."""
        return [clip.control_file]

    @staticmethod
    def clips_at_once(bucket: Bucket) -> int:
        """Return 1: DINOv3 batches the frames of a clip itself, always in the same way."""
        return 1

    def encode(self, frames: torch.Tensor) -> list[Tensors]:
        """Encode a batch of controls, see `Encoder`; features are (F, h, w, Dd)."""
        return [{"control_features": features} for features in self._dinov3(frames.float() / 255)]

    def file_content(self, clip: Clip, encoded: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """Return the features and the file that they were made from."""
        return encoded, _file_identity(clip.control_file)


def _file_identity(file: DatasetFile) -> dict[str, Any]:
    return {"file": file.name, "size": file.size, "mtime_ns": file.mtime_ns}
