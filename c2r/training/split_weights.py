"""Weights that a training engine has split among processes: the part of each, and the whole of all."""

from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from c2r.files import fingerprint
from c2r.training.engine import sharding
from c2r.training.optimizer import exact_state_dict


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter that this process holds, sharing its memory; all of it without sharding."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter).detach()


def drop_gathered(model: torch.nn.Module):
    """Free the gathered weights of a prepared model, so that each process holds its own part alone.

    After a forward without backward FSDP2 keeps the root's weights gathered. ZeRO-3 keeps all small weights, and still
    fetches those of the modules that a training step would run next.
    """
    zero3 = getattr(model, "optimizer", None)
    if hasattr(zero3, "empty_partition_cache"):  # the engine's own method also collects garbage, up to a second a call
        zero3.empty_partition_cache()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_fingerprint(module: torch.nn.Module, model: torch.nn.Module) -> str:
    """Return the SHA-256 of this process's part of a module's parameters.

    Args:
        module: a part of the prepared model.
        model: the prepared model that holds it.
    """
    drop_gathered(model)
    return fingerprint((name, local_shard(parameter)) for name, parameter in module.named_parameters())


@torch.no_grad()
def gathered_state_dict(
    accelerator: Accelerator, module: torch.nn.Module, optimizer: Any = None
) -> dict[str, torch.Tensor]:
    """Return the whole weights of a prepared module, as `save_pretrained` writes them. Call it on every process.

    Args:
        accelerator: the run's.
        module: the prepared model or a part of it, unwrapped.
        optimizer: holds the low bits that `--weight_storage bf16` keeps beside the module.

    Returns:
        {name: tensor} on the main process, {} on the others. Sharded weights are gathered one by one, to the CPU.
    """
    engine = sharding(accelerator)
    if engine in (None, "zero2"):
        return exact_state_dict(module, optimizer) if accelerator.is_main_process else {}
    if engine == "zero3":
        drop_gathered(accelerator.deepspeed_engine_wrapped.engine)  # weights being fetched cannot be gathered
    state_dict = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with _gathered(tensor) as whole:
            if accelerator.is_main_process:
                state_dict[name] = whole.detach().to("cpu", copy=True)
    return state_dict


@contextmanager
def _gathered(tensor):
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor
