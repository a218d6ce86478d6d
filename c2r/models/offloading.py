"""Keep the inputs of checkpointed blocks on the CPU until their backward pass.

On CUDA the copies go through pinned memory on a stream of their own, one block ahead of the computation. On other
devices they are made when they are needed.
"""

import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks


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
