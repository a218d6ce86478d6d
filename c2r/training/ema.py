"""The moving average of the trainable weights (`--ema_decay`), by diffusers' EMAModel, on whole or split weights."""

from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from transformers.integrations import unset_hf_deepspeed_config

from c2r.training.engine import drop_gathered, local_shard


def build_ema(module, decay):
    """An average that starts at the module's weights, each process's part of them; None without a decay.

    Args:
        module: what trains, prepared and unwrapped.
        decay: in (0, 1): the average's share that each step keeps. In the first steps it is (1 + n) / (10 + n).
    """
    if decay is None:
        return None
    # EMAModel would ask ZeRO-3 to gather what it is given, but these are plain tensors, and it averages in parts.
    unset_hf_deepspeed_config()
    return EMAModel(_shards(module), decay=decay)


def step_ema(ema, module):
    """Take one optimizer step into the average."""
    if ema is not None:
        ema.step(_shards(module))


@contextmanager
def averaged_weights(ema, module, model):
    """The averaged weights in place of the trained ones: for validation and for what is saved from it.

    Args:
        ema: of `build_ema`; None changes nothing.
        module: what trains, unwrapped.
        model: the prepared model that holds it.
    """
    if ema is None:
        yield
        return
    shards = _shards(module)
    ema.store(shards)
    ema.copy_to(shards)
    drop_gathered(model)  # or it would be the other set's
    try:
        yield
    finally:
        ema.restore(shards)
        drop_gathered(model)


def _shards(module):
    # EMAModel averages what requires a gradient, and copies the rest.
    return [local_shard(parameter).requires_grad_() for parameter in module.parameters()]
