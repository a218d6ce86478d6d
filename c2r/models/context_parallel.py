"""Context parallelism: the tokens of one clip split among processes, where one device cannot hold them all.

Diffusers' plan says where a model's tokens are split and where they are gathered again. Self-attention, which needs
all tokens, exchanges them for heads and back by two all-to-alls. Source: Jacobs et al. 2023 (DeepSpeed Ulysses)
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from c2r.models.attention import LeanAttnProcessor
from c2r.models.controlnet import C2RControlNet
from c2r.models.offloading import StoredBlock


class _TimesDegree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, degree):
        ctx.degree = degree
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.degree, None


class ContextParallel:
    """Splits the tokens of a model's forward among groups of neighbouring processes, from its creation on.

    All processes of a group are given the same inputs, and have the same output: the whole prediction. In the backward
    pass each computes the part of every weight's gradient that its tokens give, times the degree. The average over all
    processes, which every training engine takes, is then the sum over a group's parts and the mean over the groups.

    Args:
        model: holds a backbone and perhaps a control branch, with `LeanAttnProcessor`s; no engine has prepared it yet.
        degree: processes of a group; at least 2, it divides the processes, the heads and the tokens.
        device: device of the model.
        timeout: of collectives within a group.
    """

    def __init__(self, model: nn.Module, degree: int, device: torch.device, timeout: timedelta):
        # Diffusers' gather calls a function of torch by its old name.
        warnings.filterwarnings("ignore", ".*all_gather_tensor` is deprecated", FutureWarning)
        groups = dist.get_world_size() // degree
        mesh = init_device_mesh(device.type, (groups, 1, degree), mesh_dim_names=("data", "ring", "ulysses"))
        self._config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
        self._config.setup(dist.get_rank(), dist.get_world_size(), device, mesh)
        # Groups of a mesh have torch's default, which may be below that of the run.
        for part in (self._config._ulysses_mesh, self._config._flattened_mesh):
            _set_pg_timeout(timeout, part.get_group())
        self._plans = [(module, _plan(module)) for module in model.modules() if _has_plan(module)]
        self._processors = [
            module.processor
            for module in model.modules()
            if isinstance(module, WanAttention) and isinstance(module.processor, LeanAttnProcessor)
        ]
        for module, _ in self._plans:
            if isinstance(module, WanTransformer3DModel):
                # After the plan's hook, which gathers in the module's own forward.
                module.proj_out.register_forward_hook(lambda *call: _TimesDegree.apply(call[-1], degree))
        self._split()

    def _split(self):
        for module, plan in self._plans:
            apply_context_parallel(module, self._config, plan)
        for processor in self._processors:
            processor.token_group = self._config._ulysses_mesh.get_group()

    @contextmanager
    def whole_clips(self) -> Iterator[None]:
        """Let each process run the model on clips of its own within the body, for evaluation."""
        for module, plan in self._plans:
            remove_context_parallel(module, plan)
        for processor in self._processors:
            processor.token_group = None
        try:
            yield
        finally:
            self._split()


def _has_plan(module):
    # A ControlNet without blocks adds its tokens before they are split.
    return isinstance(module, WanTransformer3DModel) or (isinstance(module, C2RControlNet) and module.control_blocks)


def _plan(module):
    # The entry of the model itself splits one noise level per token, which text-to-video does not have.
    plan = {name: entry for name, entry in module._cp_plan.items() if name}
    if isinstance(module, WanTransformer3DModel) and isinstance(module.blocks[0], StoredBlock):
        plan["blocks.0.block"] = plan.pop("blocks.0")  # the hook looks for the block's own names of inputs
    return plan
