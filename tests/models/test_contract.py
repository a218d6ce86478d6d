"""The contract of a phase: c2r.json, and the weights that are saved beside it."""

import json

import pytest
import torch

import c2r
from c2r.files import fingerprint
from c2r.models.backbone import load_transformer
from c2r.models.contract import PhaseContract, read_contract, save_phase
from c2r.models.controlnet_files import load_controlnet
from tests.helpers.checks import refusal
from tests.helpers.tiny import tiny_transformer


def test_a_contract_that_cannot_be_read_is_refused_in_one_line(phases):
    path = phases / "phase2/best/c2r.json"
    stored = json.loads(path.read_text())

    def refused(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return refusal(read_contract, phases / "phase2/best")

    assert "not valid JSON" in refused("{")
    assert "unknown entry colour" in refused(stored | {"colour": 1})
    older = refused(stored | {"colour": 1, "version": "0.0.9"})
    assert f"written by version 0.0.9, this is {c2r.__version__}" in older
    without_version = {key: value for key, value in stored.items() if key != "version"}
    assert "written by version unknown" in refused(without_version | {"phase": 3})
    assert "phase is 3" in refused(stored | {"phase": 3})
    assert "needs backbone_sha256" in refused(stored | {"backbone_sha256": None})
    assert "step" in refused({key: value for key, value in stored.items() if key != "step"})
    path.unlink()
    assert "has no c2r.json" in refusal(read_contract, phases / "phase2/best")


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_contract_with_a_non_finite_loss_is_refused(loss):
    with pytest.raises(ValueError, match="must not be saved"):
        PhaseContract(1, "model", 1, loss)


def test_save_phase_takes_gathered_weights_and_only_a_model_of_the_phase(phases):
    gathered = {name: tensor + 1 for name, tensor in tiny_transformer().state_dict().items()}
    contract = PhaseContract(1, "model", 1)
    saved = save_phase(phases / "phase1/final", tiny_transformer(), contract, state_dict=gathered)
    assert saved.weights_sha256 == fingerprint(gathered)
    assert fingerprint(load_transformer(phases / "phase1/final").state_dict()) == fingerprint(gathered)
    controlnet = load_controlnet(phases / "phase2/best")
    gathered = {name: tensor + 1 for name, tensor in controlnet.state_dict().items()}
    save_phase(phases / "phase2/final", controlnet, read_contract(phases / "phase2/best"), state_dict=gathered)
    assert fingerprint(load_controlnet(phases / "phase2/final").state_dict()) == fingerprint(gathered)
    with pytest.raises(TypeError, match="phase 1 saves a WanTransformer3DModel, not a C2RControlNet"):
        save_phase(phases / "phase1/final", controlnet, contract)
    incomplete = {"proj_out.weight": torch.ones(16, 24)}
    with pytest.raises(RuntimeError, match=r"Missing key.*proj_out\.bias"):
        save_phase(phases / "x", tiny_transformer(), contract, state_dict=incomplete)
    assert not (phases / "x").exists()
