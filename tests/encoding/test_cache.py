"""The cache: names that follow from the content, files that are complete or absent, damage that is detected."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c2r import InputError, __version__
from c2r.data.buckets import Bucket
from c2r.data.clips import Clip
from c2r.encoding.cache import (
    MIB,
    CacheSettings,
    ControlSettings,
    clip_key,
    clip_path,
    control_path,
    encoder_fingerprint,
    prompt_path,
)
from c2r.files import is_complete, load_tensors, save_tensors, write_atomic

CLIP = Clip("data", "a.mp4", "a street", "cg", 1, 0.5, Bucket(9, 48, 64), 100, 10**18, False, "b.mp4", 50, 10**18)
SETTINGS = CacheSettings(16.0, "vae", "text")
TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_a_cache_file_is_named_by_all_that_its_content_depends_on():
    names = {clip_path("c", CLIP, SETTINGS)}
    changes = [{"name": "x.mp4"}, {"size": 101}, {"mtime_ns": 10**18 + 1}, {"start": 1.0}, {"text": "a road"}]
    changes += [{"bucket": Bucket(*shape)} for shape in ((13, 48, 64), (9, 64, 64), (9, 48, 48))]
    for change in changes:
        names.add(clip_path("c", replace(CLIP, **change), SETTINGS))
    for change in ({"fps": 24.0}, {"vae": "x"}, {"text_encoder": "x"}):
        names.add(clip_path("c", CLIP, replace(SETTINGS, **change)))
    assert len(names) == 12
    # None of these changes the latents.
    same = replace(CLIP, folder="moved", window=3, held_out=True, domain="real", control_name="x.mp4")
    assert clip_path("c", same, SETTINGS) == clip_path("c", CLIP, SETTINGS)


def test_cached_names_stay_the_same_between_versions():
    """A change of this hash would encode everything again for every user; a new PIXELS_VERSION means to."""
    assert clip_key(CLIP, SETTINGS) == "39c96e474753ece1b1d16d19c8e3a0abc64d4b2c6c216f4b3e16e37d72d827fd"
    control = control_path("c", CLIP, ControlSettings(16.0, "dinov3", "torch.bfloat16"))
    assert control.stem == "0e7e6518f3ce04e6f81145a222704f43bda0a52478baa9317d7b6215a2d83198"
    prompt = prompt_path("c", "a street", SETTINGS)
    assert prompt.stem == "ceeb4d16c69c4ae1dfd8bf697a70a33f53a73e64e3dc6910ef038c9da9bf41b5"


def test_prompts_are_shared_by_all_clip_sizes_frame_rates_and_vaes():
    assert prompt_path("c", "a", SETTINGS) == prompt_path("c", "a", replace(SETTINGS, fps=24.0, vae="x"))
    other_text_encoder = replace(SETTINGS, text_encoder="x")
    names = {prompt_path("c", text, encoders) for text in ("a", "") for encoders in (SETTINGS, other_text_encoder)}
    assert len(names) == 4


def test_saved_tensors_and_metadata_are_loaded_again(tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    save_tensors(path, TENSORS, {"file": "é.mp4", "window": 3})
    tensors, metadata = load_tensors(path)
    assert metadata == {"file": "é.mp4", "window": 3, "version": __version__}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert {name: t.dtype for name, t in tensors.items()} == {"a": torch.float32, "b": torch.bfloat16}
    assert is_complete(path, ["a", "b"])
    assert not is_complete(path, ["a"])
    assert os.listdir(path.parent) == ["x.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "whole.safetensors"
    save_tensors(path, TENSORS, {})
    return path.read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_cut_or_extended_file_is_found_damaged(tmp_path_factory, whole, data):
    length = data.draw(st.integers(0, len(whole) + 8).filter(lambda n: n != len(whole)))
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    path.write_bytes((whole + bytes(8))[:length])
    assert not is_complete(path, ["a", "b"])
    with pytest.raises(InputError, match=r"x\.safetensors.*is damaged; delete it and start again"):
        load_tensors(path)


def test_a_missing_cache_file_is_named(tmp_path):
    assert not is_complete(tmp_path / "x.safetensors", ["a", "b"])
    with pytest.raises(InputError, match=r"x\.safetensors.*is missing; run python -m c2r\.encode"):
        load_tensors(tmp_path / "x.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def crash(*_):
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, crash)
            with pytest.raises(KeyboardInterrupt):
                write_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["x"]
    # A killed process cannot clean up: the temporary file that it leaves is never read.
    (tmp_path / ".x.0.tmp").write_bytes(b"half")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_an_encoders_fingerprint_changes_with_its_files(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = bytearray(os.urandom(4 * MIB))
    (folder / "model.safetensors").write_bytes(weights)

    def fingerprint(change):
        copy = tmp_path / f"copy{len(os.listdir(tmp_path))}"  # fingerprints are cached by folder
        shutil.copytree(folder, copy)
        change(copy)
        return encoder_fingerprint(copy)

    def flip(position):
        def change(copy):
            weights[position] ^= 1
            (copy / "model.safetensors").write_bytes(weights)
            weights[position] ^= 1

        return change

    changes = [
        lambda copy: None,
        lambda copy: (copy / "config.json").write_text("{ }"),
        lambda copy: (copy / "model.safetensors").rename(copy / "other.safetensors"),
        lambda copy: (copy / "model.safetensors").write_bytes(weights + b"0"),
        flip(10),
        flip(-10),
    ]
    assert len({fingerprint(change) for change in changes}) == len(changes)
    (folder / "README.md").write_text("not part of the model")
    assert fingerprint(lambda copy: os.utime(copy / "config.json")) == fingerprint(changes[0])
