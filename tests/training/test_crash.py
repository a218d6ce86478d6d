"""The short form of `python -m tests.helpers.crash`; docs/crash/ records the long form."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.commands import succeed
from tests.helpers.crash import command_of, crash_legs, curves, differences
from tests.helpers.forks import fork


@pytest.mark.slow
def test_a_killed_phase2_ends_like_an_uninterrupted_one(tmp_path):
    out, reference, log = crash_legs(tmp_path, 2, 1, [[], ["sampling"]], seed=0, fork=True)
    assert [kill["struck"] for kill in log] == ["sampling"]
    assert differences(out, reference) == []
    # The comparison has included the controller's work: it has lowered the share from 0.25, and in leg two from 0.5.
    assert {value for _, value in curves(reference)["monitor/cg_ratio"]} == {0.125, 0.25}


@pytest.mark.slow
def test_a_killed_phase1_ends_like_an_uninterrupted_one_and_differences_are_found(tmp_path):
    out, reference, log = crash_legs(tmp_path, 1, 1, [["saving"]], seed=0, fork=True)
    assert len(log) == 1
    assert differences(out, reference) == []

    other = tmp_path / "other"
    succeed(*command_of(tmp_path, 1, 1, other, "--max_train_steps=25", "--seed=1"), by=fork)
    found = differences(other, reference)
    files = ("optimizer-00000-of-00001", "ema-00000-of-00001", "model/diffusion_pytorch_model")
    for part in (*(f"checkpoint-25/{name}.safetensors" for name in files), "best/c2r.json", "curve train/loss"):
        assert part in found

    def found_after(change):
        shutil.rmtree(other)
        shutil.copytree(reference, other)
        change()
        return differences(other, reference)

    def change_a_weight():
        file = other / "final/diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        next(iter(weights.values())).view(-1)[0] += 1e-6
        save_file(weights, file, {"format": "pt"})

    def change_the_state():
        state = json.loads((other / "checkpoint-25/state.json").read_text())
        state["progress"]["best"]["loss"] += 1e-9
        (other / "checkpoint-25/state.json").write_text(json.dumps(state))

    assert found_after(lambda: None) == []
    assert found_after(change_a_weight) == ["final/diffusion_pytorch_model.safetensors"]
    assert found_after(change_the_state) == ["checkpoint-25/state.json"]
    assert len(found_after(lambda: shutil.rmtree(other / "checkpoint-24"))) > 1
    assert "curve train/loss" in found_after(lambda: [path.unlink() for path in (other / "logs").glob("events*")])
