"""LoRAs in C2RPipeline and c2r.generate: added while weights are loaded, or by Diffusers' own methods."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from c2r import InputError
from c2r.export import main as export_main
from c2r.generate import main
from c2r.models.assembly import load_for_generation
from c2r.models.backbone import fingerprint_transformer, load_transformer, read_transformer_config
from c2r.models.contract import PhaseContract, save_phase
from c2r.models.lora import LoraWeights, save_lora
from c2r.models.lora_file import LoraFile
from c2r.pipeline import C2RPipeline
from tests.helpers.commands import same
from tests.helpers.tiny import tiny_inputs, tiny_transformer
from tests.helpers.trained import SIZE, save_trained_models
from tests.helpers.weight_forms import write_form

SCALE = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The trained models; lora/, which phase 1 trained on base; and comfyui.safetensors, for any backbone."""
    folder = save_trained_models(tmp_path_factory.mktemp("models"))
    base = str(folder / "base")
    transformer = load_transformer(base)
    lora = random_lora(transformer.config, rank=3, seed=4)
    contract = {"backbone": base, "backbone_sha256": fingerprint_transformer(base), "lora_rank": 3}
    save_phase(folder / "lora", lora, PhaseContract(phase=1, base_model=base, step=1, **SIZE, **contract))
    save_lora(folder / "comfyui.safetensors", lora, comfyui=True)
    return folder


def outputs(pipeline):
    """Return the joined model's prediction for one input."""
    with torch.no_grad():
        return pipeline.transformer(*tiny_inputs()).sample


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def test_load_lora_weights_and_its_kin_work_on_the_joined_model(folder):
    plain = C2RPipeline.from_pretrained(folder / "phase2/best")
    whole, half = (
        outputs(C2RPipeline.from_pretrained(folder / "phase2/best", loras=[LoraFile(folder / "lora", scale)]))
        for scale in (1, SCALE)
    )
    before = outputs(plain)
    assert not close(before, whole)
    plain.load_lora_weights(folder / "lora", adapter_name="one")
    assert close(outputs(plain), whole)
    plain.set_adapters("one", SCALE)
    assert close(outputs(plain), half)
    plain.load_lora_weights(folder, weight_name="comfyui.safetensors", use_safetensors=True, adapter_name="two")
    plain.set_adapters(["one", "two"], [0.25, 0.25])
    assert plain.get_active_adapters() == ["one", "two"]
    assert close(outputs(plain), half)  # the same LoRA twice
    plain.disable_lora()
    assert close(outputs(plain), before)
    plain.enable_lora()
    plain.fuse_lora()
    plain.unload_lora_weights()
    assert close(outputs(plain), half)


def test_unloading_gives_the_model_back(folder):
    pipeline = C2RPipeline.from_pretrained(folder / "phase2/best")
    names, before = list(pipeline.transformer.state_dict()), outputs(pipeline)
    pipeline.load_lora_weights(folder / "lora")
    pipeline.unload_lora_weights()
    assert list(pipeline.transformer.state_dict()) == names
    assert torch.equal(outputs(pipeline), before)


def test_a_trained_lora_is_a_model_of_its_own(folder, tmp_path):
    """Phase 1's folder loads as its backbone with the LoRA, and is saved as one folder without a LoRA."""
    pipeline = C2RPipeline.from_pretrained(folder / "lora")
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = C2RPipeline.from_pretrained(tmp_path / "pipeline")
    expected = load_transformer(folder / "lora").state_dict()
    for loaded in (pipeline, again):
        state_dict = loaded.transformer.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_dict.items())
    assert pipeline.contract.lora_rank == 3
    assert again.contract.lora_rank is None


