"""What turns a window's pixels into what the cache holds of it: the VAE its latents, DINOv3 its control features.

Both have the same face, for the pass in `c2r.encode`.
"""

import torch

from c2r.data.buckets import Bucket
from c2r.data.clips import cache_folder
from c2r.encoding.cache import CLIP_TENSORS, CONTROL_TENSORS, CacheSettings, ControlSettings, prompt_path
from c2r.files import load_tensors
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.parts import load_pipeline_part
from c2r.models.vae import encode_frames


class LatentEncoder:
    """The distributions of latents, by the VAE; a clip's prompt embeddings go into its file too.

    Args:
        options: has fps, pretrained_model_name_or_path, and perhaps cache_dir, where the prompts have been encoded.
        device: to encode on.
    """

    tensors = CLIP_TENSORS

    def __init__(self, options, device):
        self.options, self.settings = options, CacheSettings.from_options(options)
        self.model_name = options.pretrained_model_name_or_path
        # fp32, as the pipeline decodes: in bf16 the latents lose more than the source's 8 bits.
        self._vae = load_pipeline_part(self.model_name, "vae", torch_dtype=torch.float32).to(device)

    @staticmethod
    def sources(clip):
        """The files to decode; the last one is encoded.

        The coarse video is not, but a pair whose control fails must not be found out in the midst of training, nor a
        real clip whose coarse version does in the midst of validation.
        """
        return [source for source in (clip.coarse_source, clip.source) if source]

    @staticmethod
    def clips_at_once(bucket) -> int:
        """How many clips are encoded in one batch. The VAE takes four frames at a time: a batch of small ones needs no
        more memory for them than one clip of 480×832 does, for which a batch gains nothing."""
        return max(1, min(8, 4 * 480 * 832 // (min(4, bucket.num_frames) * bucket.height * bucket.width)))

    def encode(self, frames) -> list[dict[str, torch.Tensor]]:
        """What is kept of each clip, see `encode_frames`.

        The batch always has `clips_at_once`, filled up with black: a clip's last bits depend on the size of its batch,
        but not on what else is in it. So the cache does not depend on what was missing, on kills or on the processes.

        Args:
            frames: (B, F, 3, H, W) uint8 RGB on the device; B is at most `clips_at_once`.
        """
        num_frames, _, height, width = frames.shape[1:]
        filler = frames.new_zeros(
            self.clips_at_once(Bucket(num_frames, height, width)) - len(frames), *frames.shape[1:]
        )
        mean, logvar = encode_frames(self._vae, torch.cat([frames, filler]))
        # The log-variance says how much noise to add: half precision is plenty.
        return [{"latents_mean": m, "latents_logvar": v.half()} for m, v in zip(mean, logvar)][: len(frames)]

    def others(self, clip):
        """(tensors, provenance) that a clip's file has besides."""
        prompt, _ = load_tensors(prompt_path(cache_folder(clip.folder, self.options), clip.text, self.settings))
        return prompt, {"file": clip.name, "size": clip.size, "mtime_ns": clip.mtime_ns, "text": clip.text}


class ControlEncoder:
    """The features of controls, by DINOv3.

    Args:
        options: has fps and dinov3.
        device: to encode on.
        dtype: torch dtype of DINOv3's weights and of the features.
    """

    tensors = CONTROL_TENSORS

    def __init__(self, options, device, dtype):
        self.settings, self.model_name = ControlSettings.from_options(options, dtype), options.dinov3
        self._dinov3 = DINOv3FeatureExtractor.from_pretrained(self.model_name, torch_dtype=dtype).to(device)

    @staticmethod
    def sources(clip):
        """The file to decode."""
        return [clip.control_source]

    @staticmethod
    def clips_at_once(bucket) -> int:
        """One: DINOv3 takes its frames in batches anyway, which are then the same whatever was missing."""
        return 1

    def encode(self, frames) -> list[dict[str, torch.Tensor]]:
        """What is kept of each clip.

        Args:
            frames: (B, F, 3, H, W) uint8 RGB on the device.
        """
        return [{"control_features": features} for features in self._dinov3(frames.float() / 255)]

    def others(self, clip):
        """(tensors, provenance) that a clip's file has besides."""
        source = clip.control_source
        return {}, {"file": source.name, "size": source.size, "mtime_ns": source.mtime_ns}
