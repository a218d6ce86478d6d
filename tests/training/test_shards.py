"""Optimizer states that other processes have cut in any way; engines themselves are tested in test_engines.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from c2r import InputError
from c2r.training.optimizer import adamw_8bit
from c2r.training.shards import (
    MOMENTS,
    Range,
    _Shards,
    ema_shard,
    load_ema,
    load_optimizer,
    optimizer_shard,
    shard_files,
)


def stepped():
    """Return a small model after two steps of AdamW, and its optimizer as Accelerate wraps it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    return model, SimpleNamespace(optimizer=optimizer)


def cut(shard, cuts, path, kind):
    """Write a whole shard as len(cuts) + 1 files; each tensor is cut at these shares of its length."""
    files = [{} for _ in range(len(cuts) + 1)]
    for key, tensor in shard.items():
        name, _, state = key.split(":")
        if state == "step":
            files[0][key] = tensor
            continue
        edges = [0, *(round(share * len(tensor)) for share in sorted(cuts)), len(tensor)]
        for file, start, end in zip(files, edges, edges[1:]):
            if end > start:
                file[f"{name}:{start}:{state}"] = tensor[start:end].clone()
    for i, file in enumerate(files):
        save_file(file, path / f"{kind}-{i:05d}-of-{len(files):05d}.safetensors")


def files_of(path, kind):
    return shard_files(path, [file.name for file in path.iterdir()], kind)


@given(st.lists(st.floats(0, 1), max_size=4))
def test_states_are_joined_however_they_were_cut(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("checkpoint")
    model, optimizer = stepped()
    parameters = dict(model.named_parameters())
    ema = EMAModel([p.detach().clone().requires_grad_() for p in model.parameters()], decay=0.5)
    cut(optimizer_shard(optimizer, parameters), cuts, path, "optimizer")
    cut(ema_shard(ema, parameters), cuts, path, "ema")
    resumed = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters(), fused=True))
    load_optimizer(files_of(path, "optimizer"), resumed, parameters)
    for parameter in parameters.values():
        states = [of.optimizer.state[parameter] for of in (optimizer, resumed)]
        assert [set(state) for state in states] == [{*MOMENTS, "step"}] * 2
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = EMAModel([torch.zeros_like(p).requires_grad_() for p in model.parameters()], decay=0.5)
    load_ema(files_of(path, "ema"), other, parameters)
    assert all(torch.equal(a, b) for a, b in zip(other.shadow_params, ema.shadow_params, strict=True))


@given(st.lists(st.floats(0, 1), max_size=4), st.integers(0, 15), st.integers(0, 15))
def test_a_process_reads_any_range(tmp_path_factory, cuts, a, b):
    path = tmp_path_factory.mktemp("checkpoint")
    model, optimizer = stepped()
    whole = optimizer_shard(optimizer, dict(model.named_parameters()))
    cut(whole, cuts, path, "optimizer")
    start, stop = sorted((a, b))
    with _Shards(files_of(path, "optimizer")) as shards:
        found = shards.range(Range("0.weight", 15, start, stop - start, held=None), "exp_avg")
    assert torch.equal(found, whole["0.weight:0:exp_avg"][start:stop])


def test_a_gap_between_ranges_is_refused(tmp_path):
    model, optimizer = stepped()
    parameters = dict(model.named_parameters())
    cut(optimizer_shard(optimizer, parameters), [0.3, 0.6], tmp_path, "optimizer")
    (tmp_path / "optimizer-00001-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"exp_avg of 0\.weight does not have 15 elements; resume from an earlier"):
        load_optimizer(files_of(tmp_path, "optimizer"), optimizer, parameters)


def test_states_that_are_missing_are_named(tmp_path):
    model, optimizer = stepped()
    parameters = dict(model.named_parameters())
    save_file({}, tmp_path / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(InputError, match=r"exp_avg of 0\.weight does not have 15 elements"):
        load_optimizer(files_of(tmp_path, "optimizer"), optimizer, parameters)
    model, optimizer = stepped()
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="no states of another"):
        optimizer_shard(optimizer, parameters | {"another": torch.nn.Parameter(torch.zeros(3))})
    del optimizer.optimizer.state[next(model.parameters())]
    with pytest.raises(RuntimeError, match=r"no states of 0\.weight"):
        optimizer_shard(optimizer, parameters)


def test_files_that_the_state_does_not_list_are_not_read(tmp_path):
    names = ["optimizer-00000-of-00001.safetensors", "ema-00000-of-00001.safetensors", "model/config.json"]
    assert shard_files(tmp_path, names, "optimizer") == [tmp_path / names[0]]


def test_8_bit_states_of_split_weights_are_those_of_whole_ones(one_process, tmp_path):
    """With one process a part is the whole; a resumed optimizer steps as the first one goes on."""
    pytest.importorskip("bitsandbytes")

    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.Linear(128, 2))
        return model, adamw_8bit()(model.parameters(), lr=1e-2)

    def train(model, optimizer, steps=range(2)):
        for step in steps:
            model(torch.randn(4, 96, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def whole(model):
        return {
            name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()
        }

    def split():
        model, _ = build()
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        return model, adamw_8bit()(model.parameters(), lr=1e-2)

    plain, plain_optimizer = build()
    train(plain, plain_optimizer, range(3))
    model, optimizer = split()
    train(model, optimizer)
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.uint8
    assert set(optimizer.state) == set(model.parameters())

    shard = optimizer_shard(SimpleNamespace(optimizer=optimizer), dict(model.named_parameters()))
    save_file(shard, tmp_path / "optimizer-00000-of-00001.safetensors")
    resumed, resumed_optimizer = split()
    resumed.load_state_dict(model.state_dict())
    files = files_of(tmp_path, "optimizer")
    load_optimizer(files, SimpleNamespace(optimizer=resumed_optimizer), dict(resumed.named_parameters()))
    for one, its_optimizer in ((model, optimizer), (resumed, resumed_optimizer)):
        train(one, its_optimizer, range(2, 3))
        for name, tensor in whole(plain).items():
            assert torch.equal(whole(one)[name], tensor), name
