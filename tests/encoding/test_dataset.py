"""ClipDataset: items as the training step reads them, from video files encoded by tiny models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from c2r import InputError
from c2r.data.manifest import read_manifest
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.encoding.cache import clip_path, current_encoders
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_missing
from tests.helpers.settings import clip_settings
from tests.helpers.tiny import LATENT_CHANNELS, PROMPT_LENGTH, TEXT_DIM, save_tiny_pipeline
from tests.helpers.videos import counter_frames, read_counter


def read(folder, domain, settings):
    return read_manifest(folder, domain, settings, current_encoders(settings))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, process):
    """(settings, real manifest, CG manifest), encoded."""
    root = tmp_path_factory.mktemp("data")
    frames = counter_frames(10, 32, 48)
    for name in ("real/a.mp4", "real/b.mp4", "cg/fine.mp4", "cg/fine2.mp4"):
        write_video(root / name, frames, 16)
    write_video(root / "cg/coarse.mp4", frames[::-1], 16)
    write_video(root / "real/coarse.mp4", frames[::-1], 16)
    (root / "real/metadata.csv").write_text("file_name,text,control_name\na.mp4,red brick,coarse.mp4\nb.mp4,night,\n")
    rows = "fine.mp4,coarse.mp4,night\nfine2.mp4,coarse.mp4,night\n"
    (root / "cg/metadata.csv").write_text(f"file_name,control_name,text\n{rows}")
    settings = clip_settings(base_model=str(save_tiny_pipeline(root / "model")), fps=16.0)
    real, cg = read(root / "real", "real", settings), read(root / "cg", "cg", settings)
    encode_missing([*real.clips, *cg.clips], settings, *process)
    return settings, real, cg


def test_a_batch_holds_items_of_both_domains(encoded):
    settings, real, cg = encoded
    real_dataset = ClipDataset(real.clips, settings, with_control=True)
    cg_dataset = ClipDataset(cg.clips, settings, with_control=True)
    loader = DataLoader(
        ConcatDataset([real_dataset, cg_dataset]),
        batch_sampler=[[0, 3], [5, 6], [1, 7]],
        num_workers=2,
        collate_fn=real_dataset.collate,
    )
    batches = list(loader)
    first = batches[0]
    assert first["latents_mean"].shape == first["latents_logvar"].shape == (2, LATENT_CHANNELS, 2, 4, 6)
    assert first["prompt_embeds"].shape == (2, PROMPT_LENGTH, TEXT_DIM)
    assert {first[name].dtype for name in ("latents_mean", "latents_logvar", "prompt_embeds")} == {torch.float32}
    assert first["control_frames"].shape == (2, 5, 3, 32, 48)
    assert first["control_frames"].dtype == torch.uint8
    assert [batch["domain"].tolist() for batch in batches] == [[0, 0], [1, 1], [0, 1]]
    assert [batch["index"].tolist() for batch in batches] == [[0, 3], [1, 2], [1, 3]]
    assert batches[2]["name"] == ["a.mp4#1", "fine2.mp4#1"]


def test_the_control_is_a_real_clips_own_video_or_a_pairs_coarse_one(encoded):
    settings, real, cg = encoded
    for manifest, expected in ((real, range(5, 10)), (cg, range(4, -1, -1))):
        dataset = ClipDataset(manifest.clips, settings, with_control=True)
        assert read_counter(dataset[1]["control_frames"]) == list(expected)
        assert torch.equal(dataset.control_frames(1), dataset[1]["control_frames"])
    assert "control_frames" not in ClipDataset(real.clips, settings)[0]


def test_prompts_are_padded_with_zeros(encoded):
    settings, real, _ = encoded
    dataset = ClipDataset(real.clips, settings)
    assert dataset.max_sequence_length == PROMPT_LENGTH
    prompt = dataset[0]["prompt_embeds"]  # "red brick </s>"
    assert (prompt.abs().sum(dim=1) > 0).tolist() == [True] * 3 + [False] * (PROMPT_LENGTH - 3)
    empty = dataset.empty_prompt_embeds
    assert (empty.abs().sum(dim=1) > 0).tolist() == [True] + [False] * (PROMPT_LENGTH - 1)
    assert not torch.equal(empty, dataset[2]["prompt_embeds"])


def test_a_dataset_without_clips_has_length_zero(encoded):
    assert len(ClipDataset([], encoded[0])) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_broken_after_encoding_is_named(encoded, process, tmp_path, workers):
    settings, _, _ = encoded
    write_video(tmp_path / "a.mp4", np.zeros((10, 32, 48, 3), np.uint8), 16)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,red brick\n")
    clips = read(tmp_path, "real", settings).clips
    encode_missing(clips, settings, *process)
    dataset = ClipDataset(clips, settings, with_control=True)
    assert len(list(DataLoader(dataset, num_workers=workers))) == 2
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(InputError, match=r"a\.mp4: cannot be decoded"):
        list(DataLoader(dataset, num_workers=workers))


def test_an_error_names_the_command_that_encodes_a_clip(encoded, tmp_path):
    settings, real, _ = encoded
    dataset = ClipDataset(real.clips, replace(settings, cache_dir=tmp_path))
    with pytest.raises(InputError, match=r"missing; run python -m c2r\.encode"):
        dataset[0]


def test_control_frames_come_from_the_same_window_as_the_latents(encoded):
    settings, real, _ = encoded
    clip = real.clips[1]
    dataset = ClipDataset(real.clips, settings, with_control=True)
    frames = read_window(clip.target_file.path, 5 / 16, 5, 16, 32, 48)
    assert torch.equal(dataset[1]["control_frames"], frames)
    assert clip_path("c", clip, dataset.cache_settings) != clip_path("c", real.clips[0], dataset.cache_settings)


def test_a_real_clip_with_a_coarse_version_is_its_own_control(encoded):
    settings, real, _ = encoded
    dataset = ClipDataset(real.clips, settings)
    assert [clip.name for clip in real.clips if clip.coarse_file] == ["a.mp4"] * 2
    first = next(i for i, clip in enumerate(real.clips) if (clip.name, clip.window) == ("a.mp4", 0))
    assert read_counter(dataset.control_frames(first)) == [0, 1, 2, 3, 4]
    assert read_counter(dataset.coarse_frames(first)) == [9, 8, 7, 6, 5]
