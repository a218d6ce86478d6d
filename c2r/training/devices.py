"""Copies to the device that do not hold up the host."""

import torch
from torch._subclasses.fake_tensor import is_fake


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device; the host does not wait for the device's earlier work.

    CUDA copies without waiting from pinned memory alone. Fake tensors have no memory that could be pinned.
    """
    if device.type == "cuda" and not is_fake(tensor) and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
