"""Which parts of a model run in bf16, and which stay in fp32."""

import torch


def in_full_precision(module, device):
    """Exempt a module from autocast. In bf16 the time embedding would round the noise level that it is given."""
    module.forward = torch.autocast(device.type, enabled=False)(module.forward)


def frozen_dtype(args):
    """`weight_dtype`: what frozen weights are kept in. Trainable ones are fp32 under autocast."""
    return torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32


def under_autocast(model, device, args):
    """Run the model's forward in `--mixed_precision`. Not Accelerate's: the engines would cast the weights too.

    Autocast's cache would keep a bf16 copy of every trainable weight until the forward ends, whole ones under a
    sharding engine too (28.6 GB at 14B), and each weight is used once.
    """
    enabled = args.mixed_precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
    model.forward = autocast(model.forward)