def test_a_lora_of_another_backbone_gets_a_warning(folder, caplog):
    """LoRAs may be given as paths; only one of a phase 1 tells its backbone."""
    warnings = "was trained on another backbone"
    C2RPipeline.from_pretrained(folder / "phase1/best", loras=[folder / "comfyui.safetensors"], text_encoder=None)
    assert warnings not in caplog.text
    C2RPipeline.from_pretrained(folder / "lora", loras=[str(folder / "lora")], text_encoder=None)
    assert warnings not in caplog.text
    C2RPipeline.from_pretrained(folder / "phase1/best", loras=[folder / "lora"], text_encoder=None)
    assert f"--lora {folder / 'lora'}: {warnings}" in caplog.text


def random_lora(config, rank=2, seed=8):
    lora = LoraWeights.from_config(LoraWeights.config_of(config, rank))
    torch.manual_seed(seed)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return lora


def save_over(backbone, folder, base):
    """Save a random LoRA whose contract names a backbone."""
    names = {"base_model": str(base), "backbone": str(backbone), "backbone_sha256": fingerprint_transformer(backbone)}
    contract = PhaseContract(phase=1, step=1, lora_rank=2, **SIZE, **names)
    save_phase(folder, random_lora(tiny_transformer().config), contract)
    return folder


def test_a_lora_over_a_lora_adds_both(folder, tmp_path):
    outer = save_over(folder / "lora", tmp_path / "outer", folder / "base")
    loras = [LoraFile(folder / "lora"), LoraFile(outer)]
    expected = load_transformer(folder / "base", loras=loras).state_dict()
    assert same(load_transformer(outer).state_dict(), expected)
    assert same(C2RPipeline.from_pretrained(outer).transformer.state_dict(), expected)
    export_main([f"--model={outer}", "--format=original", f"--output={tmp_path / 'out.safetensors'}"])
    assert same(load_transformer(tmp_path / "out.safetensors", folder / "base").state_dict(), expected)
    assert len({fingerprint_transformer(f) for f in (outer, folder / "lora", folder / "base")}) == 3


def test_a_lora_on_itself_is_refused(folder, tmp_path):
    lora = shutil.copytree(folder / "lora", tmp_path / "lora")
    contract = json.loads((lora / "c2r.json").read_text()) | {"backbone": "./.", "base_model": str(folder / "base")}
    (lora / "c2r.json").write_text(json.dumps(contract))
    for read in (load_transformer, fingerprint_transformer, read_transformer_config):
        with pytest.raises(InputError, match="names a backbone that has this LoRA already"):
            read(lora)


def test_the_export_compares_the_backbone_with_that_of_training(folder, tmp_path):
    base = shutil.copytree(folder / "base", tmp_path / "base")
    lora = save_over(base, tmp_path / "lora", base)
    tiny_transformer(seed=9).save_pretrained(base / "transformer")
    with pytest.raises(InputError, match="its LoRA was trained on the backbone"):
        export_main([f"--model={lora}", "--format=original", f"--output={tmp_path / 'out.safetensors'}"])
    assert not (tmp_path / "out.safetensors").exists()


def test_phase_2_over_a_lora_loads_once_the_contract_names_where_the_backbone_is(folder, tmp_path):
    base = shutil.copytree(folder / "base", tmp_path / "base")
    lora = save_over(base, tmp_path / "lora", base)
    shutil.copytree(folder / "phase2/best", tmp_path / "phase2")
    stored = json.loads((tmp_path / "phase2/c2r.json").read_text())
    stored |= {"base_model": str(base), "dinov3": str(folder / "dinov3"), "backbone": str(lora)}
    stored |= {"backbone_base": str(base), "backbone_sha256": fingerprint_transformer(lora)}
    (tmp_path / "phase2/c2r.json").write_text(json.dumps(stored))
    before = load_for_generation(tmp_path / "phase2")[0].state_dict()

    moved = base.rename(tmp_path / "moved")
    entry = f"write its new place as the entry backbone into {lora / 'c2r.json'}"
    with pytest.raises(InputError, match=re.escape(entry)):
        load_for_generation(tmp_path / "phase2", base=moved)
    contract = json.loads((lora / "c2r.json").read_text())
    (lora / "c2r.json").write_text(json.dumps(contract | {"backbone": str(moved)}))
    assert same(load_for_generation(tmp_path / "phase2", base=moved)[0].state_dict(), before)


