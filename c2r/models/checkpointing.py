"""Gradient checkpointing of transformer blocks: keep a block's input, and compute the rest again for the gradients."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from c2r.models.offloading import OffloadedActivations

aten = torch.ops.aten

#: The kernels that `scaled_dot_product_attention` chooses from. The plain formula, its fallback, is not among them: it
#: is no operator of its own, and a GPU without any of these kernels computes it again.
ATTENTION_KERNELS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}


def run_checkpointed(
    block: Callable[..., Any],
    hidden_states: torch.Tensor,
    *shared: Any,
    keep_attention: bool = False,
    offloaded: OffloadedActivations | None = None,
) -> Any:
    """Return `block(hidden_states, *shared)`, and keep only `hidden_states` for the backward pass.

    Models of diffusers take this function, or a partial of it, in `enable_gradient_checkpointing`.

    Args:
        block: draws no random numbers.
        hidden_states: (B, N, D), kept until the backward pass of this block.
        shared: further inputs, which are alive anyway because all blocks share them.
        keep_attention: also keep the outputs of self-attention, (B, N, D) in the dtype of the forward pass, so that
            attention is not computed again. Other attention kernels than torch's own are.
        offloaded: keeps `hidden_states` on the CPU.
    """

    def run(hidden_states):
        return block(hidden_states, *shared)

    # No random numbers are drawn in a block (Wan's dropout is 0), so there is no RNG state to keep.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep_attention:
        options["context_fn"] = _attention_contexts
    # Only `hidden_states` is saved in this context: what the block saves is dropped, and `shared` is not saved at all.
    with nullcontext() if offloaded is None else offloaded.hooks():
        return checkpoint(run, hidden_states, **options)


def _is_self_attention(operator, inputs):
    # Cross-attention reads a short prompt: its outputs are as large, and cost little to compute again.
    return operator in ATTENTION_KERNELS and inputs[0].shape[-2] == inputs[1].shape[-2]


class _KeepAttention(TorchDispatchMode):
    """Keeps the results of self-attention.

    torch's `create_selective_checkpoint_contexts` also requires that all other operators are the same in the backward
    pass; under ZeRO-3, which gathers weights ahead of their use, they are not.
    """

    def __init__(self, kept: deque):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operator, types, inputs=(), keywords=None):
        results = operator(*inputs, **keywords or {})
        if _is_self_attention(operator, inputs):
            # Aliases: the results themselves will hold the graph that leads to them.
            self.kept.append(tree_map_only(torch.Tensor, torch.Tensor.detach, results))
        return results


class _ReuseAttention(TorchDispatchMode):
    """Returns the kept results, in their order, where self-attention would be computed again."""

    def __init__(self, kept: deque):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operator, types, inputs=(), keywords=None):
        if _is_self_attention(operator, inputs):
            return self.kept.popleft()
        return operator(*inputs, **keywords or {})


def _attention_contexts():
    kept: deque = deque()
    return _KeepAttention(kept), _ReuseAttention(kept)


def set_checkpointing(model: nn.Module, mode: str, offload: bool = False) -> None:
    """Set how a model keeps activations for the backward pass.

    Args:
        model: `WanTransformer3DModel`, or a module with its switches, such as `C2RTransformer`.
        mode: "none", "block" or "selective", see `run_checkpointed`.
        offload: keep the inputs of blocks on the CPU; not with "none".
    """
    if mode == "none":
        model.disable_gradient_checkpointing()  # type: ignore[operator]
        return
    offloaded = OffloadedActivations() if offload else None
    run = partial(run_checkpointed, keep_attention=mode == "selective", offloaded=offloaded)
    model.enable_gradient_checkpointing(run)  # type: ignore[operator]
