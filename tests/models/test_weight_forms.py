"""The matrix of layouts that a backbone comes in and loaders that take it: each cell gives the same weights.

Loaders: phase 1 (`load_transformer`, trainable), phase 2 (the frozen backbone of a trained control branch) and
generation (`load_for_generation` with another file of the contract's backbone).
"""

import json
import logging
import random
import re
import shutil
import struct
import sys
from argparse import Namespace

import gguf
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.quantizers.gguf.utils import GGUFLinear
from safetensors.torch import load_file, save_file

from c2r import InputError, cli
from c2r.data.buckets import Bucket
from c2r.estimation.configs import ModelConfigs, build_joined
from c2r.estimation.report import estimate_run
from c2r.files import fingerprint
from c2r.models.assembly import load_for_generation
from c2r.models.backbone import (
    check_transformer,
    fingerprint_transformer,
    load_transformer,
    quantised_types,
    read_transformer_config,
)
from c2r.models.contract import PhaseContract, save_phase
from c2r.models.controlnet import C2RControlNet
from c2r.models.controlnet_files import load_controlnet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.float8 import Rounding
from c2r.models.gguf_weights import dequantised, whole_state_dict
from c2r.models.hub import WeightIndex
from c2r.models.offloading import store_blocks
from c2r.models.parts import load_pipeline_part
from c2r.models.transformer import C2RTransformer
from c2r.options import PHASE1, PHASE2
from c2r.training.engine import check_options
from c2r.training.split_weights import local_fingerprint
from tests.helpers.commands import phase2 as phase2_command
from tests.helpers.commands import succeed
from tests.helpers.forks import fork
from tests.helpers.tiny import FEATURE_DIM, save_tiny_pipeline, tiny_inputs, tiny_transformer
from tests.helpers.weight_forms import (
    EXACT,
    FLOAT8,
    GGUF,
    IN_BLOCKS,
    original_config,
    original_names,
    scaled,
    with_prefix,
    write_form,
    write_gguf,
)

#: Largest relative error of a matrix in each layout, root mean square. Float8 has 4 bits of mantissa, of which the
#: first is implied: entries are off by up to 1/16 and by 2.6 % on average (computed for a normal distribution).
LARGEST_ERROR = dict.fromkeys(EXACT, 0.0) | dict.fromkeys(FLOAT8, 0.03)
LARGEST_ERROR |= {"Q8_0": 0.005, "Q5_1": 0.04, "Q4_0": 0.09, "BF16": 0.002, "F16": 0.0003}


