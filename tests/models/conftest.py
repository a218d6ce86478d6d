"""A process group of one process, and a model sharded in it as FSDP2 shards it among many."""

import pytest
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


@pytest.fixture
def one_process(tmp_path):
    """Start a process group of this process alone: engines wrap modules as in a group of many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
