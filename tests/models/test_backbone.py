"""The Wan backbone: the same weights from folders, files and the hub, and one line for one that does not fit."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from c2r import InputError
from c2r.files import fingerprint
from c2r.models import hub
from c2r.models.backbone import (
    check_transformer,
    fingerprint_transformer,
    load_transformer,
    read_transformer_config,
)
from tests.helpers.checks import equal_weights, refusal
from tests.helpers.tiny import tiny_transformer
from tests.helpers.weight_forms import original_names, write_form

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("form", ["pipeline", "folder", "diffusers file", "original file", "prefixed original file"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_transformer_loads_from_folders_and_single_files(pipeline, tmp_path, form, dtype):
    expected = WanTransformer3DModel.from_pretrained(pipeline / "transformer", torch_dtype=dtype or torch.float32)
    weights, file = load_file(pipeline / "transformer" / WEIGHTS), tmp_path / "dit.safetensors"
    if form == "diffusers file":
        save_file(weights, file)
    elif form == "original file":
        save_file(original_names(weights), file)
    elif form == "prefixed original file":
        save_file({f"model.diffusion_model.{k}": v for k, v in original_names(weights).items()}, file)
    path = {"pipeline": pipeline, "folder": pipeline / "transformer"}.get(form, file)

    transformer = load_transformer(path, base=pipeline, torch_dtype=dtype)

    assert equal_weights(transformer, expected)
    assert [p.dtype for p in transformer.parameters()] == [p.dtype for p in expected.parameters()]
    assert all(p.requires_grad and not p.is_meta for p in transformer.parameters())
    assert not transformer.training
    assert all(torch.equal(a, b) for a, b in zip(transformer.buffers(), expected.buffers(), strict=True))
    assert fingerprint_transformer(path, pipeline) == fingerprint(weights)  # the same in every form
    if dtype is None:
        assert fingerprint(transformer.state_dict()) == fingerprint(weights)


@pytest.mark.parametrize("form", ["pipeline", "original"])
def test_a_hub_model_may_have_either_layout(form, pipeline, tmp_path, monkeypatch):
    """Fetch the configs, which tell where the weights are, then these alone."""
    if form == "original":
        write_form("original shards", tmp_path, tiny_transformer())
    patterns, folder = [], pipeline if form == "pipeline" else tmp_path

    def download(name, allow_patterns, ignore_patterns):
        assert name == "Wan-AI/Wan2.1"
        patterns.append(allow_patterns)
        return folder

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert read_transformer_config("Wan-AI/Wan2.1")["num_layers"] == 4
    assert patterns == [["*.json"]]
    assert check_transformer("Wan-AI/Wan2.1", pipeline)[0] == (
        folder / "transformer" if form == "pipeline" else folder
    )
    assert patterns[1:] == [["*.json"], ["*.json", "transformer/*"] if form == "pipeline" else None]


def test_bf16_keeps_time_embedder_norms_and_modulation_in_fp32(pipeline):
    transformer = load_transformer(pipeline, torch_dtype=torch.bfloat16)
    kept = {name for name, parameter in transformer.named_parameters() if parameter.dtype == torch.float32}
    per_block = {"norm2.weight", "norm2.bias", "scale_shift_table"}  # norm1 and norm3 have no parameters
    assert kept == {
        "scale_shift_table",
        *(f"condition_embedder.time_embedder.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"blocks.{i}.{name}" for i in range(4) for name in per_block),
    }


def test_an_unfit_transformer_is_refused_before_its_weights_are_read(pipeline, phases, tmp_path, monkeypatch):
    def folder(name, **config):
        copy = shutil.copytree(pipeline / "transformer", tmp_path / name)
        path = copy / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return copy

    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", None)
    monkeypatch.setattr("c2r.models.hub.WeightIndex.tensors", None)
    assert "no such model folder" in refusal(load_transformer, "/no/such/folder")
    assert "model class is AutoencoderKLWan" in refusal(load_transformer, pipeline / "vae")
    assert "model class is C2RControlNet" in refusal(load_transformer, phases / "phase2/best")
    assert "no transformer here" in refusal(load_transformer, tmp_path)
    assert "image-to-video" in refusal(load_transformer, folder("i2v", image_dim=1280))
    assert "weights are missing: blocks.4.attn1" in refusal(load_transformer, folder("deep", num_layers=5))
    assert "unexpected or of another shape: blocks.3.attn1" in refusal(load_transformer, folder("flat", num_layers=3))
    wide = refusal(load_transformer, folder("wide", ffn_dim=64))
    assert "of another shape: blocks.0.ffn.net.0.proj.bias (48,)" in wide
    assert "more; the file is damaged or of another model" in wide
    (folder("empty") / WEIGHTS).unlink()
    assert "has no safetensors weights" in refusal(load_transformer, tmp_path / "empty")
    broken = folder("broken") / WEIGHTS
    broken.write_bytes(broken.read_bytes()[:-1000])
    assert "cannot be read as safetensors" in refusal(load_transformer, tmp_path / "broken")

    vae = pipeline / "vae" / WEIGHTS
    assert "a single file has no config" in refusal(load_transformer, vae)
    assert "weights are missing" in refusal(load_transformer, vae, base=pipeline)
    assert "no such .safetensors or .gguf file" in refusal(load_transformer, "dit.safetensors", base=pipeline)
    (tmp_path / "dit.pth").touch()
    assert "files of this kind can hold code" in refusal(load_transformer, tmp_path / "dit.pth", base=pipeline)
    (tmp_path / "dit.txt").touch()
    assert "not a .safetensors or .gguf file" in refusal(load_transformer, tmp_path / "dit.txt", base=pipeline)
    assert check_transformer(pipeline)[0] == pipeline / "transformer"


@pytest.mark.parametrize(("changed", "part"), [({"in_channels": 8}, "vae"), ({"text_dim": 32}, "text_encoder")])
def test_a_backbone_that_does_not_fit_the_pipeline_is_refused(pipeline, tmp_path, changed, part):
    tiny_transformer(**changed).save_pretrained(tmp_path)
    check_transformer(tmp_path)
    with pytest.raises(InputError, match=f"{next(iter(changed))} is .* but the {part} of"):
        check_transformer(tmp_path, pipeline)
