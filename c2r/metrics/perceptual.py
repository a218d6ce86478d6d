"""LPIPS, the perceptual distance of frames."""

from importlib import resources
from math import inf
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against
from c2r.metrics.networks import chunks
from c2r.models.hub import WeightIndex, require_complete, resolve_model_folder
from c2r.models.parts import freeze

#: Convolutions of VGG16 by their places in torchvision's `features`, in stages with a pooling between them.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
#: Mean and deviation of LPIPS, of RGB in [−1, 1].
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPSNetwork(nn.Module):
    """VGG16 with the weights of LPIPS 0.1 on the channels of five layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions, width = nn.ModuleDict(), 3
        for stage, out in zip(STAGES, WIDTHS):
            for place in stage:
                self.convolutions[str(place)] = nn.Conv2d(width, out, 3, padding=1)
                width = out
        self.weights = nn.ParameterList(torch.empty(1, width, 1, 1) for width in WIDTHS)

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: torch.device | str = "cpu") -> "LPIPSNetwork":
        """Load VGG16 from a folder or hub name with torchvision's weights in safetensors, such as timm/vgg16.tv_in1k.

        The weights of the channels are those that torchmetrics contains.

        Args:
            name_or_path: the folder or hub name.
            device: where it runs; "meta": names and shapes are checked, and no weight is read.

        Raises:
            InputError: not found, or weights are missing or of another shape.
        """
        folder = resolve_model_folder(name_or_path)
        index = WeightIndex(folder)
        with torch.device(device):
            network = freeze(cls())
        needed = {f"features.{name}": parameter for name, parameter in network.convolutions.named_parameters()}
        found = index.shapes()
        unfit = [name for name, tensor in needed.items() if found.get(name, tensor.shape) != tuple(tensor.shape)]
        require_complete(folder, needed.keys() - found.keys(), unfit)
        if torch.device(device).type == "meta":
            return network
        for name, tensor in index.tensors():  # the classifier is in the file too
            if name in needed:
                needed[name].copy_(tensor)
        path = resources.files("torchmetrics") / "functional/image/lpips_models/vgg.pth"
        with resources.as_file(path) as file:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        for i, weight in enumerate(network.weights):
            weight.copy_(state[f"lin{i}.model.1.weight"])
        return network

    def features(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Return the five layers of (n, 3, H, W) floats in [0, 1], each with unit length over its channels."""
        mean, deviation = (frames.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        hidden, layers = (2 * frames - 1 - mean) / deviation, []
        for number, stage in enumerate(STAGES):
            if number:
                hidden = F.max_pool2d(hidden, 2)
            for place in stage:
                hidden = F.relu(self.convolutions[str(place)](hidden))
            layers.append(hidden / (hidden.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return layers

    def forward(self, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return the distance of each of (n, 3, H, W) from the other, (n,)."""
        layers = zip(self.features(frames), self.features(others), self.weights)
        return torch.stack([(weight * (a - b).square()).sum(1).mean((1, 2)) for a, b, weight in layers]).sum(0)


class LPIPS:
    """Perceptual distance of the generated video from the true one, frame by frame; `lpips`.

    d = Σ_l mean over places of Σ_c w_lc·(f_lc − g_lc)², with f, g the activations of layer l of VGG16 at unit length.
    At least 0, which equal frames have; seldom above 1. It is computed at the size of the videos, at least 16 pixels.

    Args:
        name_or_path: see `LPIPSNetwork.from_pretrained`.
        device: where it runs.

    Source: Zhang et al. 2018 (CVPR, arXiv 1801.03924), eq. 1, version 0.1 with VGG.
    """

    name = "lpips"
    higher_is_better: bool | None = False
    against: Against = "truth"
    unit = "LPIPS (VGG)"
    bounds = (0.0, inf)

    def __init__(self, name_or_path: str, device: torch.device | str):
        self.network, self.device = LPIPSNetwork.from_pretrained(name_or_path, device), device

    @torch.no_grad()
    def __call__(self, clip: EvaluatedClip) -> float | None:
        if clip.truth is None:
            return None
        # One pair of frames at a time: the first layers of 480p take 0.1 GB each.
        pairs = zip(chunks(clip.video, self.device, 1), chunks(clip.truth, self.device, 1))
        return torch.cat([self.network(frames, others) for frames, others in pairs]).mean().item()
