"""The encoding pass: what is in the cache is what the library makes; only what is missing is made, kill or no kill."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import c2r.encode
import c2r.encoding.encoders
import c2r.encoding.encoding_pass
import c2r.encoding.missing
from c2r import InputError
from c2r.cli import run
from c2r.data.manifest import read_manifest
from c2r.data.video import read_window, write_video
from c2r.encoding.cache import CLIP_TENSORS, CacheSettings, clip_path, prompt_path
from c2r.encoding.encoding_pass import encode_missing
from c2r.encoding.missing import find_missing
from c2r.encoding.preview import psnr
from c2r.files import load_tensors, save_tensors
from c2r.models.vae import encode_frames
from tests.helpers.forks import forked_twice, statuses
from tests.helpers.tiny import LATENT_CHANNELS, PROMPT_LENGTH, TEXT_DIM, save_tiny_pipeline
from tests.helpers.videos import corner_frames, counter_frames, encode_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def data(tmp_path):
    """Two real files, three windows of 5 frames; one caption is longer than the tokenizer's 16 tokens."""
    folder = tmp_path / "data"
    write_video(folder / "a.mp4", counter_frames(10, 32, 48), 16)
    write_video(folder / "b.mp4", corner_frames(5, 32, 48), 16)
    rows = ["file_name,text", "a.mp4,the  red &amp; brick   street", f"b.mp4,{'rain ' * 20}"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def options(model):
    return SimpleNamespace(
        pretrained_model_name_or_path=str(model),
        height=32,
        width=48,
        num_frames=5,
        fps=16,
        cache_dir=None,
        dataloader_num_workers=0,
    )


def cached(data, options):
    """{file in the cache: its time of writing}"""
    return {path: path.stat().st_mtime_ns for path in sorted(data.glob(".c2r_cache/*/*/*.safetensors"))}


class NoSteps(FlowMatchEulerDiscreteScheduler):
    """Leaves the pipeline nothing to do but to decode the latents that it is given."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps[:0]


def test_the_pipeline_decodes_cached_latents_to_what_the_vae_makes_of_the_video(data, options, model, accelerator):
    clips = read_manifest(data, "real", options).clips
    encode_missing(clips, options, accelerator)
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.scheduler = NoSteps()
    pipeline.set_progress_bar_config(disable=True)
    settings = CacheSettings.from_options(options)
    assert len(clips) == 3
    for clip in clips:
        tensors, metadata = load_tensors(clip_path(data / ".c2r_cache", clip, settings))
        assert metadata["file"] == clip.name
        assert metadata["window"] == clip.window
        mean = tensors["latents_mean"]
        assert mean.shape == (LATENT_CHANNELS, 2, 4, 6)
        assert mean.dtype == torch.float32
        frames = read_window(clip.file, clip.start, 5, 16, 32, 48)
        pixel_values = frames.permute(1, 0, 2, 3)[None] / 127.5 - 1
        with torch.no_grad():
            latent_dist = pipeline.vae.encode(pixel_values).latent_dist
            expected = pipeline.vae.decode(latent_dist.mode()).sample
        decoded = pipeline(prompt="", height=32, width=48, num_frames=5, latents=mean[None], output_type="pt").frames
        expected = pipeline.video_processor.postprocess_video(expected, output_type="pt")
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
        # A test that can fail: latents that were not normalised decode to something else.
        wrong = pipeline(prompt="", height=32, width=48, num_frames=5, latents=latent_dist.mode(), output_type="pt")
        assert (wrong.frames - expected).abs().max() > 0.01
        # The distribution's spread is normalised too.
        std = torch.tensor(pipeline.vae.config.latents_std).view(-1, 1, 1, 1)
        torch.testing.assert_close(
            torch.exp(0.5 * tensors["latents_logvar"].float()), latent_dist.std[0] / std, rtol=2e-2, atol=1e-6
        )


def test_a_window_is_not_another_window(data, options, accelerator):
    clips = read_manifest(data, "real", options).clips
    encode_missing(clips, options, accelerator)
    settings = CacheSettings.from_options(options)
    means = [load_tensors(clip_path(data / ".c2r_cache", c, settings))[0]["latents_mean"] for c in clips]
    assert all((a - b).abs().max() > 1e-2 for a, b in ((means[0], means[1]), (means[0], means[2])))


def test_prompts_are_the_pipelines_cut_to_their_length(data, options, model, accelerator):
    clips = read_manifest(data, "real", options).clips
    encode_missing(clips, options, accelerator)
    pipeline = WanPipeline.from_pretrained(model)
    settings = CacheSettings.from_options(options)
    lengths = {"": 1, clips[0].text: 6, clips[2].text: PROMPT_LENGTH}  # words, "&" as one, and </s>
    for text, length in lengths.items():
        tensors, metadata = load_tensors(prompt_path(data / ".c2r_cache", text, settings))
        embeds = tensors["prompt_embeds"]
        assert embeds.shape == (length, TEXT_DIM)
        assert metadata["max_sequence_length"] == PROMPT_LENGTH
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(text, None, False, max_sequence_length=PROMPT_LENGTH)
        padded = torch.nn.functional.pad(embeds, (0, 0, 0, PROMPT_LENGTH - length))
        torch.testing.assert_close(padded, expected[0], atol=1e-5, rtol=0)
    in_clip = load_tensors(clip_path(data / ".c2r_cache", clips[0], settings))[0]["prompt_embeds"]
    assert torch.equal(
        in_clip, load_tensors(prompt_path(data / ".c2r_cache", clips[0].text, settings))[0]["prompt_embeds"]
    )


def test_encode_frames_normalises_by_channel(model):
    vae = WanPipeline.from_pretrained(model).vae
    frames = torch.randint(0, 256, (2, 5, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        mean, logvar = encode_frames(vae, frames)
        vae.register_to_config(latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS)
        plain_mean, plain_logvar = encode_frames(vae, frames)
    shift = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(-1, 1, 1, 1)
    scale = torch.tensor([0.5, 1.5, 2.0, 1.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(mean, (plain_mean - shift) / scale)
    torch.testing.assert_close(logvar.exp(), plain_logvar.exp() / scale**2)


def forbid(monkeypatch, *parts):
    load = c2r.encoding.encoding_pass.load_pipeline_part

    def guarded(source, part, **kwargs):
        assert part not in parts, f"{part} was loaded"
        return load(source, part, **kwargs)

    for module in (c2r.encoding.encoding_pass, c2r.encoding.encoders):
        monkeypatch.setattr(module, "load_pipeline_part", guarded)


def test_only_what_is_missing_is_made(data, options, accelerator, monkeypatch):
    encode_missing(read_manifest(data, "real", options).clips, options, accelerator)
    first = cached(data, options)
    assert len(first) == 3 + 3  # windows; captions and the empty prompt
    with monkeypatch.context() as patch:
        forbid(patch, "vae", "text_encoder", "tokenizer")
        encode_missing(read_manifest(data, "real", options).clips, options, accelerator)
    assert cached(data, options) == first
    # One window is gone: the VAE alone is needed.
    settings = CacheSettings.from_options(options)
    clips = read_manifest(data, "real", options).clips
    lost = clip_path(data / ".c2r_cache", clips[1], settings)
    content = load_file(lost)
    lost.unlink()
    with monkeypatch.context() as patch:
        forbid(patch, "text_encoder", "tokenizer")
        encode_missing(clips, options, accelerator)
    second = cached(data, options)
    assert {path for path in first if first[path] != second[path]} == {lost}
    assert all(torch.equal(tensor, content[name]) for name, tensor in load_file(lost).items())
    # The empty prompt is gone: the text encoder alone is needed.
    prompt_path(data / ".c2r_cache", "", settings).unlink()
    with monkeypatch.context() as patch:
        forbid(patch, "vae")
        encode_missing(clips, options, accelerator)
    assert set(cached(data, options)) == set(first)


def test_a_change_of_the_source_or_the_settings_is_encoded_anew(data, options, accelerator):
    def encode():
        before = set(cached(data, options))
        encode_missing(read_manifest(data, "real", options).clips, options, accelerator)
        return sorted(path.parts[-3] for path in set(cached(data, options)) - before)

    assert encode() == ["clips"] * 3 + ["prompts"] * 3
    os.utime(data / "b.mp4", ns=(0, 10**18))
    assert encode() == ["clips"]
    metadata = (data / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(metadata.replace("red", "blue"))
    assert encode() == ["clips"] * 2 + ["prompts"]
    options.height = 48
    assert encode() == ["clips"] * 3
    options.height = 32
    (data / "metadata.csv").write_text(metadata)
    assert encode() == []


def test_a_damaged_cache_file_is_told_and_encoded_anew(data, options, accelerator, capsys):
    clips = read_manifest(data, "real", options).clips
    encode_missing(clips, options, accelerator)
    path = clip_path(data / ".c2r_cache", clips[0], CacheSettings.from_options(options))
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    (path.parent / f".{path.name}.0.tmp").write_bytes(content[:50])  # left by a killed process
    capsys.readouterr()
    encode_missing(clips, options, accelerator)
    assert "1 damaged files in the cache are encoded anew" in capsys.readouterr().out
    assert load_file(path).keys() == {"latents_mean", "latents_logvar", "prompt_embeds"}


def broken_inside(path, count=40):
    """A video whose ends are whole and whose middle is not: only decoding it finds that out."""
    noise = np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), np.uint8)
    encode_video(path, noise, codec="prores_ks", pix_fmt="yuv422p10le")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 20_000 : middle + 20_000] = bytes(40_000)
    path.write_bytes(content)


def test_a_file_that_fails_within_is_named_noted_and_dropped_with_its_reason(data, options, accelerator):
    broken_inside(data / "bad.mov")
    with open(data / "metadata.csv", "a") as file:
        file.write("\nbad.mov,rain\n")
    clips = read_manifest(data, "real", options).clips
    assert len(clips) == 3 + 8
    failures = encode_missing(clips, options, accelerator).failures
    assert failures
    assert all("bad.mov: cannot be decoded" in failure and "\n" not in failure for failure in failures)
    manifest = read_manifest(data, "real", options)
    assert [clip.name for clip in manifest.clips] == ["a.mp4", "a.mp4", "b.mp4"]
    assert [(row.file, row.reason) for row in manifest.dropped] == [("bad.mov", "unreadable")]
    assert encode_missing(manifest.clips, options, accelerator).seconds_per_clip is None  # all there by now
    # Mended, it is used again.
    write_video(data / "good.mp4", counter_frames(5, 32, 48), 16)
    shutil.move(data / "good.mp4", data / "bad.mov")
    assert len(read_manifest(data, "real", options).clips) == 4


def test_a_disk_that_is_gone_for_a_while_costs_no_file(data, options, accelerator):
    clips = read_manifest(data, "real", options).clips
    (data / "a.mp4").rename(data / "away.mp4")
    with pytest.raises(InputError, match=r"a\.mp4: cannot be read \(No such file or directory\); start again when"):
        encode_missing(clips, options, accelerator)
    (data / "away.mp4").rename(data / "a.mp4")
    assert read_manifest(data, "real", options).dropped == []
    assert encode_missing(clips, options, accelerator).failures == []
    assert find_missing(clips, options).count == 0


def test_a_pair_whose_control_fails_within_is_found_out_before_training(data, options, accelerator):
    write_video(data / "fine.mp4", counter_frames(40, 32, 48), 16)
    broken_inside(data / "coarse.mov")
    rows = ["file_name,control_name,text", "a.mp4,a.mp4,a", "b.mp4,b.mp4,a", "fine.mp4,coarse.mov,a"]
    (data / "metadata.csv").write_text("\n".join(rows))
    failures = encode_missing(read_manifest(data, "cg", options).clips, options, accelerator).failures
    assert "coarse.mov" in failures[0]
    assert [row.file for row in read_manifest(data, "cg", options).dropped] == ["fine.mp4"]


def test_workers_give_the_same(data, options, accelerator, tmp_path):
    clips = read_manifest(data, "real", options).clips
    settings = CacheSettings.from_options(options)
    for workers in (0, 2):
        options.dataloader_num_workers, options.cache_dir = workers, str(tmp_path / str(workers))
        encode_missing(clips, options, accelerator)
    for clip in clips:
        alone, parallel = (load_file(clip_path(tmp_path / n, clip, settings)) for n in ("0", "2"))
        assert all(torch.equal(alone[name], parallel[name]) for name in alone)


def command(data, options):
    names = ("pretrained_model_name_or_path", "height", "width", "num_frames", "fps", "dataloader_num_workers")
    return ["--dataset", str(data), *(f"--{name}={getattr(options, name)}" for name in names)]


@pytest.mark.slow
def test_two_processes_killed_and_started_again(data, options, accelerator, tmp_path):
    """SIGKILL in the midst, the same command again: the cache equals one that was filled undisturbed."""
    # Long enough to be caught in the midst by a test that is itself kept waiting.
    write_video(data / "c.mp4", counter_frames(600, 32, 48), 16)
    with open(data / "metadata.csv", "a") as file:
        file.write("\nc.mp4,people\n")

    def encoded():
        return len(list(data.glob(".c2r_cache/clips/*/*.safetensors")))

    encode = ["-m", "c2r.encode", *command(data, options)]
    processes = forked_twice(encode, tmp_path)
    try:
        while encoded() < 5:
            assert all(process.is_alive() for process in processes), (tmp_path / "0/stderr").read_text()
            time.sleep(0.005)
    finally:
        for process in processes:
            process.kill()
            process.join()
    killed = cached(data, options)
    clips = read_manifest(data, "real", options).clips
    assert 5 <= encoded() < len(clips) == 123

    assert statuses(forked_twice(encode, tmp_path)) == [0, 0], (tmp_path / "0/stderr").read_text()
    logs = [[(tmp_path / rank / name).read_text() for name in ("stdout", "stderr")] for rank in ("0", "1")]
    assert "kept 123 clips of 3 files" in logs[0][0]
    assert "clips/s" in logs[0][1]
    assert not any("clips" in text for text in logs[1])  # the main process alone reports
    resumed = cached(data, options)
    settings = CacheSettings.from_options(options)
    reference = SimpleNamespace(**vars(options) | {"cache_dir": str(tmp_path / "reference")})
    encode_missing(clips, reference, accelerator)
    for clip in clips:
        path = clip_path(data / ".c2r_cache", clip, settings)
        assert killed.get(path, resumed[path]) == resumed[path]  # what was there was not made again
        expected = load_file(clip_path(reference.cache_dir, clip, settings))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())


def test_processes_that_see_other_files_do_not_go_on(data, options, tmp_path):
    other = tmp_path / "other/data"
    shutil.copytree(data, other)
    (other / "b.mp4").unlink()
    encode = ["-m", "c2r.encode", *command("data", options)]
    ended = statuses(forked_twice(encode, tmp_path, cwds=(tmp_path, other.parent)))
    assert not {0, -signal.SIGKILL} & set(ended), ended  # each by itself, and none in peace
    assert "its files are not the same for all processes" in (tmp_path / "0/stderr").read_text()
    assert not cached(data, options)


def test_the_command_fills_the_cache_and_says_so(data, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, options)])
    run(c2r.encode.main)
    out = capsys.readouterr()
    assert "kept 3 clips of 2 files" in out.out
    assert "3 of 3 clips are in" in out.out
    assert "clips/s" in out.err
    assert len(cached(data, options)) == 6


def test_bad_input_ends_the_command_in_one_line(data, options, monkeypatch):
    (data / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, options), f"--preview={data / 'file'}"])
    with pytest.raises(SystemExit, match=r"^error: --preview \S+/file: is a file; give a folder$"):
        run(c2r.encode.main)
    options.height = 50
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, options)])
    with pytest.raises(SystemExit, match=r"^error: --height 50: must be divisible by 16; try 48$"):
        run(c2r.encode.main)


def test_latents_that_do_not_fit_the_disk_are_refused_before_a_model_is_loaded(
    data, options, accelerator, monkeypatch
):
    clips = read_manifest(data, "real", options).clips
    assert find_missing(clips, options).count == 3
    one = 6 * LATENT_CHANNELS * 2 * 4 * 6  # bytes of two latent frames
    (needed,) = find_missing(clips, options).room.values()
    monkeypatch.setattr(c2r.encoding.missing.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"needed for the latents of 3 clips, .* free; make room, or give a --cache"):
        encode_missing(clips, options, accelerator)
    assert not cached(data, options)
    monkeypatch.setattr(c2r.encoding.missing.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    assert encode_missing(clips, options, accelerator).seconds_per_clip > 0
    assert find_missing(clips, options).count == 0
    stored = [load_tensors(path)[0] for path in cached(data, options)]
    latents = [t["latents_mean"].nbytes + t["latents_logvar"].nbytes for t in stored if "latents_mean" in t]
    assert latents == [one] * 3
    # The rest is prompts, of clips and on their own: about three letters to a token. This tokenizer cuts the longest.
    rest = sum(t["prompt_embeds"].nbytes for t in stored)
    assert rest < needed - 3 * one < 3 * rest
    assert encode_missing(clips, options, accelerator).seconds_per_clip is None


def test_a_preview_shows_what_comes_back_and_marks_what_does_not(data, options, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "preview"
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, options), f"--preview={folder}"])
    run(c2r.encode.main)
    out = capsys.readouterr().out
    # The tiny VAE has random weights: nothing comes back.
    assert out.count("LOW: below 20 dB") == 3
    assert "b.mp4 #0, real, 5x32x48, " in out
    with Image.open(folder / "preview-real-5x32x48.png") as sheet:
        assert sheet.width == 2 * 3 * 48 + 10  # source and cache, three frames of each
    white = np.full((5, 32, 48, 3), 255, np.uint8)
    assert psnr(white, white - 1) == pytest.approx(20 * np.log10(255))


def test_a_dry_run_tells_what_is_missing_and_writes_no_latents(data, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, options), "--dry_run"])
    run(c2r.encode.main)
    out = capsys.readouterr().out
    assert "dry run: 3 clips and 3 captions to encode, " in out
    assert "; 0 clips are there already" in out
    assert "dry run: 5x32x48: 3 clips, " in out
    assert not cached(data, options)


def test_clips_whose_latents_are_not_finite_are_dropped_and_a_vae_that_gives_no_others_is_named(
    data, options, model, accelerator, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(options.pretrained_model_name_or_path, broken)
    weights = load_file(broken / "vae/diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.weight"] *= torch.nan
    save_file(weights, broken / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    options.pretrained_model_name_or_path = str(broken)
    clips = read_manifest(data, "real", options).clips
    with pytest.raises(
        InputError, match=r"a\.mp4: .*broken gives latents that are not finite, nor are those of any other clip; check"
    ):
        encode_missing(clips, options, accelerator)
    assert len(read_manifest(data, "real", options).clips) == 3
    # Where the cache has another one, it is these clips that are bad.
    path = clip_path(data / ".c2r_cache", clips[0], CacheSettings.from_options(options))
    save_tensors(path, {name: torch.zeros(2) for name in CLIP_TENSORS}, {})
    assert len(encode_missing(clips, options, accelerator).failures) == 2
    with pytest.raises(InputError, match=r"none of its 2 rows can be used \(2 non-finite latents\)"):
        read_manifest(data, "real", options)
    # For another VAE they may be good; and a note that was cut short counts for nothing.
    options.pretrained_model_name_or_path = str(model)
    (data / ".c2r_cache/failures/cut.json").write_text("{")
    assert read_manifest(data, "real", options).dropped == []
