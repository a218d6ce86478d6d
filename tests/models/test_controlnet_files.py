"""Files of a control branch: one line for those that are damaged or made for another backbone."""

import torch
from safetensors.torch import load_file, save_file

from c2r.models.controlnet_files import check_controlnet, control_start_config, load_controlnet
from tests.helpers.checks import refusal
from tests.helpers.tiny import tiny_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_damaged_controlnet_is_refused(phases):
    folder = phases / "phase2/best"
    weights = load_file(folder / WEIGHTS)
    del weights["control_adapter.proj.bias"]
    weights["control_adapter.gate"] = torch.ones(1)
    save_file(weights, folder / WEIGHTS)
    for function in (load_controlnet, check_controlnet):
        assert "weights are missing: control_adapter.proj.bias" in refusal(function, folder)


def test_a_start_for_another_backbone_is_refused(phases):
    folder = phases / "phase2/best"
    assert control_start_config(folder, tiny_transformer().config)["injection_layers"] == [0, 1]
    message = refusal(control_start_config, folder, tiny_transformer(num_layers=5).config)
    assert message == f"{folder}: made for a backbone with num_layers 4, this one has 5; give that backbone"
