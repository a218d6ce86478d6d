"""Fake tensors: they have a shape, a dtype and an autograd graph, but no memory and no values.

The fake device is the CPU, so that a CPU build of torch without a compiler is enough, and nothing is left behind in a
process that trains afterwards. `CudaRules` makes functions keep what they would keep on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from c2r.estimation.tracker import FROZEN, TRAINABLE, Tracker
from c2r.models.control_adapter import SafeConv3d

#: The device that fake tensors are on.
DEVICE = torch.device("cpu")

#: Bytes that CUDA's caching allocator rounds every allocation up to.
CUDA_GRANULARITY = 512

#: Functions that CUDA's autocast runs in half precision.
HALF = frozenset(
    "addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d "
    "conv_transpose3d convolution einsum linalg_multi_dot linalg_vecdot linear matmul mm mv prelu "
    "scaled_dot_product_attention".split()
)
#: Functions that CUDA's autocast runs in fp32.
FULL = frozenset(
    "acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity dist erfinv exp "
    "expm1 frobenius_norm group_norm hinge_embedding_loss huber_loss kl_div l1_loss layer_norm log log10 log1p log2 "
    "logsumexp margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss native_layer_norm nll_loss "
    "nuclear_norm pdist poisson_nll_loss pow reciprocal renorm rms_norm rsqrt sinh smooth_l1_loss soft_margin_loss "
    "softplus tan triplet_margin_loss".split()
)
#: Functions whose result is fp32 under CUDA's autocast.
FULL_RESULT = frozenset("cumprod cumsum linalg_matrix_norm linalg_vector_norm log_softmax norm prod softmax sum".split())


class CudaRules(TorchFunctionMode):
    """Run functions on fake CPU tensors as CUDA runs them, where the CPU would keep other tensors.

    - Autocast on the CPU casts what CUDA's casts.
    - Attention is the kernel that CUDA chooses: flash attention in half precision without a mask, else the memory
      efficient one. Both keep queries, keys, values, output and one number per query.
    - RMSNorm is the fused kernel, which keeps its input and one number per row.

    With or without CUDA, a fake tensor that is read as a condition is true.
    """

    def __init__(self, cuda: bool):
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return True
        if not self._cuda:
            return func(*args, **kwargs)
        if func is torch.autograd.backward:
            # Called through torch's function, the mode would be off until it returns, also for what is recomputed.
            (loss,) = args[0]
            with self:
                return torch.autograd.graph._engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        name = getattr(func, "__name__", "").strip("_").removeprefix("r" if func is torch.Tensor.__rmatmul__ else "")
        run = _REPLACED.get(name, func)
        if not torch.is_autocast_enabled("cpu"):
            return run(*args, **kwargs)
        half = torch.get_autocast_dtype("cpu")
        if name in HALF:
            args, kwargs = _cast((args, kwargs), torch.float32, half)
        elif name in FULL:
            args, kwargs = _cast((args, kwargs), half, torch.float32)
        elif name in FULL_RESULT and kwargs.get("dtype") is None and args[0].dtype == half:
            kwargs = kwargs | {"dtype": torch.float32}
        torch.set_autocast_enabled("cpu", False)  # otherwise the CPU's own rules would apply as well
        try:
            return run(*args, **kwargs)
        finally:
            torch.set_autocast_enabled("cpu", True)


def _cast(values, before, after):
    """Cast the tensors of one dtype in nested lists, tuples and dicts to another."""
    if isinstance(values, torch.Tensor):
        return values.to(after) if values.dtype == before else values
    if isinstance(values, dict):
        return {name: _cast(value, before, after) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_cast(value, before, after) for value in values)
    return values


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    aten = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    kept = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale
    )[0]


def _rms_norm(input, normalized_shape, weight=None, eps=None):  # noqa: A002 (torch's name)
    if weight is not None and weight.dtype != input.dtype:
        return F.rms_norm(input, normalized_shape, weight, eps)
    return _FusedRMSNorm.apply(input, weight)


class _FusedRMSNorm(torch.autograd.Function):
    """The memory of CUDA's fused kernel; the CPU has none, and would keep the normalised input as well."""

    @staticmethod
    def forward(ctx, hidden_states, weight):
        scales = torch.empty(*hidden_states.shape[:-1], 1, dtype=torch.float32, device=hidden_states.device)
        ctx.save_for_backward(hidden_states, weight, scales)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx, gradient):
        hidden_states, weight, _ = ctx.saved_tensors
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        return torch.empty_like(hidden_states), of_weight


_REPLACED = {"scaled_dot_product_attention": _attention, "rms_norm": _rms_norm}


@contextmanager
def fake_device(device_type: str) -> Iterator[Tracker]:
    """Make every new tensor fake inside the context; yield the tracker of their memory.

    Args:
        device_type: "cuda" for what a GPU would keep; "cpu" for what the CPU's own kernels keep.
    """
    cuda = device_type == "cuda"
    tracker = Tracker(CUDA_GRANULARITY, flash_workspace=True) if cuda else Tracker()
    with FakeTensorMode(), tracker, CudaRules(cuda):
        yield tracker


def put_on_device(module: torch.nn.Module, tracker: Tracker, device_type: str) -> None:
    """Replace a module's parameters and buffers, which are on the meta device, by fake ones."""

    def fake(tensor, kind):
        with tracker.making(kind):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)

    for part in module.modules():
        if type(part) is SafeConv3d and device_type == "cuda":
            part.__class__ = torch.nn.Conv3d  # its detour is for real CPUs alone
        for name, parameter in part._parameters.items():
            if parameter is not None:
                kind = TRAINABLE if parameter.requires_grad else FROZEN
                part._parameters[name] = torch.nn.Parameter(fake(parameter, kind), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer, FROZEN)
