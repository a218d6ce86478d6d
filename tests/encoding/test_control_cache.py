"""Cached DINOv3 features: they are those that a training step would compute."""

import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import c2r.encode
import train_phase2
from c2r import InputError
from c2r.cli import run
from c2r.data.manifest import read_manifest
from c2r.encoding.cache import ControlSettings, control_path
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_control, encode_missing
from c2r.encoding.missing import find_missing_control
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.units import size_text
from tests.helpers.commands import SIZE, phase2
from tests.helpers.datasets import write_dataset
from tests.helpers.tiny import FEATURE_DIM, save_tiny_dinov3


@pytest.fixture
def options(tiny_models, tmp_path):
    return SimpleNamespace(
        pretrained_model_name_or_path=str(tiny_models / "pipeline"),
        dinov3=str(tiny_models / "dinov3"),
        cache_dir=str(tmp_path / "cache"),
        dataloader_num_workers=1,
        **SIZE,
    )


@pytest.fixture
def pairs(tmp_path):
    """Three fine videos of two clips each; two of them share a coarse one."""
    names, controls = ["f0.mp4", "f1.mp4", "f2.mp4"], ["c0.mp4", "c1.mp4", "c0.mp4"]
    return write_dataset(tmp_path / "cg", names, ["rain", "night", "a street"], controls)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_what_dinov3_gives_for_the_control_frames(pairs, options, accelerator, dtype):
    clips = read_manifest(pairs, "cg", options).clips
    encode_missing(clips, options, accelerator)
    assert encode_control(clips, options, dtype, accelerator).failures == []
    assert len(list((pairs.parent / "cache/control").rglob("*.safetensors"))) == 4  # a shared coarse video is one
    dinov3 = DINOv3FeatureExtractor.from_pretrained(options.dinov3, torch_dtype=dtype)
    settings = ControlSettings.from_options(options, dtype)
    cached = ClipDataset(clips, options, with_control=True, control_settings=settings)
    frames = ClipDataset(clips, options, with_control=True)
    for i in range(len(clips)):
        assert "control_frames" not in cached[i]
        features = cached[i]["control_features"]
        assert features.shape == (5, 2, 3, FEATURE_DIM)
        assert features.dtype == dtype
        assert torch.equal(features, dinov3(frames[i]["control_frames"][None].float() / 255)[0])


def test_another_dinov3_dtype_or_control_is_another_file_and_a_damaged_one_is_made_anew(
    pairs, options, accelerator, tmp_path, capsys
):
    clips = read_manifest(pairs, "cg", options).clips
    encode_control(clips, options, torch.float32, accelerator)
    assert find_missing_control(clips, options, torch.float32).count == 0
    assert find_missing_control(clips, options, torch.bfloat16).count == 4
    other = SimpleNamespace(**vars(options) | {"dinov3": str(save_tiny_dinov3(tmp_path / "other"))})
    weights_file = tmp_path / "other/model.safetensors"
    changed = {name: 2 * tensor for name, tensor in load_file(weights_file).items()}
    save_file(changed, weights_file, metadata={"format": "pt"})
    assert find_missing_control(clips, other, torch.float32).count == 4

    path = control_path(options.cache_dir, clips[0], ControlSettings.from_options(options, torch.float32))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    encode_control(clips, options, torch.float32, accelerator)
    assert "1 damaged files in the cache are encoded anew" in capsys.readouterr().out
    assert path.read_bytes() == content


def test_a_dinov3_that_gives_nan_is_named(pairs, options, accelerator, tmp_path):
    options.dinov3 = str(save_tiny_dinov3(tmp_path / "broken"))
    weights_file = tmp_path / "broken/model.safetensors"
    broken = {name: torch.nan * tensor for name, tensor in load_file(weights_file).items()}
    save_file(broken, weights_file, metadata={"format": "pt"})
    clips = read_manifest(pairs, "cg", options).clips
    with pytest.raises(InputError, match=r"c0\.mp4: .*broken gives control features that are not finite; check"):
        encode_control(clips, options, torch.float32, accelerator)


def command(options, dataset, *extra):
    return ["encode", f"--dataset={dataset}", *(f"--{name}={value}" for name, value in vars(options).items()), *extra]


def test_the_command_makes_what_phase_2_takes_by_default(pairs, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(options, pairs, "--domain=cg", "--control_only", "--dry_run"))
    run(c2r.encode.main)
    told = capsys.readouterr().out
    clips = read_manifest(pairs, "cg", options).train
    lacking = find_missing_control(clips, options, torch.bfloat16)
    assert lacking.count in (2, 4)  # the name of one file holds it out
    bytes_needed = lacking.count * 5 * 2 * 3 * FEATURE_DIM * 2
    assert f"{lacking.count} clips and 0 captions to encode, {size_text(bytes_needed)} of control features" in told

    monkeypatch.setattr(sys, "argv", command(options, pairs, "--domain=cg", "--control_only"))
    run(c2r.encode.main)
    assert f"control features of {lacking.count} of {lacking.count} clips are in" in capsys.readouterr().out
    assert find_missing_control(clips, options, torch.bfloat16).count == 0
    assert not (pairs.parent / "cache/clips").exists()

    monkeypatch.setattr(sys, "argv", command(options, pairs, "--domain=cg", "--control_only", "--preview=p"))
    with pytest.raises(SystemExit, match=r"^error: --preview: shows latents, which --control_only does not make"):
        run(c2r.encode.main)


def test_features_of_altered_control_cannot_be_kept(tiny_models, small_datasets, tmp_path, monkeypatch):
    call = phase2(tiny_models, small_datasets, tmp_path, tmp_path / "out")
    arguments = call[call.index("train_phase2.py") :]
    monkeypatch.setattr(sys, "argv", [*arguments, "--cache_control_features", "--control_augmentation=0.5"])
    with pytest.raises(SystemExit, match=r"^error: --cache_control_features: .* leave one of them out$"):
        run(train_phase2.main)
