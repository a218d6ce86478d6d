"""`--compile`: torch.compile for the blocks of both branches, each block's graph shared by all of its kind."""

from typing import Any

import torch
from torch import nn

from c2r import InputError

#: Graphs of one class of blocks: before and after the first injection, in training, validation and samples, and where
#: a size is 1 or two sizes are equal. Dynamo's own limit of 8 would end compilation with no more than a warning.
MAX_GRAPHS = 64


def require_compiler(device: torch.device) -> None:
    """Check that Inductor can generate code for a device, before any weight is loaded.

    Raises:
        InputError: the compiler that it needs is missing, or it has no code for this kind of device.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--compile: torch.compile has no code for {device.type}; leave it out")
    if device.type == "cuda" and not has_triton():
        raise InputError(
            "--compile: needs Triton, which this torch does not find; pip install triton, or leave it out"
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError("--compile: needs a C++ compiler; install g++ or set CXX, or leave it out") from None


def compile_blocks(model: nn.Module, **compile_options: Any) -> None:
    """Compile the blocks of a model in place, when they first run; names of parameters stay as they are.

    Args:
        model: backbone, or backbone and control branch. Sizes of clips and prompts are variables in the graphs, so
            that another bucket needs no other graph.
        compile_options: see `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    model.compile_repeated_blocks(dynamic=True, **compile_options)  # type: ignore[operator]
