"""Measure the memory of real CPU tensors by the events of torch's allocator, as torch.profiler records them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """Run a function; return the most bytes that were allocated beyond those before it."""
    # Without oneDNN: on a CPU that has no bf16 instructions, its products in bf16 take scratch memory in fp32.
    without_onednn = torch.backends.mkldnn.flags(enabled=False)
    with without_onednn, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    allocated = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return most


def storage_bytes(*tensors: torch.Tensor) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
