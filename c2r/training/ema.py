"""Moving average of the trainable weights (`--ema_decay`) by diffusers' EMAModel, on whole or split weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from transformers.integrations import unset_hf_deepspeed_config

from c2r.training.split_weights import drop_gathered, local_shard


def build_ema(module: torch.nn.Module, decay: float | None) -> EMAModel | None:
    """Build an average that starts at this process's part of the module's weights; None without a decay.

    Args:
        module: the part of the model that trains, prepared and unwrapped.
        decay: in (0, 1), the share of the average that each step keeps. Early steps keep less: the first one nothing,
            step n > 1 at most n / (n + 9).
    """
    if decay is None:
        return None
    # EMAModel would ask ZeRO-3 to gather its tensors, but these are plain ones, averaged part by part.
    unset_hf_deepspeed_config()
    return EMAModel(_shards(module), decay=decay)


def step_ema(ema: EMAModel | None, module: torch.nn.Module):
    """Update the average after an optimizer step."""
    if ema is not None:
        ema.step(_shards(module))


@contextmanager
def averaged_weights(ema: EMAModel | None, module: torch.nn.Module, model: torch.nn.Module) -> Iterator[None]:
    """Replace the trained weights by the averaged ones within the body, to validate and save them.

    Args:
        ema: from `build_ema`; None changes nothing.
        module: the part of the model that trains, unwrapped.
        model: the prepared model that holds it.
    """
    if ema is None:
        yield
        return
    shards = _shards(module)
    ema.store(shards)
    ema.copy_to(shards)
    drop_gathered(model)  # otherwise the forward would use stale gathered weights
    try:
        yield
    finally:
        ema.restore(shards)
        drop_gathered(model)


def _shards(module):
    # EMAModel averages tensors that require a gradient, and copies the others.
    return [local_shard(parameter).requires_grad_() for parameter in module.parameters()]
