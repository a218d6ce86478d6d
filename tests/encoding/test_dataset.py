"""ClipDataset: items as the training step reads them, from real files and a real (tiny) encoding pass."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import ConcatDataset, DataLoader

from c2r import InputError
from c2r.data.manifest import read_manifest
from c2r.data.video import read_window, write_video
from c2r.encoding.cache import clip_path
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_missing
from tests.helpers.tiny import LATENT_CHANNELS, PROMPT_LENGTH, TEXT_DIM, save_tiny_pipeline
from tests.helpers.videos import counter_frames, read_counter


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """(options, real manifest, CG manifest), encoded."""
    root = tmp_path_factory.mktemp("data")
    frames = counter_frames(10, 32, 48)
    for name in ("real/a.mp4", "real/b.mp4", "cg/fine.mp4", "cg/fine2.mp4"):
        write_video(root / name, frames, 16)
    write_video(root / "cg/coarse.mp4", frames[::-1], 16)
    write_video(root / "real/coarse.mp4", frames[::-1], 16)
    (root / "real/metadata.csv").write_text("file_name,text,control_name\na.mp4,red brick,coarse.mp4\nb.mp4,night,\n")
    rows = "fine.mp4,coarse.mp4,night\nfine2.mp4,coarse.mp4,night\n"
    (root / "cg/metadata.csv").write_text(f"file_name,control_name,text\n{rows}")
    options = SimpleNamespace(
        pretrained_model_name_or_path=str(save_tiny_pipeline(root / "model")),
        height=32,
        width=48,
        num_frames=5,
        fps=16,
        dataloader_num_workers=0,
    )
    real, cg = read_manifest(root / "real", "real", options), read_manifest(root / "cg", "cg", options)
    encode_missing([*real.clips, *cg.clips], options, Accelerator(cpu=True))
    return options, real, cg


def test_items_of_a_batch_from_both_domains(setup):
    options, real, cg = setup
    real_dataset = ClipDataset(real.clips, options, with_control=True)
    cg_dataset = ClipDataset(cg.clips, options, with_control=True)
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


def test_control_is_the_clips_own_video_or_the_pairs_coarse_one(setup):
    options, real, cg = setup
    for manifest, expected in ((real, range(5, 10)), (cg, range(4, -1, -1))):
        dataset = ClipDataset(manifest.clips, options, with_control=True)
        assert read_counter(dataset[1]["control_frames"]) == list(expected)
        assert torch.equal(dataset.control_frames(1), dataset[1]["control_frames"])
    assert "control_frames" not in ClipDataset(real.clips, options)[0]


def test_prompts_are_padded_with_zeros(setup):
    options, real, _ = setup
    dataset = ClipDataset(real.clips, options)
    assert dataset.max_sequence_length == PROMPT_LENGTH
    prompt = dataset[0]["prompt_embeds"]  # "red brick </s>"
    assert (prompt.abs().sum(dim=1) > 0).tolist() == [True] * 3 + [False] * (PROMPT_LENGTH - 3)
    empty = dataset.empty_prompt_embeds
    assert (empty.abs().sum(dim=1) > 0).tolist() == [True] + [False] * (PROMPT_LENGTH - 1)
    assert not torch.equal(empty, dataset[2]["prompt_embeds"])


def test_a_dataset_without_clips_has_no_length(setup):
    assert len(ClipDataset([], setup[0])) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_that_is_gone_or_broken_raises_and_names_it(setup, tmp_path, workers):
    options, real, _ = setup
    write_video(tmp_path / "a.mp4", np.zeros((10, 32, 48, 3), np.uint8), 16)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,red brick\n")
    clips = read_manifest(tmp_path, "real", options).clips
    encode_missing(clips, options, Accelerator(cpu=True))
    dataset = ClipDataset(clips, options, with_control=True)
    assert len(list(DataLoader(dataset, num_workers=workers))) == 2
    (tmp_path / "a.mp4").write_bytes(b"no video any more")
    with pytest.raises(InputError, match=r"a\.mp4: cannot be decoded"):
        list(DataLoader(dataset, num_workers=workers))
    assert dataset.clips[0].file != real.clips[0].file


def test_a_clip_that_is_not_encoded_says_what_to_run(setup, tmp_path):
    options, real, _ = setup
    other = SimpleNamespace(**vars(options) | {"cache_dir": str(tmp_path)})
    dataset = ClipDataset(real.clips, other)
    with pytest.raises(InputError, match=r"missing; run python -m c2r\.encode"):
        dataset[0]


def test_control_frames_come_from_the_same_window_as_the_latents(setup):
    options, real, _ = setup
    clip = real.clips[1]
    dataset = ClipDataset(real.clips, options, with_control=True)
    frames = read_window(clip.file, 5 / 16, 5, 16, 32, 48)
    assert torch.equal(dataset[1]["control_frames"], frames)
    assert clip_path("c", clip, dataset.settings) != clip_path("c", real.clips[0], dataset.settings)


def test_a_real_clip_is_its_own_control_also_where_it_has_a_coarse_version(setup):
    options, real, _ = setup
    dataset = ClipDataset(real.clips, options)
    assert [clip.name for clip in real.clips if clip.coarse_source] == ["a.mp4"] * 2
    first = next(i for i, clip in enumerate(real.clips) if (clip.name, clip.window) == ("a.mp4", 0))
    assert read_counter(dataset.control_frames(first)) == [0, 1, 2, 3, 4]
    assert read_counter(dataset.coarse_frames(first)) == [9, 8, 7, 6, 5]
