"""Follow the memory and the FLOPs of a computation, operator by operator."""

import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# Kinds of memory.
FROZEN = "frozen weights"
TRAINABLE = "trainable weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
AVERAGE = "moving average"
SAVED = "saved activations"  # made by a forward pass, inputs of the step included
RECOMPUTED = "recomputation"  # made again in the backward pass
TEMPORARY = "temporaries"  # made by backward formulas and by the optimizer

HOST = "host"  # copied from the device to the CPU; not in any peak

KINDS = (FROZEN, TRAINABLE, GRADIENTS, OPTIMIZER, AVERAGE, SAVED, RECOMPUTED, TEMPORARY)

FORWARD, RECOMPUTATION, BACKWARD = "forward", "recomputation", "backward"
LINEAR, ATTENTION = "linear", "attention"

_ATTENTION_NAMES = ("_scaled_dot_product_", "_flash_attention_", "_efficient_attention_")

#: Attention kernels whose backward pass sums the gradient of the queries in fp32, with one more number per query.
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default


Event = tuple[str, int]  # kind, bytes: negative for a release


@dataclass
class Recording:
    """A measured part of a computation: its allocations and releases, after those that came before, and its FLOPs."""

    events: list[Event]  #: from the beginning on
    start: int  #: number of events before the measured part
    end: int = 0  #: number of events at its end
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)  #: by (pass, LINEAR or ATTENTION)

    def peak(self, factors: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return the bytes of each kind at the moment of the measured part when their sum is largest.

        Args:
            factors: share of each kind that this device holds, where it is not 1.
        """
        now = dict.fromkeys(KINDS, 0.0)
        total, largest, at_peak = 0.0, -1.0, dict(now)
        for number, (kind, num_bytes) in enumerate(self.events[: self.end]):
            if kind == HOST:
                continue
            change = num_bytes * (factors or {}).get(kind, 1.0)
            now[kind] += change
            total += change
            if number >= self.start - 1 and total > largest:
                largest, at_peak = total, dict(now)
        return at_peak

    def host_peak(self) -> int:
        """Return the most bytes that tensors copied to the host take there."""
        now = most = 0
        for kind, num_bytes in self.events[: self.end]:
            now += num_bytes if kind == HOST else 0
            most = max(most, now)
        return most


@dataclass
class Summary:
    """A computation in short."""

    most: int = 0  #: bytes at its peak beyond those before it
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)


class Tracker(TorchDispatchMode):
    """Record the storages that operators make, from their first tensor to their last, and the operators' FLOPs.

    Only tensors on the meta device count, see `fake_device`. Their memory is what an allocator would be asked for.

    Args:
        granularity: bytes that each allocation is rounded up to: 512 in CUDA's allocator.
        flash_workspace: count the fp32 sum that CUDA's flash attention allocates in its backward pass.
    """

    def __init__(self, granularity: int = 1, flash_workspace: bool = False):
        super().__init__()
        self._events: list[Event] = []
        self._flops: Counter[tuple[str, str]] = Counter()
        self._granularity, self._flash_workspace = granularity, flash_workspace
        self._alive: dict[int, Event] = {}  # by the storage's address
        self._forced: str | None = None
        self._known: dict[Hashable, Any] = {}  # layouts of results, by operator and arguments

    @contextmanager
    def measuring(self) -> Iterator[Recording]:
        """Yield a recording that is complete when the context ends."""
        recording = Recording(self._events, start=len(self._events))
        self._flops = recording.flops
        yield recording
        self._flops = Counter()
        recording.end = len(self._events)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Give everything that is made inside the context this kind."""
        before, self._forced = self._forced, kind
        try:
            yield
        finally:
            self._forced = before

    def mark(self, tensor: torch.Tensor, kind: str) -> None:
        """Give the storage of a tensor a kind; a storage that was made outside is added."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._add(storage, kind)
            return
        before, num_bytes = self._alive[storage._cdata]
        if before != kind:
            self._alive[storage._cdata] = (kind, num_bytes)
            self._events += [(before, -num_bytes), (kind, num_bytes)]

    @contextmanager
    def summing_up(self) -> Iterator["Summary"]:
        """Yield the sum of what happens inside the context: it is complete when the context ends."""
        first, flops_before, summary = len(self._events), Counter(self._flops), Summary()
        yield summary
        change = 0
        for _, num_bytes in self._events[first:]:
            change += num_bytes
            summary.most = max(summary.most, change)
        summary.flops = self._flops - flops_before

    def repeat(self, summary: "Summary") -> None:
        """Record a computation again that leaves nothing alive but what the caller makes."""
        self._events += [(SAVED, summary.most), (SAVED, -summary.most)]
        self._flops.update(summary.flops)

    def remove(self, tensor: torch.Tensor) -> None:
        """Take the storage of a tensor off the device."""
        self._release(tensor.untyped_storage()._cdata)

    def _add(self, storage, kind):
        num_bytes = -(-storage.nbytes() // self._granularity) * self._granularity
        if num_bytes == 0:
            return
        self._alive[storage._cdata] = (kind, num_bytes)
        self._events.append((kind, num_bytes))
        weakref.finalize(storage, self._release, storage._cdata).atexit = False

    def _release(self, address):
        if address in self._alive:  # not where `remove` was called
            kind, num_bytes = self._alive.pop(address)
            self._events.append((kind, -num_bytes))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._is_to_host(func, args, kwargs):
            return self._copy_to_host(func, args, kwargs)
        result = self._run(func, args, kwargs)
        stage = _stage()
        kind = self._forced or {FORWARD: SAVED, RECOMPUTATION: RECOMPUTED, BACKWARD: TEMPORARY}[stage]
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive:
                    self._add(storage, kind)
        if func is _FLASH_BACKWARD and self._flash_workspace:
            batch, heads, tokens, head_dim = args[1].shape
            workspace = 4 * batch * heads * (-(-tokens // 128) * 128) * (-(-head_dim // 32) * 32 + 1)
            self._events += [(kind, workspace), (kind, -workspace)]
        packet = func._overloadpacket
        if packet in flop_registry:
            what = ATTENTION if packet.__name__.startswith(_ATTENTION_NAMES) else LINEAR
            self._flops[stage, what] += flop_registry[packet](*args, **kwargs, out_val=result)
        return result

    def _is_to_host(self, func, args, kwargs):
        if func is aten._to_copy.default:
            return args[0].is_meta and kwargs.get("device") == torch.device("cpu")
        return func is aten.copy_.default and args[1].is_meta and not args[0].is_meta

    def _copy_to_host(self, func, args, kwargs):
        """Copy a tensor to the CPU, where its copy has one value in place of all."""
        if func is aten.copy_.default:
            on_host = args[0]  # of `torch.empty`, whose memory is never touched
        else:
            on_host = torch.empty((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
        storage, num_bytes = on_host.untyped_storage(), args[0].numel() * args[0].element_size()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = (HOST, num_bytes)
            self._events.append((HOST, num_bytes))
            weakref.finalize(storage, self._release, storage._cdata).atexit = False
        return on_host

    def _run(self, func, args, kwargs):
        """Run an operator, or make its result by the layout that an earlier call with such arguments gave."""
        if not _makes_new_tensors(func):
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key not in self._known:
            result = func(*args, **kwargs)
            layouts = [_layout(tensor) for tensor in (result if isinstance(result, tuple) else (result,))]
            if None in layouts:
                return result
            self._known[key] = layouts if isinstance(result, tuple) else layouts[0]
            return result
        layouts = self._known[key]
        if isinstance(layouts, list):
            return tuple(_make(layout) for layout in layouts)
        return _make(layouts)


@cache
def _makes_new_tensors(func):
    return not func._schema.is_mutable and all(
        str(returned.type) in ("Tensor", "Optional[Tensor]") and returned.alias_info is None
        for returned in func._schema.returns
    )


def _key(value):
    """Return a hashable equal of arguments in which tensors are their layouts."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _layout(tensor):
    """Return the layout of a meta tensor that fills its storage, () for no tensor, else None."""
    if tensor is None:
        return ()
    if not tensor.is_meta or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return None
    return tensor.shape, tensor.stride(), tensor.dtype


def _make(layout):
    return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta") if layout else None


def _stage():
    """Return the pass that runs now: forward, backward, or the forward that a checkpoint repeats inside backward."""
    if torch._C._current_graph_task_id() == -1:
        return FORWARD
    return RECOMPUTATION if torch.is_grad_enabled() else BACKWARD