@pytest.fixture(scope="module")
def model():
    return tiny_transformer(seed=3, **IN_BLOCKS)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """A Wan pipeline with this transformer."""
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("base") / "model")
    model.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Return a function that gives the path of the weights in a layout."""
    folder, paths = tmp_path_factory.mktemp("forms"), {}

    def path_of(form):
        if form not in paths:
            paths[form] = write_form(form, folder / form.replace(" ", "-"), model)
        return paths[form]

    return path_of


@pytest.fixture(scope="module")
def phase2(model, base, tmp_path_factory):
    """A finished phase 2 over this backbone."""
    folder = tmp_path_factory.mktemp("phase2") / "best"
    contract = PhaseContract(
        phase=2,
        base_model=str(base),
        step=1,
        backbone=str(base / "transformer"),
        backbone_sha256=fingerprint(model.state_dict()),
        dinov3="dinov3",
    )
    save_phase(folder, C2RControlNet.from_transformer(model, 2, 1, FEATURE_DIM), contract)
    return folder


def joined(backbone):
    """Join a backbone with a control branch whose residuals are not zero."""
    torch.manual_seed(0)
    controlnet = C2RControlNet.from_transformer(backbone, 2, 1, FEATURE_DIM)
    for block in controlnet.control_blocks:
        torch.nn.init.normal_(block.projector[2].weight)
    return C2RTransformer(backbone, controlnet)


def require_weights(loaded, model, form):
    """Compare a loaded backbone with the model that was written."""
    found, expected = whole_state_dict(loaded), model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].float() - tensor).norm() / tensor.norm()
        assert tensor.norm() == 0 or error <= LARGEST_ERROR[form], (name, float(error))
        assert tensor.ndim > 1 or form in ("BF16", "F16") or torch.equal(found[name], tensor)


# ------------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("form", [*EXACT, *FLOAT8])
def test_phase1_loads(form, model, base, written):
    loaded = load_transformer(written(form), base)
    require_weights(loaded, model, form)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("form", [*EXACT, *FLOAT8, *GGUF])
def test_phase2_trains_over(form, model, base, written):
    """The control branch gets the gradient that it has over the same weights in a model that is not quantised."""
    backbone = load_transformer(written(form), base)
    require_weights(backbone, model, form)
    whole = tiny_transformer(**IN_BLOCKS)
    whole.load_state_dict(whole_state_dict(backbone))
    gradients = []
    for part in (backbone, whole):
        ours = joined(part)
        before = local_fingerprint(part, ours)
        ours(*tiny_inputs()).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in ours.controlnet.parameters()])
        assert local_fingerprint(part, ours) == before
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    if form in EXACT:
        assert fingerprint_transformer(written(form), base) == fingerprint(model.state_dict())


@pytest.mark.parametrize("form", [*EXACT, *FLOAT8, *GGUF])
def test_generation_loads(form, model, phase2, written, caplog):
    loaded, _ = load_for_generation(phase2, written(form))
    require_weights(loaded.transformer, model, form)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert ("cannot be checked that they are those" in caplog.text) == (form not in EXACT)


# ----------------------------------------------------------------------------------------------------------- float8


@pytest.mark.parametrize("form", FLOAT8)
def test_a_warning_states_what_rounding_has_changed(form, model, base, written, caplog):
    with caplog.at_level(logging.WARNING, logger="c2r"):
        loaded = load_transformer(written(form), base)
    (record,) = caplog.records
    assert "40 of 123 weights are stored in float8: rounding has changed" in record.getMessage()
    stated, name = record.args[3], "blocks.0.ffn.net.0.proj.weight"
    expected = model.state_dict()[name]
    found = 100 * float((loaded.state_dict()[name] - expected).norm() / expected.norm())
    assert stated == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("std", [0.003, 0.02, 1.0])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_error_of_rounding_is_computed_from_the_rounded_values(std, dtype):
    weight = std * torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    rounded = weight.to(dtype)
    rounding = Rounding()
    rounding.add(rounded)
    error = 100 * float((rounded.float() - weight).norm() / weight.norm())
    assert rounding.percent() == pytest.approx(error, rel=0.1)


def test_equal_float8_weights_have_one_fingerprint_in_both_layouts(base, written):
    found = {fingerprint_transformer(written(form), base) for form in FLOAT8[1:]}
    assert len(found) == 1


def test_a_scale_per_row_is_applied_to_rows(model, base, tmp_path):
    name, tensors = "blocks.1.ffn.0.weight", original_names(model.state_dict())
    scale = tensors[name].abs().amax(1, keepdim=True) / 448
    tensors[name.replace(".weight", ".weight_scale")] = scale
    tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "rows.safetensors")
    loaded = load_transformer(tmp_path / "rows.safetensors", base).state_dict()["blocks.1.ffn.net.0.proj.weight"]
    assert torch.equal(loaded, tensors[name].float() * scale)


def described(**description):
    content = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    return {"blocks.0.ffn.0.comfy_quant": content}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if "scale_weight" not in n}, "its scale is missing"),
        (lambda w: w | described(format="nvfp4"), "is quantised as nvfp4, which is not supported"),
        (lambda w: w | described(format="float8_e4m3fn", convrot=True), "float8_e4m3fn with more steps, which is not"),
        (lambda w: w | {"blocks.0.ffn.0.comfy_quant": torch.zeros(99_999, dtype=torch.uint8)}, "is no description"),
        (lambda w: w | {"blocks.0.ffn.0.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "not valid JSON"),
        (lambda w: w | {"blocks.0.ffn.0.scale_weight": torch.ones(7)}, r"a scale of shape \(7,\)"),
        (lambda w: w | {"blocks.0.ffn.0.weight": torch.zeros(64, 32)}, "is F32 with a scale in F32"),
        (lambda w: w | {"blocks.0.norm3.weight": torch.zeros(32, dtype=torch.int8)}, "is stored as I8, which is not"),
    ],
)
def test_other_kinds_of_quantisation_are_refused(changes, message, model, base, tmp_path):
    weights = changes(scaled(original_names(model.state_dict()), "scale_weight"))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load_transformer(tmp_path / "model.safetensors", base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["pipeline/vae", "pipeline/text_encoder", "dinov3", "controlnet"])
def test_float8_in_another_part_is_refused(part, phase2, tiny_models, tmp_path):
    """A library would load it without a word."""
    folder = phase2 if part == "controlnet" else tiny_models / part
    copy = shutil.copytree(folder, tmp_path / "copy" / folder.name)
    (file,) = copy.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name, tensor in weights.items() if tensor.ndim > 1)
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    load = {
        "controlnet": load_controlnet,
        "dinov3": DINOv3FeatureExtractor.from_pretrained,
        "pipeline/vae": lambda folder: load_pipeline_part(folder.parent, "vae"),
        "pipeline/text_encoder": lambda folder: load_pipeline_part(folder.parent, "text_encoder"),
    }[part]
    with pytest.raises(InputError, match="is stored in float8, which only the transformer may be"):
        load(copy)


# ------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_matrices_stay_quantised_and_the_rest_has_its_dtypes(dtype, base, written):
    path = written("Q8_0")
    loaded = load_transformer(path, base, dtype)
    expected = WanTransformer3DModel.from_pretrained(base / "transformer", torch_dtype=dtype)
    types = quantised_types(path, base)
    assert set(types.values()) == {"Q8_0"}
    names = {f"{name}.weight" for name, module in loaded.named_modules() if isinstance(module, GGUFLinear)}
    assert names == types.keys()
    assert "condition_embedder.time_proj.weight" in names
    assert not any("time_embedder" in name for name in names)  # kept in fp32
    dtypes = {name: parameter.dtype for name, parameter in expected.named_parameters()}
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.uint8 if name in names else dtypes[name]), name
    assert loaded.dtype == expected.dtype


def test_a_gguf_backbone_trains_under_autocast_as_a_whole_one_does(base, written):
    """Train the control branch in fp32 over a backbone in bf16, as phase 2 does by default."""
    quantised = load_transformer(written("Q8_0"), base, torch.bfloat16)
    whole = load_transformer(base, torch_dtype=torch.bfloat16)
    state = whole_state_dict(quantised)
    whole.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in whole.state_dict().items()})
    noisy_latents, *others = tiny_inputs()
    gradients = []
    for backbone in (quantised, whole):
        ours = joined(backbone)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = ours(noisy_latents.bfloat16(), *others).sample
        velocity.float().square().mean().backward()
        gradients.append([parameter.grad for parameter in ours.controlnet.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_gguf_backbone_runs_from_the_host(base, written):
    expected = joined(load_transformer(written("Q4_0"), base))(*tiny_inputs()).sample
    ours = joined(load_transformer(written("Q4_0"), base))
    store_blocks(ours.transformer.blocks, torch.device("cpu"), offload=True)
    assert torch.equal(ours(*tiny_inputs()).sample, expected)


def test_k_quants_agree_with_the_package_gguf(base, tmp_path, model):
    """Read blocks of random bytes by Diffusers and by the package: nothing here writes this type."""
    name, kind = "blocks.0.ffn.2.weight", gguf.GGMLQuantizationType.Q4_K
    raw = np.random.default_rng(0).integers(0, 256, (32, 144), dtype=np.uint8)
    raw[:, :4] = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)  # the scales of a block, finite
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "wan")
    writer.add_tensor(name, raw, raw_dtype=kind)
    writer.add_tensor("head.modulation", np.zeros((1, 2, 32), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    found = dict(WeightIndex(tmp_path / "k.gguf").tensors())["blocks.0.ffn.net.2.weight"]
    assert WeightIndex(tmp_path / "k.gguf").shapes()["blocks.0.ffn.net.2.weight"] == (32, 256)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    torch.testing.assert_close(dequantised(found).float(), expected, atol=2e-3, rtol=2e-3)


def test_the_type_is_part_of_a_gguf_fingerprint(model, base, tmp_path):
    # Q4_0 and IQ4_NL have blocks of one size.
    first = write_gguf(tmp_path / "a.gguf", original_names(model.state_dict()), "Q4_0")
    content = bytearray(first.read_bytes())
    name = b"blocks.0.self_attn.q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", content, at) == (gguf.GGMLQuantizationType.Q4_0.value,)
    struct.pack_into("<I", content, at, gguf.GGMLQuantizationType.IQ4_NL.value)
    other = tmp_path / "b.gguf"
    other.write_bytes(content)
    prints = {fingerprint_transformer(path, base) for path in (first, other)}
    assert len(prints) == 2


def header(*, magic=b"GGUF", version=3, tensors=0, values=0, rest=b""):
    return magic + struct.pack("<IQQ", version, tensors, values) + rest


def entry(name=b"a", shape=(32,), kind=0, offset=0):
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def value(name, kind, content):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + content


HOSTILE = {
    "empty": b"",
    "pickle": b"\x80\x04.",
    "version": header(version=9),
    "tensors without end": header(tensors=2**60),
    "values without end": header(values=2**60),
    "a list without end": header(values=1, rest=value(b"a", 9, struct.pack("<IQ", 0, 2**62))),
    "lists in lists": header(values=1, rest=value(b"a", 9, struct.pack("<IQ", 9, 1) * 50)),
    "text without end": header(values=1, rest=struct.pack("<Q", 2**63)),
    "alignment": header(values=1, rest=value(b"general.alignment", 4, struct.pack("<I", 0))),
    "text as alignment": header(values=1, rest=value(b"general.alignment", 8, struct.pack("<Q", 1) + b"a")),
    "unknown value": header(values=1, rest=value(b"a", 99, b"")),
    "beyond the file": header(tensors=1, rest=entry(shape=(2**20,))),
    "a huge shape": header(tensors=1, rest=entry(shape=(2**40, 2**40))),
    "no shape": header(tensors=1, rest=entry(shape=())),
    "part of a block": header(tensors=1, rest=entry(shape=(33,), kind=8)),
    "many dimensions": header(tensors=1, rest=entry(shape=(1,) * 9)),
    "unknown type": header(tensors=1, rest=entry(kind=99)),
    "an offset out of the file": header(tensors=1, rest=entry(offset=2**63 - 32)),
    "not aligned": header(tensors=1, rest=entry(offset=1)),
    "named twice": header(tensors=2, rest=entry() + entry()) + b"\0" * 500,
    "a name that is no text": header(tensors=1, rest=entry(name=b"\xff")),
    "I8 weights": header(tensors=1, rest=entry(kind=24)) + b"\0" * 500,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_gguf_file_is_refused_at_once(name, base, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(InputError, match=r"cannot be read as GGUF|which Diffusers does not read") as error:
        check_transformer(path, base)
    assert "\n" not in str(error.value)


def test_no_change_of_a_byte_raises_another_error(written, tmp_path):
    """Change, remove or add bytes of a GGUF file's header: it is read, or refused."""
    content, rng = written("Q4_0").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        changed, at = bytearray(content), rng.randrange(8000)  # the header has 8 kB
        number = rng.choice([0, 1, 255, 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)])
        match rng.randrange(3):
            case 0:
                changed[at : at + 8] = struct.pack("<Q", number)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case _:
                del changed[at : at + rng.randrange(1, 100)]
        path = tmp_path / "model.gguf"
        path.write_bytes(changed)
        try:
            dict(WeightIndex(path).tensors())
        except InputError:
            refused += 1
    assert refused > 50


