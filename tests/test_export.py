"""Exported models are read back by stock Diffusers and by this package, bit for bit."""

import os
import shutil

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from c2r import InputError, cli
from c2r.export import FORMATS, main
from c2r.files import fingerprint
from c2r.models.assembly import load_for_generation
from c2r.models.backbone import fingerprint_transformer, load_transformer
from c2r.models.contract import PhaseContract, save_phase
from c2r.models.controlnet import C2RControlNet
from c2r.models.hub import WeightIndex
from c2r.models.original_layout import original_names, save_original
from c2r.options import EXPORT
from c2r.pipeline import C2RPipeline
from tests.helpers.tiny import FEATURE_DIM, save_tiny_dinov3, save_tiny_pipeline, tiny_transformer
from tests.helpers.weight_forms import original_names as names_by_hand

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """A folder with a base model, a phase 1 and a phase 2: model, phase1/best, phase2/best."""
    folder = tmp_path_factory.mktemp("phases")
    save_tiny_pipeline(folder / "model")
    transformer = tiny_transformer(seed=3)
    phase1 = save_phase(folder / "phase1/best", transformer, PhaseContract(1, str(folder / "model"), 100, 0.25))
    contract = PhaseContract(
        phase=2,
        base_model=str(folder / "model"),
        step=200,
        backbone=str(folder / "phase1/best"),
        backbone_sha256=phase1.weights_sha256,
        dinov3=str(save_tiny_dinov3(folder / "dinov3")),
    )
    save_phase(folder / "phase2/best", C2RControlNet.from_transformer(transformer, 2, 1, FEATURE_DIM), contract)
    return folder


def export(model, output, format_="original", *options):
    main([f"--model={model}", f"--format={format_}", f"--output={output}", *options])


# --------------------------------------------------------------------------------------------- the original layout


@pytest.mark.parametrize(
    "overrides", [{}, {"num_layers": 1}, {"num_layers": 12}, {"qk_norm": None}, {"cross_attn_norm": False}]
)
def test_original_names_are_those_of_an_independent_table(overrides):
    weights = tiny_transformer(**overrides).state_dict()
    names = original_names(list(weights))
    by_hand = names_by_hand({name: torch.tensor(number) for number, name in enumerate(weights)})
    assert names == {list(weights)[number]: original for original, number in by_hand.items()}
    assert len(set(names.values())) == len(weights)


def test_a_weight_without_an_original_name_is_an_error():
    with pytest.raises(ValueError, match=r"blocks\.0\.attn3\.weight: no such weights"):
        original_names([*tiny_transformer().state_dict(), "blocks.0.attn3.weight"])


