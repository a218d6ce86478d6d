"""Precision: the parts of a model that run in bf16, and those that stay in fp32."""

import torch


def frozen_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype of frozen weights (`weight_dtype`). Trainable weights stay in fp32 under autocast.

    Args:
        mixed_precision: "bf16" or "no".
    """
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def disable_autocast(module: torch.nn.Module, device: torch.device):
    """Run a module's forward outside autocast. In bf16 the time embedding would round the noise level."""
    module.forward = torch.autocast(device.type, enabled=False)(module.forward)


def enable_autocast(model: torch.nn.Module, device: torch.device, mixed_precision: str):
    """Run a model's forward in `mixed_precision`. Accelerate's autocast would cast the weights too under some engines.

    Autocast's cache would keep a bf16 copy of every trainable weight until the forward ends, whole weights under a
    sharding engine too (28.6 GB at 14B), although each weight is used once.
    """
    enabled = mixed_precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
    model.forward = autocast(model.forward)
