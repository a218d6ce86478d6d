"""Cached DINOv3 features equal those that a training step would compute."""

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import c2r.encode
from c2r import InputError
from c2r.cli import parse, run
from c2r.data.manifest import read_manifest
from c2r.encoding.cache import ControlSettings, control_path, current_encoders
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_control, encode_missing
from c2r.encoding.missing import find_missing_control
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.options import PHASE2
from c2r.units import size_text
from tests.helpers.datasets import write_dataset
from tests.helpers.settings import clip_settings
from tests.helpers.tiny import FEATURE_DIM, save_tiny_dinov3


@pytest.fixture
def settings(tiny_models, tmp_path):
    return clip_settings(base_model=str(tiny_models / "pipeline"), cache_dir=tmp_path / "cache", num_workers=1)


@pytest.fixture
def dinov3(tiny_models):
    return str(tiny_models / "dinov3")


@pytest.fixture
def pairs(tmp_path):
    """Three fine videos of two clips each; two of them share a coarse video."""
    names, controls = ["f0.mp4", "f1.mp4", "f2.mp4"], ["c0.mp4", "c1.mp4", "c0.mp4"]
    return write_dataset(tmp_path / "cg", names, ["rain", "night", "a street"], controls)


def read_pairs(folder, settings):
    return read_manifest(folder, "cg", settings, current_encoders(settings))


def change_weights(folder, factor):
    """Multiply all weights of a DINOv3 folder."""
    file = folder / "model.safetensors"
    changed = {name: factor * tensor for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_features_equal_dinov3_of_the_control_frames(pairs, settings, dinov3, process, dtype):
    clips = read_pairs(pairs, settings).clips
    encode_missing(clips, settings, *process)
    assert encode_control(clips, settings, dinov3, dtype, *process).failures == []
    assert len(list((settings.cache_dir / "control").rglob("*.safetensors"))) == 4  # clips share a coarse video
    control_settings = ControlSettings.of(settings, dinov3, dtype)
    cached = ClipDataset(clips, settings, with_control=True, control_settings=control_settings)
    frames = ClipDataset(clips, settings, with_control=True)
    model = DINOv3FeatureExtractor.from_pretrained(dinov3, torch_dtype=dtype)
    for i in range(len(clips)):
        assert "control_frames" not in cached[i]
        features = cached[i]["control_features"]
        assert features.shape == (5, 2, 3, FEATURE_DIM)
        assert features.dtype == dtype
        assert torch.equal(features, model(frames[i]["control_frames"][None].float() / 255)[0])


def test_features_of_another_dtype_or_dinov3_are_missing(pairs, settings, dinov3, process, tmp_path):
    clips = read_pairs(pairs, settings).clips
    encode_control(clips, settings, dinov3, torch.float32, *process)
    assert find_missing_control(clips, settings, dinov3, torch.float32).count == 0
    assert find_missing_control(clips, settings, dinov3, torch.bfloat16).count == 4
    other = save_tiny_dinov3(tmp_path / "other")
    change_weights(other, 2)
    assert find_missing_control(clips, settings, str(other), torch.float32).count == 4
    assert find_missing_control(clips, replace(settings, fps=4.0), dinov3, torch.float32).count == 4


def test_a_damaged_file_of_features_is_encoded_again(pairs, settings, dinov3, process, capsys):
    clips = read_pairs(pairs, settings).clips
    encode_control(clips, settings, dinov3, torch.float32, *process)
    path = control_path(settings.cache_dir, clips[0], ControlSettings.of(settings, dinov3, torch.float32))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    encode_control(clips, settings, dinov3, torch.float32, *process)
    assert "1 damaged files in the cache are encoded again" in capsys.readouterr().out
    assert path.read_bytes() == content


def test_a_dinov3_that_gives_nan_is_named(pairs, settings, process, tmp_path):
    broken = save_tiny_dinov3(tmp_path / "broken")
    change_weights(broken, torch.nan)
    clips = read_pairs(pairs, settings).clips
    with pytest.raises(InputError, match=r"c0\.mp4: .*broken gives control features that are not finite; check"):
        encode_control(clips, settings, str(broken), torch.float32, *process)


def command(dataset, settings, dinov3, *extra):
    (bucket,) = settings.buckets
    return [
        "encode",
        f"--dataset={dataset}",
        "--domain=cg",
        "--control_only",
        f"--pretrained_model_name_or_path={settings.base_model}",
        f"--dinov3={dinov3}",
        f"--cache_dir={settings.cache_dir}",
        f"--buckets={bucket}",
        f"--fps={settings.fps}",
        "--dataloader_num_workers=1",
        *extra,
    ]


def test_control_only_makes_the_features_of_phase_2s_default(pairs, settings, dinov3, monkeypatch, capsys):
    clips = read_pairs(pairs, settings).train
    missing = find_missing_control(clips, settings, dinov3, torch.bfloat16)
    assert missing.count in (2, 4)  # one pair is held out
    monkeypatch.setattr(sys, "argv", command(pairs, settings, dinov3, "--dry_run"))
    run(c2r.encode.main)
    size = size_text(missing.count * 5 * 2 * 3 * FEATURE_DIM * 2)
    assert f"{missing.count} clips and 0 captions to encode, {size} of control features" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", command(pairs, settings, dinov3))
    run(c2r.encode.main)
    assert f"control features of {missing.count} of {missing.count} clips are in" in capsys.readouterr().out
    assert find_missing_control(clips, settings, dinov3, torch.bfloat16).count == 0
    assert not (settings.cache_dir / "clips").exists()


def test_a_preview_of_control_features_is_refused(pairs, settings, dinov3, monkeypatch):
    monkeypatch.setattr(sys, "argv", command(pairs, settings, dinov3, "--preview=p"))
    with pytest.raises(SystemExit, match=r"^error: --preview p: shows latents, which --control_only does not make; "):
        run(c2r.encode.main)


def test_features_of_augmented_control_cannot_be_cached():
    required = ["--resume_backbone_from=a", "--real_dataset=a", "--cg_dataset=a", "--output_dir=a"]
    with pytest.raises(InputError, match=r"^--control_augmentation 0\.5: .* leave one of them out$"):
        parse(PHASE2, [*required, "--cache_control_features", "--control_augmentation=0.5"])