def test_the_original_layout_is_read_back_bit_for_bit(phases, tmp_path, capsys):
    output = tmp_path / "new/folder/dit.safetensors"
    export(phases / "phase1/best", output)
    assert capsys.readouterr().out.startswith(f"wrote {output}: ")
    expected = load_file(phases / "phase1/best" / WEIGHTS)
    stock = WanTransformer3DModel.from_single_file(str(output), config=str(phases / "model/transformer"))
    ours = load_transformer(output, phases / "model")
    for loaded in (stock, ours):
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert fingerprint_transformer(output, phases / "model") == fingerprint(expected)
    controlled, _ = load_for_generation(phases / "phase2/best", output)
    assert fingerprint(controlled.transformer.state_dict()) == fingerprint(expected)
    written = load_file(output)  # another reader of the file
    assert written.keys() == names_by_hand(expected).keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in names_by_hand(expected).items())
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_weights_are_rounded_once_to_the_dtype(name, dtype, phases, tmp_path):
    export(phases / "phase1/best", tmp_path / "dit.safetensors", "original", f"--dtype={name}")
    expected = load_file(phases / "phase1/best" / WEIGHTS)
    written = load_file(tmp_path / "dit.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    for original, tensor in names_by_hand(expected).items():
        assert torch.equal(written[original], tensor.to(dtype))
    loaded = WanTransformer3DModel.from_single_file(
        str(tmp_path / "dit.safetensors"), config=str(phases / "model/transformer"), torch_dtype=torch.float32
    )
    assert all(torch.equal(tensor, expected[n].to(dtype).float()) for n, tensor in loaded.state_dict().items())


def test_shards_are_exported_one_tensor_at_a_time(phases, tmp_path):
    """Write from shards what is written from one file."""
    load_transformer(phases / "phase1/best").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    save_original(WeightIndex(tmp_path / "shards"), tmp_path / "a.safetensors")
    save_original(WeightIndex(phases / "phase1/best"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_the_pipeline_is_read_back_bit_for_bit(phase, phases, tmp_path, capsys):
    export(phases / phase / "best", tmp_path / "new/pipeline", "pipeline")
    assert "c2r.generate --model load it" in capsys.readouterr().out
    moved = (tmp_path / "new").rename(tmp_path / "moved") / "pipeline"
    stock = WanPipeline.from_pretrained(moved)
    ours = C2RPipeline.from_pretrained(moved)
    expected = load_file(phases / "phase1/best" / WEIGHTS)
    backbone = ours.transformer if phase == "phase1" else ours.transformer.transformer
    for loaded in (stock.transformer, backbone, load_transformer(moved)):
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    if phase == "phase2":
        control = load_file(phases / "phase2/best" / WEIGHTS)
        found = ours.transformer.controlnet.state_dict()
        assert found.keys() == control.keys()
        assert all(torch.equal(tensor, control[name]) for name, tensor in found.items())
        assert ours.dinov3 is not None
        controlled, _ = load_for_generation(phases / "phase2/best", moved)  # as a moved backbone
        assert fingerprint(controlled.transformer.state_dict()) == fingerprint(expected)


def test_a_pipeline_has_the_dtype_that_is_asked_for(phases, tmp_path):
    export(phases / "phase2/best", tmp_path / "pipeline", "pipeline", "--dtype=bf16")
    found = load_file(tmp_path / "pipeline/transformer" / WEIGHTS)
    assert found["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    expected = load_file(phases / "phase1/best" / WEIGHTS)
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in found.items())


def test_a_pipeline_replaces_nothing(phases, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/precious").touch()
    for output in (tmp_path / "pipeline", tmp_path / "pipeline/precious"):
        assert "exists already; give a new folder" in refusal(phases / "phase2/best", output, "pipeline")
    assert "or around it" in refusal(phases / "phase2/best", phases, "pipeline")
    assert "lies in the folder" in refusal(phases / "phase2/best", phases / "phase2/best/new", "pipeline")
    assert [path.name for path in (tmp_path / "pipeline").iterdir()] == ["precious"]


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(*args):
    with pytest.raises(InputError) as error:
        export(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_is_overwritten_or_left_half_written(phases, tmp_path, monkeypatch):
    best = phases / "phase1/best"
    before = (best / WEIGHTS).read_bytes()
    assert "lies in the folder of --model" in refusal(best, best / WEIGHTS)
    os.symlink(best, tmp_path / "link")
    assert "lies in the folder of --model" in refusal(best, tmp_path / "link" / WEIGHTS)
    assert "lies in the folder of --model" in refusal(tmp_path / "link", best / "a.safetensors")
    assert "writes a .safetensors file" in refusal(best, tmp_path / "dit.bin")
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder" in refusal(best, tmp_path / "folder.safetensors")
    assert (best / WEIGHTS).read_bytes() == before

    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: small)
        assert "needed, 1.00 kB free; make room" in refusal(best, tmp_path / "dit.safetensors")

    large = shutil.copytree(best, tmp_path / "large")
    model = load_transformer(best)
    model.scale_shift_table.data.fill_(1e6)
    model.save_pretrained(large)
    message = refusal(large, tmp_path / "dit.safetensors", "original", "--dtype=fp16")
    assert "scale_shift_table has entries beyond the range of float16" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.safetensors", "large", "link"]


def test_models_that_have_no_such_format_are_refused(phases, tmp_path):
    output = tmp_path / "dit.safetensors"
    assert f"give its backbone, {phases / 'phase1/best'}" in refusal(phases / "phase2/best", output)
    assert "has no c2r.json; give best/ or final/" in refusal(phases / "model", output)
    assert "--format pt: not one of the choices" in refusal(phases / "phase1/best", output, "pt")


def test_an_unwritable_output_is_one_line(phases, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["export"])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: export(phases / "phase1/best", tmp_path / "file/dit.safetensors"))
    assert str(ended.value).startswith("error: ")
    assert str(ended.value).count("\n") == 0


def test_every_format_has_a_function():
    assert tuple(FORMATS) == EXPORT.options["format"].type.words