def test_another_backbone_is_refused(folder, tmp_path):
    save_phase(tmp_path / "other", tiny_transformer(seed=9), PhaseContract(1, str(folder / "base"), 1))
    with pytest.raises(InputError, match="not the backbone of"):
        C2RPipeline.from_pretrained(folder / "lora", backbone=tmp_path / "other")
    same = C2RPipeline.from_pretrained(folder / "lora", backbone=folder / "base/transformer")
    assert same.contract.backbone == str(folder / "base/transformer")


def test_the_command_adds_loras(folder, tmp_path):
    def generated(*options):
        arguments = [f"--model={folder / 'phase1/best'}", "--prompt=a street", f"--output={tmp_path / 'out.mp4'}"]
        main([*arguments, "--num_inference_steps=2", "--guidance_scale=1", *options])
        return (tmp_path / "out.mp4").read_bytes()

    plain, one = generated(), generated(f"--lora={folder / 'lora'}:{SCALE}")
    assert plain != one
    assert one == generated(f"--lora={folder / 'comfyui.safetensors'}:{SCALE}")
    assert one == generated(f"--lora={folder / 'lora'}:{SCALE}", f"--lora={folder / 'comfyui.safetensors'}:0")
    assert plain == generated(f"--lora={folder / 'lora'}:0.0")
    with pytest.raises(InputError, match="its scale is no number"):
        generated(f"--lora={folder / 'lora'}:much")
    with pytest.raises(InputError, match="no LoRA here"):
        generated(f"--lora={folder / 'phase2/best'}")


def test_a_lora_is_saved_once_it_is_fused(folder, tmp_path):
    pipeline = C2RPipeline.from_pretrained(folder / "phase2/best")
    pipeline.load_lora_weights(folder / "lora")
    with pytest.raises(InputError, match=r"has a LoRA; call pipeline\.fuse_lora\(\) and then pipeline\.unload_lora"):
        pipeline.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert torch.equal(outputs(C2RPipeline.from_pretrained(tmp_path / "pipeline")), outputs(pipeline))


def test_exports_are_read_back(folder, tmp_path):
    def export(*options):
        output = tmp_path / "out.safetensors"
        export_main([f"--model={folder / 'lora'}", f"--output={output}", *options])
        return output

    trained = LoraWeights.load(folder / "lora").state_dict()
    lora = {name.removeprefix("transformer."): t for name, t in load_file(export("--format=lora")).items()}
    assert same(lora, trained)
    half = load_file(export("--format=lora", "--dtype=bf16"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.values())
    assert export("--format=lora-comfyui").read_bytes() == (folder / "comfyui.safetensors").read_bytes()
    expected = load_transformer(folder / "lora").state_dict()
    assert same(load_transformer(export("--format=original"), folder / "base").state_dict(), expected)
    with pytest.raises(InputError, match="has no LoRA"):
        export_main([f"--model={folder / 'phase1/best'}", "--format=lora", f"--output={tmp_path / 'x.safetensors'}"])


@pytest.mark.parametrize("form", ["original shards", "ComfyUI file", "fp8_scaled file"])
def test_every_layout_of_a_backbone_takes_a_lora(form, folder, tmp_path):
    path = write_form(form, tmp_path, tiny_transformer())
    plain = load_transformer(path, folder / "base").state_dict()
    lora = LoraFile(folder / "lora", SCALE)
    summed = load_transformer(path, folder / "base", loras=[lora]).state_dict()
    assert same(summed, {name: lora.add_to(name, tensor) for name, tensor in plain.items()})


def test_a_quantised_backbone_takes_no_lora(folder, tmp_path):
    path = write_form("Q8_0", tmp_path, tiny_transformer())
    with pytest.raises(InputError, match="its weights are quantised, so no LoRA can be added"):
        load_transformer(path, folder / "base", loras=[LoraFile(folder / "lora")])