def test_without_the_package_only_gguf_files_are_refused(model, base, written, monkeypatch):
    path = written("Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"model\.gguf: needs the package gguf; pip install gguf"):
        load_transformer(path, base)
    require_weights(load_transformer(written("original file"), base), model, "original file")
    build_joined(
        ModelConfigs(dict(model.config), dinov3={"hidden_size": 32}), torch.float32, control_layers=1, control_stride=1
    )


def test_a_cut_or_other_gguf_file_is_refused(model, base, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", original_names(model.state_dict()), "Q8_0")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(InputError, match="ends after the file"):
        load_transformer(path, base)
    path.write_bytes(content.replace(b"blocks.0.ffn.0.bias", b"blocks.0.ffn.0.bios"))
    with pytest.raises(InputError, match=r"weights are missing: blocks\.0\.ffn\.net\.0\.proj\.bias"):
        load_transformer(path, base)
    with pytest.raises(InputError, match="a single file has no config"):
        load_transformer(path)


# ------------------------------------------------------------------------------------------------- other Wan models


def tiny_weights(**tensors):
    return original_names(tiny_transformer(**IN_BLOCKS).state_dict()) | tensors


def zeros(*shape):
    return torch.zeros(shape)


OTHERS = {
    "image-to-video model": {"img_emb.proj.0.weight": zeros(4), "blocks.0.cross_attn.k_img.weight": zeros(32, 32)},
    "first-and-last-frame model": {"img_emb.proj.0.weight": zeros(4), "img_emb.emb_pos": zeros(1, 4, 4)},
    "VACE model": {"vace_blocks.0.before_proj.weight": zeros(32, 32)},
    "Wan 2.2 Animate": {"face_adapter.fuser_blocks.0.linear1_kv.weight": zeros(4, 4)},
    "speech-to-video model": {"casual_audio_encoder.weights": zeros(1)},
    "Wan 2.2 TI2V-5B": {"patch_embedding.weight": zeros(32, 48, 1, 2, 2), "head.head.weight": zeros(192, 32)},
    "Wan I2V": {"patch_embedding.weight": zeros(32, 36, 1, 2, 2), "head.head.weight": zeros(64, 32)},
    "Wan Fun model": {"patch_embedding.weight": zeros(32, 48, 1, 2, 2), "head.head.weight": zeros(64, 32)},
}


@pytest.mark.parametrize("layout", ["original", "ComfyUI", "GGUF"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_wan_model_is_named(name, layout, base, tmp_path):
    weights = tiny_weights(**OTHERS[name])
    path = tmp_path / "model.safetensors"
    if layout == "GGUF":
        path = write_gguf(tmp_path / "model.gguf", weights, "F32")
    else:
        save_file(with_prefix(weights) if layout == "ComfyUI" else weights, path)
    with pytest.raises(InputError, match=rf"this is .*{name}.*; give a text-to-video model of Wan 2\.1") as error:
        load_transformer(path, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["wan2.2_t2v_high_noise_14B_fp16.safetensors", "low_noise_model/a.safetensors", "x-LowNoise-Q8_0.gguf"]
)
def test_a_file_of_a_pair_of_wan22_is_named(path, model, base, tmp_path):
    path = tmp_path / path
    path.parent.mkdir(exist_ok=True)
    weights = original_names(model.state_dict())
    write_gguf(path, weights, "F32") if path.suffix == ".gguf" else save_file(weights, path)
    with pytest.raises(InputError, match=r"one of the two transformers of Wan 2\.2 A14B"):
        load_transformer(path, base)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model_type": "i2v", "in_dim": 36}, "Wan I2V"),
        ({"model_type": "flf2v", "in_dim": 36}, "FLF2V"),
        ({"model_type": "ti2v", "in_dim": 48, "out_dim": 48}, r"Wan 2\.2 TI2V-5B"),
        ({"in_dim": 48, "out_dim": 48}, r"Wan 2\.2 TI2V-5B"),
        ({"model_type": "vace", "_class_name": "VaceWanModel"}, "VACE"),
        ({"model_type": "animate"}, r"Wan 2\.2 Animate"),
    ],
)
def test_a_folder_of_another_wan_model_in_the_original_layout_is_named(changes, name, model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(original_config(model) | changes))
    with pytest.raises(InputError, match=f"this is .*{name}"):
        read_transformer_config(tmp_path)


@pytest.mark.parametrize(
    ("index", "config", "name"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}, {}, r"Wan 2\.2 A14B"),
        ({"transformer_2": [None, None], "boundary_ratio": 0.9}, {}, r"Wan 2\.2 A14B"),
        ({"expand_timesteps": True}, {}, r"Wan 2\.2 TI2V-5B"),
        ({}, {"in_channels": 48, "out_channels": 48}, r"Wan 2\.2 TI2V-5B"),
        ({"_class_name": "WanImageToVideoPipeline"}, {}, "Wan I2V"),
        ({}, {"in_channels": 36, "out_channels": 16}, "Wan I2V"),
        ({}, {"image_dim": 1280, "pos_embed_seq_len": 514}, "FLF2V"),
        ({}, {"_class_name": "WanVACETransformer3DModel"}, "VACE"),
        ({}, {"_class_name": "WanAnimateTransformer3DModel"}, r"Wan 2\.2 Animate"),
    ],
)
def test_a_pipeline_of_another_wan_model_is_named(index, config, name, base, tmp_path):
    (tmp_path / "transformer").mkdir()
    for path, changes in (("model_index.json", index), ("transformer/config.json", config)):
        (tmp_path / path).write_text(json.dumps(json.loads((base / path).read_text()) | changes))
    for folder in (tmp_path, tmp_path / "transformer"):
        with pytest.raises(InputError, match=f"this is .*{name}"):
            read_transformer_config(folder)


