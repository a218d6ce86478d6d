"""Keep tensors on the CPU between their uses: the inputs of checkpointed blocks, and the weights of frozen blocks.

On CUDA the copies go through pinned memory on a stream of their own, one block ahead of the computation. On other
devices they are made when they are needed.
"""

import weakref
from collections.abc import Callable
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
        # Memory of the computing stream, which may be what an earlier block has freed: the copy waits until that block
        # has run. With memory of its own stream, the host would run ahead and allocate every block again.
        self._tensor = torch.empty_like(tensor, device=device)
        stream.wait_stream(torch.accelerator.current_stream(device))
        with stream:
            self._tensor.copy_(tensor, non_blocking=True)
        self._copied = stream.record_event()

    def get(self) -> torch.Tensor:
        """Return the tensor on the device; what the caller's stream does next waits for the copy."""
        if self._copied is not None:
            torch.accelerator.current_stream(self._tensor.device).wait_event(self._copied)
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
        self.copied = stream.record_event()

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
        self._leaving: tuple[torch.Tensor, torch.Event] | None = None  # kept until it is copied

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
        if self._stream is not None:
            if self._leaving is not None:  # what reuses its memory must come after the copy
                torch.accelerator.current_stream(tensor.device).wait_event(self._leaving[1])
            self._leaving = tensor, parked.copied
        return parked

    def _unpack(self, packed):
        return packed.take() if isinstance(packed, _Parked) else packed


# ------------------------------------------------------------------------------------------- weights of frozen blocks

FLOAT8 = torch.float8_e4m3fn


class StoredBlock(nn.Module):
    """A block whose frozen weights are stored elsewhere or in 8 bit, and are whole on the device only while it runs.

    The forward runs the block on copies of its weights, which are freed when another block starts. With checkpointing
    the backward pass makes them again.

    Args:
        block: its frozen parameters become the stored ones; those that train, of a LoRA, stay as they are.
        order: the blocks that run one after another; this one is appended.
        device: device that the block runs on.
        offload: store the weights on the CPU; moving the model leaves them there.
        float8: store the matrices in float8_e4m3fn with one scale per row, a power of two.
    """

    def __init__(self, block: nn.Module, order: "RunningOrder", device: torch.device, offload: bool, float8: bool):
        super().__init__()
        if all(parameter.requires_grad for parameter in block.parameters()):
            raise ValueError("only frozen weights can be stored: training changes the others")
        self.block, self.order, self.device, self.offload = block, order, device, offload
        order.blocks.append(self)
        self.dtypes: dict[str, torch.dtype] = {}  # of the matrices in 8 bit while the block runs
        self._copies: dict[str, OnDevice] | None = None  # under way to the device
        self._whole: dict[str, torch.Tensor] | None = None
        self.stream: torch.Stream | None = None
        for name, parameter in self.stored_parameters():
            if float8 and parameter.ndim == 2:
                self.dtypes[name] = parameter.dtype
                parameter.data, scale = quantise_rows(parameter.data)
                self.register_buffer(_scale_name(name), scale, persistent=False)
        if offload and (stream := copy_stream(device)) is not None:
            self.stream = stream
            for tensor in (*(parameter for _, parameter in self.stored_parameters()), *self.buffers()):
                tensor.data = tensor.data.pin_memory()

    def stored_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the stored parameters by the block's names."""
        return [(name, parameter) for name, parameter in self.block.named_parameters() if not parameter.requires_grad]

    def _apply(self, fn, recurse=True):
        if not self.offload:
            return super()._apply(fn, recurse)
        for parameter in self.block.parameters():
            if parameter.requires_grad:
                parameter.data = fn(parameter.data)
        return self

    def fetch(self):
        """Start to copy the weights to the device, unless they are there or under way."""
        if self._copies is None and self._whole is None:
            stored = {**dict(self.stored_parameters()), **dict(self.named_buffers(recurse=False))}
            self._copies = {name: OnDevice(t.detach(), self.device, self.stream) for name, t in stored.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole stored weights on the device, by the block's names."""
        self.fetch()
        if self._copies is not None:
            whole = {name: copy.get() for name, copy in self._copies.items()}
            for name, dtype in self.dtypes.items():
                whole[name] = whole[name].to(dtype) * whole.pop(_scale_name(name)).to(dtype)
            self._whole, self._copies = whole, None
        assert self._whole is not None
        return self._whole

    def free(self):
        """Free the copies of the weights, unless autograd still needs them."""
        self._whole = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        self.order.start(self)
        return functional_call(self.block, self.weights(), args, kwargs)

    def bind(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs the forward of a part of the block on whole weights.

        The parts of a block may be checkpointed by themselves, and then run again after the block's own forward.

        Args:
            name: path of the part in the block.
            forward: of this part.
        """
        call = _Call(self.block.get_submodule(name), forward)
        prefix = f"{name}."
        paths = [path for path, _ in self.stored_parameters() if path.startswith(prefix)]
        names = {f"part.{path.removeprefix(prefix)}": path for path in paths}

        def run(*args):
            weights = self.weights()
            return functional_call(call, {own: weights[path] for own, path in names.items()}, args)

        return run


class _Call(nn.Module):
    """A forward as a module, for `functional_call`, beside the part that it belongs to."""

    def __init__(self, part, forward):
        super().__init__()
        self.part, self.forward = part, forward


class RunningOrder:
    """The blocks that run one after another, in the backward pass in reverse."""

    def __init__(self) -> None:
        self.blocks: list[StoredBlock] = []
        self._last = -1

    def start(self, block: StoredBlock):
        """Free the weights of the other blocks, and on CUDA start to copy those of the next one."""
        for other in self.blocks:
            if other is not block:
                other.free()
        following = self.following(block)
        block.fetch()
        if following is not None and following.stream is not None:
            following.fetch()

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
    """Replace blocks, frozen but for a LoRA, by `StoredBlock`s, in place.

    Args:
        blocks: run one after another, from the first to the last, in their backward pass in reverse.
        device, offload, float8: see `StoredBlock`.
    """
    order = RunningOrder()
    for index, block in enumerate(blocks):
        blocks[index] = StoredBlock(block, order, device, offload, float8)


def stored_names(model: nn.Module) -> list[str]:
    """Return the names of the stored parameters and the buffers of all `StoredBlock`s in a model."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, StoredBlock)
        for name in (*(f"block.{own}" for own, _ in module.stored_parameters()), *dict(module.named_buffers()))
    ]
