import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from c2r import InputError
from c2r.checkpoint import find_checkpoint, list_checkpoints, register_trainable_weights, save_checkpoint
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.training import LoopState
from tests.tiny import FEATURE_DIM, tiny_transformer


def run_parts(seed):
    """A phase 2 model, optimizer and loop state, prepared and registered as the script does it."""
    backbone = tiny_transformer()
    torch.manual_seed(seed)
    controlnet = C2RControlNet.from_transformer(backbone, 2, 1, feature_dim=FEATURE_DIM)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-2)
    register_trainable_weights(accelerator, controlnet)
    model, optimizer = accelerator.prepare(C2RTransformer(backbone, controlnet), optimizer)
    state = LoopState()
    accelerator.register_for_checkpointing(state)
    return accelerator, model, controlnet, optimizer, state


def train_one_step(accelerator, model, optimizer):
    generator = torch.Generator().manual_seed(0)
    velocity_pred = model(
        torch.randn(1, 4, 2, 4, 4, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 8, 24, generator=generator),
        torch.randn(1, 5, 2, 2, FEATURE_DIM, generator=generator),
    )
    accelerator.backward(velocity_pred.square().mean())
    optimizer.step()
    optimizer.zero_grad()


def test_a_checkpoint_restores_weights_optimizer_and_loop_state(tmp_path):
    accelerator, model, controlnet, optimizer, state = run_parts(seed=1)
    train_one_step(accelerator, model, optimizer)
    state.global_step, state.best_validation_loss, state.metrics = 7, 0.25, {"loss": 0.5}
    state.inputs = {"backbone": "a"}
    save_checkpoint(accelerator, tmp_path, 7)
    train_one_step(accelerator, model, optimizer)

    accelerator2, model2, controlnet2, optimizer2, state2 = run_parts(seed=2)
    accelerator2.load_state(str(find_checkpoint(tmp_path, "latest")))
    assert state2 == LoopState(7, 0.25, {"loss": 0.5}, {"backbone": "a"})
    train_one_step(accelerator2, model2, optimizer2)
    for (name, a), b in zip(controlnet.state_dict().items(), controlnet2.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_checkpoint_holds_no_frozen_weights(tmp_path):
    accelerator, _, controlnet, *_ = run_parts(seed=1)
    save_checkpoint(accelerator, tmp_path, 1)
    weights = list((tmp_path / "checkpoint-1").rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["model"]
    assert load_file(weights[0]).keys() == controlnet.state_dict().keys()


def test_old_checkpoints_are_pruned_after_the_new_one(tmp_path):
    accelerator, *_ = run_parts(seed=1)
    (tmp_path / "checkpoint-9.partial").mkdir()  # left by a killed run
    for step in (2, 9, 10):
        save_checkpoint(accelerator, tmp_path, step, total_limit=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10]
    assert not (tmp_path / "checkpoint-9.partial").exists()


def test_find_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "missing", "latest") is None
    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-100.partial", "other"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-20"
    assert find_checkpoint(tmp_path, "checkpoint-20") == tmp_path / "checkpoint-20"
    with pytest.raises(InputError, match="checkpoint-20 is later"):
        find_checkpoint(tmp_path, "checkpoint-5")
    assert find_checkpoint("elsewhere", str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"
    for name in ("checkpoint-6", "other", str(tmp_path / "checkpoint-7")):
        with pytest.raises(InputError, match="--resume_from_checkpoint"):
            find_checkpoint(tmp_path, name)


def test_other_inputs_than_the_checkpoints_are_refused():
    state = LoopState(inputs={"backbone": "a", "real dataset": "b"})
    state.require_inputs({"backbone": "a", "real dataset": "b"})
    with pytest.raises(InputError, match="real dataset has changed"):
        state.require_inputs({"backbone": "a", "real dataset": "c"})


@pytest.mark.parametrize("name", ["checkpoint-5", "best", "final"])
def test_an_earlier_run_is_not_written_over(name, tmp_path):
    (tmp_path / "logs").mkdir()
    assert find_checkpoint(tmp_path, None) is None
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="--resume_from_checkpoint latest"):
        find_checkpoint(tmp_path, None)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    accelerator, *_ = run_parts(seed=1)
    save_checkpoint(accelerator, tmp_path, 1)
    other = Accelerator(cpu=True)
    controlnet = C2RControlNet.from_transformer(tiny_transformer(), 3, 1, feature_dim=FEATURE_DIM)
    register_trainable_weights(other, controlnet)
    other.prepare(C2RTransformer(tiny_transformer(), controlnet))
    with pytest.raises(InputError, match=r"injection_layers \[0, 1\]"):
        other.load_state(str(tmp_path / "checkpoint-1"))
