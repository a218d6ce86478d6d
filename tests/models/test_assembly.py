"""Loading, saving and the phase contract: saved models come back unchanged, and errors are one line."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.errors as hub_errors
import pytest
import torch
import transformers
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import c2r
from c2r import InputError
from c2r.files import atomic_folder, complete_folder, fingerprint
from c2r.models import hub, parts
from c2r.models.assembly import load_for_generation
from c2r.models.backbone import check_transformer, fingerprint_transformer, load_transformer, read_transformer_config
from c2r.models.contract import PhaseContract, read_contract, save_phase
from c2r.models.controlnet import C2RControlNet
from c2r.models.controlnet_files import load_controlnet
from c2r.models.hub import fingerprint_files, resolve_model_folder
from c2r.models.parts import freeze, load_pipeline_part
from c2r.models.transformer import C2RTransformer
from tests.helpers.tiny import FEATURE_DIM, save_tiny_pipeline, tiny_transformer
from tests.helpers.weight_forms import original_names, write_form

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Path(save_tiny_pipeline(tmp_path_factory.mktemp("wan") / "model"))


@pytest.fixture
def phases(pipeline, tmp_path):
    """A folder with a finished phase 1 and phase 2 and their base model: model, phase1/best, phase2/best."""
    shutil.copytree(pipeline, tmp_path / "model")
    transformer = tiny_transformer(seed=3)
    save_phase(tmp_path / "phase1/best", transformer, PhaseContract(1, str(tmp_path / "model"), 100, 0.25))
    controlnet = C2RControlNet.from_transformer(transformer, 2, 1, FEATURE_DIM)
    contract = PhaseContract(
        phase=2,
        base_model=str(tmp_path / "model"),
        step=200,
        validation_loss=0.125,
        dataset_fingerprints={"real": "abc"},
        height=32,
        width=48,
        num_frames=9,
        fps=16,
        backbone=str(tmp_path / "phase1/best"),
        backbone_sha256=fingerprint_transformer(tmp_path / "phase1/best"),
        dinov3="facebook/dinov3-vitb16-pretrain-lvd1689m",
    )
    save_phase(tmp_path / "phase2/best", controlnet, contract)
    return tmp_path


def refusal(function, *args, **kwargs):
    """Return the message of the InputError that the call raises, which must be one line."""
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def equal_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- folders and parts


def test_a_local_folder_resolves_to_itself(pipeline):
    assert resolve_model_folder(pipeline) == resolve_model_folder(str(pipeline), ["vae", "transformer"]) == pipeline


def test_wrong_paths_are_refused_without_the_network(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    for path in ("outputs/phase1", "./some/model", "/no/such/model", "model", tmp_path / "nothing"):
        assert refusal(resolve_model_folder, path) == f"{path}: no such model folder; check the path"
    assert "has no image_encoder/" in refusal(resolve_model_folder, pipeline, ["image_encoder"])
    assert "this is a file" in refusal(resolve_model_folder, pipeline / "model_index.json")


def test_only_the_needed_parts_of_a_hub_model_are_downloaded_and_no_pickle(pipeline, monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: calls.append((args, options)) or pipeline)
    assert resolve_model_folder("Wan-AI/Wan2.1", ["vae"]) == pipeline
    (args, options) = calls[0]
    assert args == ("Wan-AI/Wan2.1",)
    assert options["allow_patterns"] == ["*.json", "vae/*"]
    assert {"*.bin", "*.pt", "*.pth"} <= set(options["ignore_patterns"])


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "access to these weights is restricted; ask for it at https://huggingface.co/a/b"),
        (hub_errors.RepositoryNotFoundError, "no local folder and no Hugging Face model has this name"),
        (hub_errors.LocalEntryNotFoundError, "cannot be fetched from the Hugging Face hub (first line)"),
    ],
)
def test_errors_of_the_hub_become_one_line(monkeypatch, error, message):
    class Refused(error):
        def __init__(self):
            Exception.__init__(self, "first line\nsecond line")

    def refuse(*args, **options):
        raise Refused

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    assert message in refusal(resolve_model_folder, "a/b")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pipeline_parts_are_frozen_and_agree_with_a_stock_pipeline(pipeline, dtype):
    stock = WanPipeline.from_pretrained(pipeline, torch_dtype=dtype or torch.float32)
    for part in ("vae", "text_encoder"):
        model = load_pipeline_part(pipeline, part, torch_dtype=dtype)
        assert equal_weights(model, getattr(stock, part))
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_pipeline_part(pipeline, "tokenizer")("a red city").input_ids == stock.tokenizer("a red city").input_ids
    assert load_pipeline_part(pipeline, "scheduler").config.shift == 3.0


def test_unfit_pipeline_parts_are_refused(pipeline, tmp_path):
    broken = shutil.copytree(pipeline, tmp_path / "broken")
    shutil.copy(pipeline / "vae/config.json", broken / "text_encoder/config.json")
    assert "model type is None, but umt5 is needed" in refusal(load_pipeline_part, broken, "text_encoder")
    weights = load_file(broken / "vae" / WEIGHTS)
    del weights["quant_conv.bias"]
    save_file(weights, broken / "vae" / WEIGHTS)
    assert "weights are missing: quant_conv.bias" in refusal(load_pipeline_part, broken, "vae")
    (broken / "unet").mkdir()
    with pytest.raises(ValueError, match="part is 'unet'"):
        load_pipeline_part(broken, "unet")


def test_models_load_unsharded_while_zero3_is_on():
    class ZeRO3:
        def is_zero3(self):
            return True

    integration, config = transformers.integrations.deepspeed, ZeRO3()
    integration.set_hf_deepspeed_config(config)
    try:
        with parts.unsharded_loading():
            assert not integration.is_deepspeed_zero3_enabled()
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()
    with parts.unsharded_loading():
        assert not integration.is_deepspeed_zero3_enabled()


def test_freeze_switches_off_gradients_and_training_mode():
    model = tiny_transformer().train()
    assert freeze(model) is model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ fingerprints


def test_the_fingerprint_depends_on_names_dtypes_shapes_and_every_byte():
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(1.0), "c": torch.ones(2, dtype=torch.bfloat16)}
    first = fingerprint(tensors)
    assert len(first) == 64
    assert fingerprint(reversed(tensors.items())) == first
    assert fingerprint({name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}) == first
    changed = [
        tensors | {"a": torch.arange(6.0).view(2, 3)},
        tensors | {"a": torch.tensor([0.0, 1, 2, 3, 4, 5.0000005])},
        tensors | {"b": torch.tensor(1.0, dtype=torch.float64)},
        tensors | {"c": torch.ones(2, dtype=torch.float16)},
        tensors | {"c": tensors["c"].view(torch.int16)},  # the same bytes
        {name.upper(): tensor for name, tensor in tensors.items()},
        tensors | {"d": torch.zeros(0)},
    ]
    assert len({first, *map(fingerprint, changed)}) == 1 + len(changed)
    assert fingerprint({"a": torch.arange(6.0).view(2, 3).T}) == fingerprint(
        {"a": torch.arange(6.0).view(2, 3).T.contiguous()}
    )


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_files_and_model_have_the_same_fingerprint(tmp_path, max_shard_size):
    model = tiny_transformer()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    assert fingerprint_files(tmp_path) == fingerprint(model.state_dict())
    assert fingerprint_transformer(tmp_path) == fingerprint(model.state_dict())


# -------------------------------------------------------------------------------------------------------- transformer


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


def test_a_damaged_controlnet_is_refused(phases):
    folder = phases / "phase2/best"
    weights = load_file(folder / WEIGHTS)
    del weights["control_adapter.proj.bias"]
    weights["control_adapter.gate"] = torch.ones(1)
    save_file(weights, folder / WEIGHTS)
    assert "weights are missing: control_adapter.proj.bias" in refusal(load_controlnet, folder)


# ----------------------------------------------------------------------------------------------------- phase contract


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


# ------------------------------------------------------------------------------------------------------ atomic folder


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "runs" / "best"
    for content in ("one", "two"):
        with atomic_folder(folder) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub/file").write_text(content)
            (temporary / content).touch()
        assert (folder / "sub/file").read_text() == content
        assert sorted(path.name for path in folder.iterdir()) == sorted(["sub", content])
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "best"
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text("old")

    def interrupted():
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("renames_done", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_a_complete_folder(tmp_path, monkeypatch, renames_done):
    folder = tmp_path / "best"
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text("old")
    renames, rename, rmtree = [], Path.rename, shutil.rmtree

    def killed(self, target):
        renames.append(target)
        if len(renames) > renames_done:
            os._exit(0)
        return rename(self, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "rename", killed)
        monkeypatch.setattr(shutil, "rmtree", lambda *a, **o: os._exit(0) if len(renames) == 2 else rmtree(*a, **o))
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text("new")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0

    assert folder.exists() == (renames_done != 1)
    assert (complete_folder(folder) / "file").read_text() == ("new" if renames_done == 2 else "old")
    with pytest.raises(FileNotFoundError), atomic_folder(folder) as temporary:  # the next writer, which fails
        (temporary / "no/such/folder").touch()
    assert (folder / "file").read_text() == ("new" if renames_done == 2 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_best_folder_that_is_being_replaced_can_be_read(phases):
    for name in ("phase1", "phase2"):
        (phases / name / "best").rename(phases / name / ".best.old")
    model, contract = load_for_generation(phases / "phase2/best")
    assert isinstance(model, C2RTransformer)
    assert contract.base_model == os.path.realpath(phases / "model")
    assert not (phases / "phase1/best").exists()
    assert not (phases / "phase2/best").exists()
