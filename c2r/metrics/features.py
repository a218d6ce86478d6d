"""Features of frames and of videos, for distances between sets and likeness of neighbouring frames."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import CLIPModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, VJEPA2Model

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against
from c2r.metrics.networks import chunks, load_network, normalise, read_preprocessor, resize, side_of

#: Image encoders of transformers, each with the name that measures made from it get.
IMAGE_KINDS = {
    "dinov2": (Dinov2Model, "dinov2"),
    "dinov2_with_registers": (Dinov2WithRegistersModel, "dinov2"),
    "dinov3_vit": (DINOv3ViTModel, "dinov3"),
    "clip": (CLIPModel, "clip"),
}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
#: Frames that V-JEPA 2 reads at once; longer videos are cut into such windows.
WINDOW = 16


class ImageFeatures:
    """A network that gives one feature for each frame: DINOv2, DINOv3 or CLIP.

    Frames are squeezed to a square, since cropping would hide the sides of a wide video.

    Args:
        name_or_path: a folder or hub name with preprocessor_config.json.
        device: where it runs.

    Attributes:
        kind: `dinov2`, `dinov3` or `clip`.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: torch.device | str):
        classes = {model_type: model_class for model_type, (model_class, _) in IMAGE_KINDS.items()}
        self.model, folder = load_network(name_or_path, classes, device)
        self.preprocessor = read_preprocessor(folder)
        config = self.model.config
        self.kind = IMAGE_KINDS[config.model_type][1]
        if self.kind == "clip":
            self.side = config.vision_config.image_size
        else:
            side = side_of(self.preprocessor.get("crop_size") or self.preprocessor.get("size"), 224)
            self.side = max(1, side // config.patch_size) * config.patch_size

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """Return the features of (F, 3, H, W) floats in [0, 1], (F, D) fp32 on the CPU."""
        features = []
        for frames in chunks(video, self.model.device):
            frames = resize(frames, self.side, self.side)
            pixel_values = normalise(frames, self.preprocessor, IMAGENET_MEAN, IMAGENET_STD)
            model = self.model.get_image_features if self.kind == "clip" else self.model
            features.append(model(pixel_values=pixel_values).pooler_output.float().cpu())
        return torch.cat(features)


class VideoFeatures:
    """V-JEPA 2, which gives one feature for a video: the mean over the patches of all its windows of WINDOW frames.

    Frames are squeezed to a square. Of an odd number of frames the last is left out, as V-JEPA 2 reads them in twos;
    a single frame is doubled.

    Args:
        name_or_path: a folder or hub name.
        device: where it runs.

    Attributes:
        kind: `vjepa2`.

    Raises:
        InputError: it cannot be loaded.
    """

    kind = "vjepa2"

    def __init__(self, name_or_path: str, device: torch.device | str):
        self.model, _ = load_network(name_or_path, {"vjepa2": VJEPA2Model}, device)

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """Return the feature of (F, 3, H, W) floats in [0, 1], (1, D) fp32 on the CPU."""
        config, tubelet = self.model.config, self.model.config.tubelet_size
        if len(video) < tubelet:
            video = video[-1:].expand(tubelet, -1, -1, -1)
        video = video[: len(video) // tubelet * tubelet]
        patches = []
        for window in video.split(max(WINDOW // tubelet, 1) * tubelet):
            frames = resize(window.to(self.model.device).float(), config.crop_size, config.crop_size)
            frames = normalise(frames, {}, IMAGENET_MEAN, IMAGENET_STD)
            hidden = self.model(pixel_values_videos=frames[None], skip_predictor=True).last_hidden_state  # (1, N, D)
            patches.append((hidden[0].float().mean(0), len(window)))
        total = sum(length for _, length in patches)
        return torch.stack([mean * (length / total) for mean, length in patches]).sum(0, keepdim=True).cpu()


class FrameSimilarity:
    """Likeness of neighbouring frames of the generated video; `frame_similarity`.

    Args:
        features: (F, 3, H, W) -> (F, D), an `ImageFeatures`; share one `Remembering` among measures.
    """

    name = "frame_similarity"
    higher_is_better: bool | None = True
    against: Against = "itself"
    unit = "cosine"
    bounds = (-1.0, 1.0)

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor]):
        self.features = features

    def __call__(self, clip: EvaluatedClip) -> float | None:
        return frame_similarity(self.features(clip.video))


def frame_similarity(features: torch.Tensor) -> float | None:
    """Compute the mean cosine of the features of neighbouring frames.

    Args:
        features: (F, D).

    Returns:
        in [−1, 1]; None with one frame. A still video has 1: read it beside a measure of structure.

    Source: frame consistency by CLIP of Esser et al. 2023 (Gen-1, arXiv 2302.03011), here by any image features.
    """
    return None if len(features) < 2 else F.cosine_similarity(features[1:], features[:-1]).mean().item()
