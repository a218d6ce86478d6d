"""Attention of both branches: the backend that computes it, and a processor with fewer passes over the tokens."""

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    SeqAllToAllDim,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections

from c2r import InputError


class LeanAttnProcessor:
    """Wan's text-to-video attention, with the values of Diffusers' `WanAttnProcessor` and less work around it.

    The rotation of queries and keys is one operation with a backward pass of its own, in place of a dozen operations
    that autograd records and takes back one by one.
    """

    # Diffusers' `set_attention_backend` and context parallelism set these on the instance.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None
    #: Processes among which the tokens are split, see `ContextParallel`. Diffusers' own attention of this kind would
    #: compute each attention once more in the backward pass, and works with some backends only.
    token_group: dist.ProcessGroup | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend to the tokens themselves, or to the prompt.

        Args:
            attn: the module, without image projections.
            hidden_states: (B, N, D).
            encoder_hidden_states: (B, L, D), the prompt; None is self-attention.
            attention_mask: passed on.
            rotary_emb: cos, sin, each (1, N, 1, head_dim) with every number twice; None rotates nothing.

        Returns:
            (B, N, D).
        """
        is_self_attention = encoder_hidden_states is None
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        # Under autocast they are bf16 and the norms' weights may be fp32: torch has no fused kernel for such a mix.
        query, key = (
            norm(states.to(norm.weight.dtype)) for norm, states in ((attn.norm_q, query), (attn.norm_k, key))
        )
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        if rotary_emb is not None:
            query, key = (Rotation.apply(tensor, *rotary_emb) for tensor in (query, key))
        # torch's attention would cast them under autocast; flash-attn's refuses other dtypes than the value's.
        query, key = query.type_as(value), key.type_as(value)
        exchanges = is_self_attention and self.token_group is not None
        if exchanges:  # (B, N / degree, heads, head_dim) to (B, N, heads / degree, head_dim)
            query, key, value = (SeqAllToAllDim.apply(self.token_group, t, 2, 1) for t in (query, key, value))
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config if is_self_attention else None,
        )
        if exchanges:
            attended = SeqAllToAllDim.apply(self.token_group, attended, 1, 2)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


class Rotation(torch.autograd.Function):
    """Rotary embedding: turn each pair of neighbouring channels by the angle of its token."""

    @staticmethod
    def forward(ctx, states, cos, sin):
        """Rotate (B, N, heads, head_dim); the result has the dtype of `states`."""
        ctx.save_for_backward(cos, sin)
        return rotate(states, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        """Rotate back: the matrix of a rotation is orthogonal."""
        cos, sin = ctx.saved_tensors
        return rotate(gradient, cos, -sin), None, None


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return (x₁·cos − x₂·sin, x₁·sin + x₂·cos) for each pair (x₁, x₂) of channels, computed in fp32.

    The pairs are multiplied as complex numbers: one pass over the tokens. torch.compile has no code for complex
    numbers and fuses the real operations by itself.
    """
    cos, sin = cos[..., 0::2], sin[..., 1::2]  # (1, N, 1, head_dim / 2)
    pairs = states.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        x1, x2 = pairs.unbind(-1)
        rotated = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs.float().contiguous()) * torch.complex(cos, sin))
    return rotated.flatten(-2).type_as(states)


def use_lean_attention(model: torch.nn.Module, backend: str | None = None) -> None:
    """Give all attention modules of a text-to-video model a `LeanAttnProcessor`.

    Args:
        model: backbone, control branch or both, also in other modules.
        backend: see `try_attention_backend`.
    """
    for module in model.modules():
        if isinstance(module, WanAttention):
            processor = LeanAttnProcessor()
            processor._attention_backend = None if backend is None else AttentionBackendName(backend)
            module.set_processor(processor)


def try_attention_backend(
    backend: str | None, head_dim: int, device: torch.device, dtype: torch.dtype, *, backward: bool
) -> None:
    """Compute a small attention by a backend, so that what is missing is reported before any weight is loaded.

    A kernel of the hub is downloaded.

    Args:
        backend: a name of `AttentionBackendName`; None is Diffusers' default, which always works.
        head_dim: channels of a head in the model.
        device, dtype: those that attention will run in.
        backward: also compute gradients, as training does.

    Raises:
        InputError: package, device, dtype, size or gradient are missing or not supported.
    """
    if backend is None:
        return
    states = [torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype, requires_grad=backward) for _ in range(3)]
    try:
        with attention_backend(backend):  # checks the package, loads the kernel
            attended = dispatch_attention_fn(*states, backend=AttentionBackendName(backend))
        if backward:
            attended.sum().backward()
    except Exception as error:  # each backend raises its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"--attention_backend {backend}: does not work on {device.type} in {str(dtype).removeprefix('torch.')} "
            f"with {head_dim} channels per head ({reason}); install what is missing, or leave the option out"
        ) from error
