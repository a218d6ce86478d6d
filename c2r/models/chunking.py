"""Run feed-forward layers and projectors in parts of the sequence, so that one part's activations exist at a time."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from c2r.models.checkpointing import run_checkpointed
from c2r.models.controlnet import C2RControlBlock
from c2r.models.offloading import StoredBlock


def chunk_feed_forward(model: nn.Module, chunks: int) -> None:
    """Let the feed-forward layers and projectors of a model run in `chunks` parts of the sequence, in place.

    In training each part is checkpointed by itself. Outputs and gradients are the same but for the order of sums.

    Args:
        model: its `WanTransformerBlock`s and `C2RControlBlock`s are changed.
        chunks: at least 1; 1 changes nothing.
    """
    if chunks == 1:
        return
    for module in list(model.modules()):
        # The forward is replaced, not the module: the names of weights stay, and the hooks of engines run.
        if isinstance(module, StoredBlock):
            # Its own forward has exchanged the weights, but is over when the parts run again.
            ffn = module.block.get_submodule("ffn")
            ffn.forward = module.bind("ffn", ffn.forward)
        if isinstance(module, WanTransformerBlock):
            module.ffn.forward = partial(_in_chunks, module.ffn.forward, chunks)
        elif isinstance(module, C2RControlBlock):
            module.projector.forward = partial(  # type: ignore[method-assign]
                _in_chunks, module.projector.forward, chunks
            )


def _in_chunks(forward: Callable[[torch.Tensor], torch.Tensor], chunks: int, hidden_states: torch.Tensor):
    # (B, N, D), each row of which is computed by itself
    parts = hidden_states.chunk(chunks, dim=1)
    if torch.is_grad_enabled():
        return torch.cat([run_checkpointed(forward, part) for part in parts], dim=1)
    return torch.cat([forward(part) for part in parts], dim=1)