def test_wan_21_pipelines_are_taken_with_the_entries_of_newer_diffusers(base, tmp_path):
    (tmp_path / "transformer").mkdir()
    index = {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    for path, changes in (("model_index.json", index), ("transformer/config.json", {})):
        (tmp_path / path).write_text(json.dumps(json.loads((base / path).read_text()) | changes))
    assert read_transformer_config(tmp_path)["num_layers"] == 4


def test_the_same_weight_under_two_names_is_refused(model, base, tmp_path):
    weights = original_names(model.state_dict())
    again = {name: tensor.clone() for name, tensor in with_prefix(weights).items()}
    save_file(weights | again, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"the same weight under two names|unexpected or of another shape"):
        load_transformer(tmp_path / "model.safetensors", base)


@pytest.mark.parametrize("sizes", [{"num_layers": 3}, {"num_attention_heads": 4}])
def test_a_file_of_another_size_than_the_pipeline_is_named(sizes, base, tmp_path):
    path = write_form("original file", tmp_path, tiny_transformer(**IN_BLOCKS | sizes))
    with pytest.raises(InputError, match=r"blocks of width .*, but .* has 4 of width 32; give the --pretrained_model"):
        check_transformer(path, base)


def test_a_file_may_have_any_prefix(model, base, tmp_path):
    weights = {f"diffusion_model.{name}": tensor for name, tensor in original_names(model.state_dict()).items()}
    save_file(weights, tmp_path / "model.safetensors")
    require_weights(load_transformer(tmp_path / "model.safetensors", base), model, "ComfyUI file")
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()


# --------------------------------------------------------------------------------------------------------- commands


def test_phase2_and_generate_over_gguf(base, written, tiny_models, small_datasets, tmp_path):
    out = tmp_path / "phase2"
    options = [f"--pretrained_model_name_or_path={base}", "--max_train_steps=1", "--num_samples=0"]
    options += ["--gradient_accumulation_steps=1", "--num_validation_clips=1"]
    succeed(*phase2_command(tiny_models, small_datasets, written("Q8_0"), out, *options), by=fork)
    contract = json.loads((out / "final/c2r.json").read_text())
    assert contract["backbone"].endswith("model.gguf")
    assert contract["backbone_sha256"] == fingerprint_transformer(written("Q8_0"), base)

    command = ["-m", "c2r.generate", f"--model={out / 'final'}", "--prompt=a street", "--num_inference_steps=1"]
    command += [f"--control_video={small_datasets / 'cg/c0.mp4'}", f"--output={tmp_path / 'out.mp4'}"]
    succeed(*command, by=fork)
    assert (tmp_path / "out.mp4").stat().st_size > 0
    with pytest.raises(InputError, match="not the backbone of"):
        load_for_generation(out / "final", base)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            PHASE1,
            ["--dit_path=a.gguf"],
            "--dit_path a.gguf: the weights of a GGUF file are quantised",
        ),
        (
            PHASE2,
            ["--resume_backbone_from=a.gguf", "--fp8_backbone"],
            "--fp8_backbone: the weights of a.gguf are",
        ),
    ],
)
def test_options_that_gguf_cannot_have_are_refused_at_once(script, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.parse(script, ["--output_dir=out", "--real_dataset=data", *options])


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_engines_that_split_weights_refuse_gguf(engine):
    values = {name: option.default for name, option in PHASE2.options.items()}
    args = Namespace(**values | {"resume_backbone_from": "a.gguf"})
    check_options(args, None, 2)
    with pytest.raises(InputError, match=r"--resume_backbone_from a\.gguf: .* cannot split the weights of a GGUF"):
        check_options(args, engine, 2)


def test_the_estimate_counts_quantised_weights_as_they_are_stored(model, base, written):
    args = Namespace(**{name: option.default for name, option in PHASE2.options.items()} | {"control_layers": 2})
    dinov3 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    dinov3 |= {"patch_size": 16}

    def frozen(form):
        types = quantised_types(written(form), base)
        configs = ModelConfigs(dict(model.config), dinov3=dinov3, quantised=types)
        estimate = estimate_run(args, configs, Bucket(5, 32, 48), device_type="cpu", step_only=True)
        return estimate.peaks[estimate.largest]["frozen weights"], types

    whole, none = frozen("original file")
    assert none == {}
    for form, per_number in (("Q8_0", 34 / 32), ("Q4_0", 18 / 32)):  # bytes of a block of 32 numbers
        stored, types = frozen(form)
        count = sum(model.state_dict()[name].numel() for name in types)
        assert whole - stored == count * (2 - per_number)  # 2 bytes in bf16
