"""A tiny file in the layout of the released C2R weights."""

import torch
from safetensors.torch import save_file

from tests.helpers import tiny

DIM = 24  # of `tiny_transformer`


def released_tensors(gate_shape=()):
    """Return the six tensors of an adapter for `tiny_transformer` and `tiny_dinov3`."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "temporal_downsample.conv.weight": draw(tiny.FEATURE_DIM, 1, 9, 1, 1),
        "ln.weight": draw(tiny.FEATURE_DIM),
        "ln.bias": draw(tiny.FEATURE_DIM),
        "proj.weight": draw(DIM, tiny.FEATURE_DIM),
        "proj.bias": draw(DIM),
        "gate": torch.full(gate_shape, 0.3),
    }


def save_released(path):
    """Write the file; return its path."""
    save_file(released_tensors(), path)
    return path
