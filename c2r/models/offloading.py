"""Keep tensors on the CPU between their uses: the inputs of checkpointed blocks, and the weights of frozen blocks.

On CUDA the copies go through pinned memory on a stream of their own, one block ahead of the computation. On other
devices they are made when they are needed.
"""

import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call


class OnDevice:
    """A tensor that is being copied to a device."""

    def __init__(self, tensor: torch.Tensor, device: torch.device, stream: torch.Stream | None):
        self._copied = None
        if stream is None:
            self._tensor = tensor.to(device)
            return
        with stream:
            self._tensor = tensor.to(device, non_blocking=True)
        self._copied = stream.record_event()

    def get(self) -> torch.Tensor:
        """Return the tensor on the device; what the caller's stream does next waits for the copy."""
        if self._copied is not None:
            current = torch.accelerator.current_stream(self._tensor.device)
            current.wait_event(self._copied)
            self._tensor.record_stream(current)
        return self._tensor


def copy_stream(device: torch.device) -> torch.Stream | None:
    """Return a stream for copies beside the computation; None where there is none."""
    return torch.Stream(device) if device.type == "cuda" and torch.cuda.is_available() else None


# -------------------------------------------------------------------------------------------------- inputs of blocks


class _Parked:
    """A tensor on the CPU until the backward pass, whose first use also fetches the one that was parked before it."""

    def __init__(self, tensor, stream, before):
        self.device, self.stream, self.before = tensor.device, stream, before
        self.fetched = None
        if stream is None:
            self.host = tensor.to("cpu")
            return
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.accelerator.current_stream(tensor.device))
        with stream:
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self):
        if self.fetched is None:
            self.fetched = OnDevice(self.host, self.device, self.stream)

    def take(self):
        self.fetch()
        before = self.before and self.before()
        if before is not None and self.stream is not None:
            before.fetch()
        fetched, self.fetched = self.fetched, None
        return fetched.get()


class OffloadedActivations:
    """Keeps tensors that autograd saves on the CPU until the backward pass uses them."""

    def __init__(self):
        self._stream: torch.Stream | None = None
        self._last: weakref.ref[_Parked] | None = None

    def hooks(self) -> saved_tensors_hooks:
        """Return a context, in which tensors that autograd saves are copied to the CPU."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor):
        if tensor.device.type == "cpu":
            return tensor
        if self._stream is None:
            self._stream = copy_stream(tensor.device)
        parked = _Parked(tensor, self._stream, self._last)
        self._last = weakref.ref(parked)
        return parked

    def _unpack(self, packed):
        return packed.take() if isinstance(packed, _Parked) else packed


# ------------------------------------------------------------------------------------------- weights of frozen blocks

FLOAT8 = torch.float8_e4m3fn


class StoredBlock(nn.Module):
    """A frozen block whose weights are stored elsewhere or in 8 bit, and are whole on the device only while it runs.

    The forward runs the block on copies of its weights. With checkpointing the backward pass makes them again, and
    frees them when the block's gradients are computed.

    Args:
        block: frozen. Its parameters become the stored ones.
        device: device that the block runs on.
        offload: store the weights on the CPU; moving the model leaves them there.
        float8: store the matrices in float8_e4m3fn with one scale per row, a power of two.
    """

    def __init__(self, block: nn.Module, device: torch.device, offload: bool, float8: bool):
        super().__init__()
        if any(parameter.requires_grad for parameter in block.parameters()):
            raise ValueError("only a frozen block can be stored: a trained one changes its weights")
        self.block, self.device, self.offload = block, device, offload
        self.dtypes: dict[str, torch.dtype] = {}  # of the matrices in 8 bit while the block runs
        self.order: RunningOrder | None = None
        self._fetched: dict[str, OnDevice] | None = None
        self._stream: torch.Stream | None = None
        for name, parameter in list(block.named_parameters()):
            if float8 and parameter.ndim == 2:
                self.dtypes[name] = parameter.dtype
                parameter.data, scale = quantise_rows(parameter.data)
                self.register_buffer(_scale_name(name), scale, persistent=False)
        if offload and (stream := copy_stream(device)) is not None:
            self._stream = stream
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.data = tensor.data.pin_memory()

    def _apply(self, fn, recurse=True):
        return self if self.offload else super()._apply(fn, recurse)

    def fetch(self):
        """Start to copy the weights to the device, unless they are under way."""
        if self._fetched is None:
            stored = {**dict(self.block.named_parameters()), **dict(self.named_buffers(recurse=False))}
            self._fetched = {name: OnDevice(t.detach(), self.device, self._stream) for name, t in stored.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        self.fetch()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        following = self.order and self.order.following(self)
        if following and self._stream is not None:
            following.fetch()
        tensors = {name: copy.get() for name, copy in fetched.items()}
        for name, dtype in self.dtypes.items():
            tensors[name] = tensors[name].to(dtype) * tensors.pop(_scale_name(name)).to(dtype)
        return functional_call(self.block, tensors, args, kwargs)


class RunningOrder:
    """Predicts which of several blocks runs next: the one after, and in the backward pass the one before."""

    def __init__(self, blocks: list[StoredBlock]):
        self.blocks = blocks
        self._last = -1

    def following(self, block: StoredBlock) -> StoredBlock | None:
        """Return the block that will run after `block`, which runs now; None after the last one."""
        index = self.blocks.index(block)
        # The backward pass begins with the block that the forward pass ended with, and goes down from there.
        down = 0 < index <= self._last
        self._last = index
        following = index - 1 if down else index + 1
        return self.blocks[following] if following < len(self.blocks) else None


def _scale_name(name):
    return f"{name.replace('.', '_')}_scale"


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to float8_e4m3fn, each row scaled so that its largest entry is in the upper half of the range.

    Args:
        weight: (rows, columns), finite.

    Returns:
        (rows, columns) float8, and (rows, 1) in weight's dtype: their product is the rounded matrix. The scales are
        powers of two, so the product is exact in bf16 as well.
    """
    largest = weight.abs().amax(1, keepdim=True).double().clamp(min=2.0**-100)  # a row of zeros has a scale too
    scale = torch.exp2(torch.ceil(torch.log2(largest / torch.finfo(FLOAT8).max))).to(weight.dtype)
    return (weight / scale).to(FLOAT8), scale


def store_blocks(blocks: nn.ModuleList, device: torch.device, offload: bool = False, float8: bool = False) -> None:
    """Replace frozen blocks by `StoredBlock`s, in place.

    Args:
        blocks: run one after another, from the first to the last, in their backward pass in reverse.
        device, offload, float8: see `StoredBlock`.
    """
    for index, block in enumerate(blocks):
        blocks[index] = StoredBlock(block, device, offload, float8)
    order = RunningOrder([block for block in blocks if isinstance(block, StoredBlock)])
    for block in order.blocks:
        block.order = order


def stored_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of all `StoredBlock`s in a model."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, StoredBlock)
        for name, _ in (*module.named_parameters(), *module.named_buffers())
    ]
