"""A model sharded in a process group of one process as FSDP2 shards it among many."""

import pytest
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


@pytest.fixture
def shard(one_process):
    """Return a function that shards a model's blocks and the model.

    One rank shards as many do: a parameter read outside a hooked forward would be a DTensor and raise.
    """

    def shard_model(model):
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in reversed(list(model.modules())):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    return shard_model
