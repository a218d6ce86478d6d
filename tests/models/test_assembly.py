"""Models of both phases for generation: those that were trained, with their own backbone, wherever they are."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

import c2r
from c2r.files import fingerprint
from c2r.models.assembly import load_for_generation
from c2r.models.backbone import fingerprint_transformer, load_transformer
from c2r.models.contract import read_contract, save_phase
from c2r.models.controlnet_files import load_controlnet
from c2r.models.hub import fingerprint_files
from c2r.models.transformer import C2RTransformer
from tests.helpers.checks import equal_weights, refusal
from tests.helpers.tiny import tiny_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_phase_1_loads_with_diffusers_and_for_generation(phases):
    folder = phases / "phase1/best"
    expected = tiny_transformer(seed=3)
    assert equal_weights(WanTransformer3DModel.from_pretrained(folder), expected)
    assert equal_weights(load_transformer(folder), expected)
    model, contract = load_for_generation(folder)
    assert equal_weights(model, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert contract.weights_sha256 == fingerprint(expected.state_dict()) == fingerprint_files(folder)
    assert (contract.phase, contract.step, contract.validation_loss) == (1, 100, 0.25)
    assert contract.version == c2r.__version__
    assert contract.versions["torch"] == torch.__version__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phase_2_loads_with_its_backbone(phases, dtype):
    model, contract = load_for_generation(phases / "phase2/best", torch_dtype=dtype)
    assert isinstance(model, C2RTransformer)
    assert equal_weights(model.transformer, load_transformer(phases / "phase1/best", torch_dtype=dtype))
    assert equal_weights(model.controlnet, load_controlnet(phases / "phase2/best", torch_dtype=dtype))
    assert model.dtype == dtype
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert contract == read_contract(phases / "phase2/best")
    assert contract.backbone == os.path.realpath(phases / "phase1/best")
    assert contract.dinov3 == "facebook/dinov3-vitb16-pretrain-lvd1689m"
    assert (contract.height, contract.width, contract.num_frames, contract.fps) == (32, 48, 9, 16)


def test_both_phases_can_be_moved_together(phases):
    before = load_for_generation(phases / "phase2/best")[0]
    stored = json.loads((phases / "phase2/best/c2r.json").read_text())
    assert (stored["backbone"], stored["base_model"]) == ("../../phase1/best", "../../model")
    moved = phases / "elsewhere/deeper"
    moved.mkdir(parents=True)
    for name in ("model", "phase1", "phase2"):
        (phases / name).rename(moved / name)
    model, contract = load_for_generation(moved / "phase2/best")
    assert equal_weights(model, before)
    assert contract.base_model == os.path.realpath(moved / "model")


def test_a_contract_may_name_paths_relative_to_the_current_directory(phases, monkeypatch):
    monkeypatch.chdir(phases)
    contract = replace(read_contract("phase2/best"), backbone="phase1/best", base_model="model")
    save_phase("phase2/final", load_controlnet("phase2/best"), contract)
    monkeypatch.chdir(phases / "phase2")
    assert load_for_generation("final")[1].backbone == os.path.realpath(phases / "phase1/best")


def test_another_backbone_is_refused_with_both_fingerprints(phases):
    message = refusal(load_for_generation, phases / "phase2/best", backbone=phases / "model")
    assert fingerprint_transformer(phases / "model") in message
    assert fingerprint_transformer(phases / "phase1/best") in message
    same = shutil.copytree(phases / "phase1/best", phases / "copy")
    load_for_generation(phases / "phase2/best", backbone=same)


def test_a_backbone_for_a_whole_model_is_refused(phases):
    for backbone in (phases / "model", "/no/such/model"):
        message = refusal(load_for_generation, phases / "phase1/best", backbone=backbone)
        assert message.startswith(f"--backbone {backbone} (in Python backbone=): ")
        assert message.endswith("is a whole backbone itself; leave it out")


def test_a_backbone_with_one_changed_byte_is_refused(phases):
    path = phases / "phase1/best" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "not the backbone of" in refusal(load_for_generation, phases / "phase2/best")


def test_a_best_folder_that_is_being_replaced_can_be_read(phases):
    for name in ("phase1", "phase2"):
        (phases / name / "best").rename(phases / name / ".best.old")
    model, contract = load_for_generation(phases / "phase2/best")
    assert isinstance(model, C2RTransformer)
    assert contract.base_model == os.path.realpath(phases / "model")
    assert not (phases / "phase1/best").exists()
    assert not (phases / "phase2/best").exists()
