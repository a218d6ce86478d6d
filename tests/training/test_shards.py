"""Optimizer states that other processes have cut in any way; engines themselves are tested in test_engines.py."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from c2r import InputError
from c2r.training.shards import MOMENTS, ema_shard, load_ema, load_optimizer, optimizer_shard


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


@given(st.lists(st.floats(0, 1), max_size=4))
def test_states_are_joined_however_they_were_cut(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("checkpoint")
    model, optimizer = stepped()
    parameters = dict(model.named_parameters())
    ema = EMAModel([p.detach().clone().requires_grad_() for p in model.parameters()], decay=0.5)
    cut(optimizer_shard(optimizer, parameters), cuts, path, "optimizer")
    cut(ema_shard(ema, parameters), cuts, path, "ema")
    resumed = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters(), fused=True))
    load_optimizer(path, resumed, parameters)
    for parameter in parameters.values():
        states = [of.optimizer.state[parameter] for of in (optimizer, resumed)]
        assert [set(state) for state in states] == [{*MOMENTS, "step"}] * 2
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = EMAModel([torch.zeros_like(p).requires_grad_() for p in model.parameters()], decay=0.5)
    load_ema(path, other, parameters)
    assert all(torch.equal(a, b) for a, b in zip(other.shadow_params, ema.shadow_params, strict=True))


def test_a_gap_between_ranges_is_refused(tmp_path):
    model, optimizer = stepped()
    parameters = dict(model.named_parameters())
    cut(optimizer_shard(optimizer, parameters), [0.3, 0.6], tmp_path, "optimizer")
    (tmp_path / "optimizer-00001-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"exp_avg of 0\.weight does not have 15 elements; resume from an earlier"):
        load_optimizer(tmp_path, optimizer, parameters)


def test_a_checkpoint_before_the_first_step_has_no_states(tmp_path):
    model, optimizer = stepped()
    save_file({}, tmp_path / "optimizer-00000-of-00001.safetensors")
    load_optimizer(tmp_path, optimizer, dict(model.named_parameters()))
    assert not optimizer.optimizer.state
