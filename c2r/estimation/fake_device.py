"""A device without memory: torch's meta device, on which a training step runs as on a GPU or as on the CPU.

Meta tensors have a shape, a dtype and an autograd graph, but no values. They need neither a GPU nor a compiler, and
leave nothing behind in a process that trains afterwards. `DeviceRules` makes functions keep the tensors that they
would keep on the device that is meant.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from c2r.estimation.tracker import FROZEN, TRAINABLE, Tracker
from c2r.models.control_adapter import SafeConv3d

#: The device of all tensors of an estimate.
DEVICE = torch.device("meta")

#: Bytes that CUDA's caching allocator rounds every allocation up to.
CUDA_GRANULARITY = 512


def _words(text):
    return frozenset(text.split())


#: Functions that autocast runs in half precision, on CUDA and on the CPU.
HALF = _words(
    "addbmm addmm baddbmm bmm conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d "
    "einsum linalg_multi_dot linalg_vecdot linear matmul mm mv scaled_dot_product_attention"
)
#: Functions that CUDA's autocast runs in fp32.
CUDA_FULL = _words(
    "acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity dist erfinv "
    "exp expm1 frobenius_norm group_norm hinge_embedding_loss huber_loss kl_div l1_loss layer_norm log log10 "
    "log1p log2 logsumexp margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss native_layer_norm "
    "nll_loss nuclear_norm pdist poisson_nll_loss pow reciprocal renorm rms_norm rsqrt sinh smooth_l1_loss "
    "soft_margin_loss softplus tan triplet_margin_loss"
)
#: Functions whose result is fp32 under CUDA's autocast.
CUDA_FULL_RESULT = _words("cumprod cumsum linalg_matrix_norm linalg_vector_norm log_softmax norm prod softmax sum")
#: Functions that the CPU's autocast runs in fp32, of those that the models call.
CPU_FULL = frozenset(["mse_loss"])


class DeviceRules(TorchFunctionMode):
    """Run functions on meta tensors as they run on a device, where they would keep other tensors.

    - Autocast casts what the device's casts; its state is that of the CPU's autocast.
    - Attention is the kernel that the device chooses. On CUDA this is flash attention in half precision without a
      mask, else the memory efficient one. All keep queries, keys, values, output and one number per query.
    - RMSNorm on CUDA is the fused kernel, which keeps its input and one number per row.
    - A tensor that is read as a condition is true.

    Args:
        device_type: "cuda" or "cpu".
    """

    def __init__(self, device_type: str):
        super().__init__()
        cuda = device_type == "cuda"
        self._full: frozenset[str] = CUDA_FULL if cuda else CPU_FULL
        self._full_result: frozenset[str] = CUDA_FULL_RESULT if cuda else frozenset()
        self._replaced: dict[str, Callable] = {
            "scaled_dot_product_attention": _cuda_attention if cuda else _cpu_attention
        }
        if cuda:
            self._replaced["rms_norm"] = _fused_rms_norm

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is torch.autograd.backward:
            # Called through torch's function, the mode would be off until it returns, also for what is recomputed.
            (loss,) = args[0]
            with self:
                return torch.autograd.graph._engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        name = getattr(func, "__name__", "").strip("_")
        if func is torch.Tensor.__rmatmul__:
            name = "matmul"
        run = self._replaced.get(name, func)
        if not torch.is_autocast_enabled("cpu"):
            return run(*args, **kwargs)
        half = torch.get_autocast_dtype("cpu")
        if name in HALF:
            args, kwargs = _cast((args, kwargs), torch.float32, half)
        elif name in self._full:
            args, kwargs = _cast((args, kwargs), half, torch.float32)
        elif name in self._full_result and kwargs.get("dtype") is None and args[0].dtype == half:
            kwargs = kwargs | {"dtype": torch.float32}
        return run(*args, **kwargs)


def _cast(values, before, after):
    """Cast the meta tensors of one dtype in nested lists, tuples and dicts to another."""
    if isinstance(values, torch.Tensor):
        return values.to(after) if values.dtype == before and values.is_meta else values
    if isinstance(values, dict):
        return {name: _cast(value, before, after) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_cast(value, before, after) for value in values)
    return values


def _cuda_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    aten = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    kept = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale
    )[0]


def _cpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _fused_rms_norm(input, normalized_shape, weight=None, eps=None):
    if weight is None or weight.dtype != input.dtype:
        return F.rms_norm(input, normalized_shape, weight, eps)
    return FusedRMSNorm.apply(input, weight)


class FusedRMSNorm(torch.autograd.Function):
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


class _Autocast(torch.autocast):
    """Autocast whose state on the meta device is that of the CPU, because the meta device has none."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextmanager
def _meta_autocast():
    """Replace torch's functions of autocast by ones that accept the meta device."""

    def of_the_cpu(function):
        return lambda *device_type: function(*("cpu" if name == "meta" else name for name in device_type))

    replaced = {name: getattr(torch, name) for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype")}
    try:
        for name, function in replaced.items():
            setattr(torch, name, _Autocast if name == "autocast" else of_the_cpu(function))
        yield
    finally:
        for name, function in replaced.items():
            setattr(torch, name, function)


@contextmanager
def fake_device(device_type: str) -> Iterator[Tracker]:
    """Let code run on DEVICE as on a device of this type inside the context; yield the tracker of its memory.

    Args:
        device_type: "cuda" or "cpu".
    """
    cuda = device_type == "cuda"
    tracker = Tracker(CUDA_GRANULARITY, flash_workspace=True) if cuda else Tracker()
    with _meta_autocast(), tracker, DeviceRules(device_type):
        yield tracker


def put_on_device(module: torch.nn.Module, tracker: Tracker, device_type: str) -> None:
    """Count the tensors of a module that are on DEVICE already as frozen and trainable weights of the device."""
    for part in module.modules():
        if type(part) is SafeConv3d and device_type == "cuda":
            part.__class__ = torch.nn.Conv3d  # type: ignore[assignment]  # its detour is for the CPU alone
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta:  # blocks that are kept on the host are not
            tracker.mark(tensor, TRAINABLE if tensor.requires_grad else FROZEN)
