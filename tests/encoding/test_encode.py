"""The encoding pass: the cache equals what diffusers computes, and only missing files are made, also after a kill."""

import csv
import os
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import c2r.encode
import c2r.encoding.encoders
import c2r.encoding.encoding_pass
import c2r.encoding.missing
import c2r.models.parts
from c2r import InputError, cli
from c2r.cli import run
from c2r.data.buckets import Bucket
from c2r.data.manifest import read_manifest
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.encode import next_command
from c2r.encoding.cache import CLIP_TENSORS, CacheSettings, clip_path, current_encoders, prompt_path
from c2r.encoding.encoding_pass import encode_missing
from c2r.encoding.missing import find_missing
from c2r.encoding.preview import psnr
from c2r.files import load_tensors, save_tensors
from c2r.models.vae import encode_frames
from c2r.options import ENCODE, PHASE1, PHASE2
from tests.helpers.commands import ROOT, succeed
from tests.helpers.forks import forked_twice, statuses
from tests.helpers.settings import clip_settings
from tests.helpers.tiny import LATENT_CHANNELS, PROMPT_LENGTH, TEXT_DIM, save_tiny_pipeline
from tests.helpers.videos import corner_frames, counter_frames, encode_video


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


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
def settings(model):
    return clip_settings(base_model=str(model), fps=16.0)


def read(folder, settings, domain="real"):
    return read_manifest(folder, domain, settings, current_encoders(settings))


def cached(data):
    """Return {file in the cache: its time of writing}."""
    return {path: path.stat().st_mtime_ns for path in sorted(data.glob(".c2r_cache/*/*/*.safetensors"))}


class NoSteps(FlowMatchEulerDiscreteScheduler):
    """Makes the pipeline decode the latents that it is given, without a denoising step."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps[:0]


def test_the_pipeline_decodes_cached_latents_to_the_vaes_video(data, settings, model, process):
    clips = read(data, settings).clips
    encode_missing(clips, settings, *process)
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.scheduler = NoSteps()
    pipeline.set_progress_bar_config(disable=True)
    cache_settings = CacheSettings.of(settings)
    assert len(clips) == 3
    for clip in clips:
        tensors, metadata = load_tensors(clip_path(data / ".c2r_cache", clip, cache_settings))
        assert metadata["file"] == clip.name
        assert metadata["window"] == clip.window
        mean = tensors["latents_mean"]
        assert mean.shape == (LATENT_CHANNELS, 2, 4, 6)
        assert mean.dtype == torch.float32
        frames = read_window(clip.target_file.path, clip.start, 5, 16, 32, 48)
        pixel_values = frames.permute(1, 0, 2, 3)[None] / 127.5 - 1
        with torch.no_grad():
            latent_dist = pipeline.vae.encode(pixel_values).latent_dist
            expected = pipeline.vae.decode(latent_dist.mode()).sample
        decoded = pipeline(prompt="", height=32, width=48, num_frames=5, latents=mean[None], output_type="pt").frames
        expected = pipeline.video_processor.postprocess_video(expected, output_type="pt")
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
        # The comparison is sharp: latents that are not normalised decode to another video.
        wrong = pipeline(prompt="", height=32, width=48, num_frames=5, latents=latent_dist.mode(), output_type="pt")
        assert (wrong.frames - expected).abs().max() > 0.01
        # The distribution's spread is normalised too.
        std = torch.tensor(pipeline.vae.config.latents_std).view(-1, 1, 1, 1)
        torch.testing.assert_close(
            torch.exp(0.5 * tensors["latents_logvar"].float()), latent_dist.std[0] / std, rtol=2e-2, atol=1e-6
        )


def test_only_convolutions_run_in_tf32():
    # Torch's defaults, which docs/speed.md describes. This module has imported everything that encodes.
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.benchmark


def test_latents_in_bf16_are_cached_beside_those_in_fp32(data, settings, process):
    exact, rounded = settings, replace(settings, vae_dtype="bf16")
    clips = read(data, settings).clips
    tensors = []
    for each in (exact, rounded):
        assert find_missing(clips, each).count == len(clips)
        encode_missing(clips, each, *process)
        assert find_missing(clips, each).count == 0
        tensors.append(load_tensors(clip_path(data / ".c2r_cache", clips[0], CacheSettings.of(each))))
    assert tensors[1][1]["settings"]["vae"].endswith(" bf16")
    means = [content["latents_mean"] for content, _ in tensors]
    assert means[1].dtype == torch.float32  # rounded by the VAE, not when stored
    error = (means[1] - means[0]).square().mean().sqrt() / means[0].std()
    assert 0 < error < 0.05
    # The prompt embeddings do not depend on the VAE.
    assert torch.equal(tensors[0][0]["prompt_embeds"], tensors[1][0]["prompt_embeds"])


def test_different_windows_have_different_latents(data, settings, process):
    clips = read(data, settings).clips
    encode_missing(clips, settings, *process)
    cache_settings = CacheSettings.of(settings)
    means = [load_tensors(clip_path(data / ".c2r_cache", c, cache_settings))[0]["latents_mean"] for c in clips]
    assert all((a - b).abs().max() > 1e-2 for a, b in ((means[0], means[1]), (means[0], means[2])))


def test_cached_prompts_equal_the_pipelines_without_padding(data, settings, model, process):
    clips = read(data, settings).clips
    encode_missing(clips, settings, *process)
    pipeline = WanPipeline.from_pretrained(model)
    cache_settings = CacheSettings.of(settings)
    lengths = {"": 1, clips[0].text: 6, clips[2].text: PROMPT_LENGTH}  # words, "&" as one, and </s>
    for text, length in lengths.items():
        tensors, metadata = load_tensors(prompt_path(data / ".c2r_cache", text, cache_settings))
        embeds = tensors["prompt_embeds"]
        assert embeds.shape == (length, TEXT_DIM)
        assert metadata["max_sequence_length"] == PROMPT_LENGTH
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(text, None, False, max_sequence_length=PROMPT_LENGTH)
        padded = torch.nn.functional.pad(embeds, (0, 0, 0, PROMPT_LENGTH - length))
        torch.testing.assert_close(padded, expected[0], atol=1e-5, rtol=0)
    in_clip = load_tensors(clip_path(data / ".c2r_cache", clips[0], cache_settings))[0]["prompt_embeds"]
    assert torch.equal(
        in_clip, load_tensors(prompt_path(data / ".c2r_cache", clips[0].text, cache_settings))[0]["prompt_embeds"]
    )


def test_encode_frames_normalises_each_channel(model):
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
    """Fail if one of these parts of the pipeline is loaded."""
    load = c2r.encoding.encoding_pass.load_pipeline_part

    def guarded(name_or_path, part, torch_dtype=None):
        assert part not in parts, f"{part} was loaded"
        return load(name_or_path, part, torch_dtype)

    for module in (c2r.encoding.encoding_pass, c2r.encoding.encoders, c2r.models.parts):
        monkeypatch.setattr(module, "load_pipeline_part", guarded)


def test_only_missing_files_are_made(data, settings, process, monkeypatch):
    encode_missing(read(data, settings).clips, settings, *process)
    first = cached(data)
    assert len(first) == 3 + 3  # windows; captions and the empty prompt
    with monkeypatch.context() as patch:
        forbid(patch, "vae", "text_encoder", "tokenizer")
        encode_missing(read(data, settings).clips, settings, *process)
    assert cached(data) == first
    # A clip is missing: only the VAE is needed.
    cache_settings = CacheSettings.of(settings)
    clips = read(data, settings).clips
    lost = clip_path(data / ".c2r_cache", clips[1], cache_settings)
    content = load_file(lost)
    lost.unlink()
    with monkeypatch.context() as patch:
        forbid(patch, "text_encoder", "tokenizer")
        encode_missing(clips, settings, *process)
    second = cached(data)
    assert {path for path in first if first[path] != second[path]} == {lost}
    assert all(torch.equal(tensor, content[name]) for name, tensor in load_file(lost).items())
    # The empty prompt is missing: only the text encoder is needed.
    prompt_path(data / ".c2r_cache", "", cache_settings).unlink()
    with monkeypatch.context() as patch:
        forbid(patch, "vae")
        encode_missing(clips, settings, *process)
    assert set(cached(data)) == set(first)


def test_a_changed_file_caption_or_bucket_is_encoded_again(data, settings, process):
    def encode(settings=settings):
        before = set(cached(data))
        encode_missing(read(data, settings).clips, settings, *process)
        return sorted(path.parts[-3] for path in set(cached(data)) - before)

    assert encode() == ["clips"] * 3 + ["prompts"] * 3
    os.utime(data / "b.mp4", ns=(0, 10**18))
    assert encode() == ["clips"]
    metadata = (data / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(metadata.replace("red", "blue"))
    assert encode() == ["clips"] * 2 + ["prompts"]
    assert encode(replace(settings, buckets=(Bucket(5, 48, 48),))) == ["clips"] * 3
    (data / "metadata.csv").write_text(metadata)
    assert encode() == []


def test_a_damaged_cache_file_is_reported_and_encoded_again(data, settings, process, capsys):
    clips = read(data, settings).clips
    encode_missing(clips, settings, *process)
    path = clip_path(data / ".c2r_cache", clips[0], CacheSettings.of(settings))
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    (path.parent / f".{path.name}.0.tmp").write_bytes(content[:50])  # left by a killed process
    capsys.readouterr()
    encode_missing(clips, settings, *process)
    assert "1 damaged files in the cache are encoded again" in capsys.readouterr().out
    assert load_file(path).keys() == {"latents_mean", "latents_logvar", "prompt_embeds"}


def broken_inside(path, count=40):
    """Write a video with a damaged middle: only decoding it finds the damage."""
    noise = np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), np.uint8)
    encode_video(path, noise, codec="prores_ks", pix_fmt="yuv422p10le")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 2_000 : middle + 2_000] = bytes(4_000)
    path.write_bytes(content)


def test_windows_that_cannot_be_decoded_are_noted_and_dropped_with_their_reason(data, settings, process):
    broken_inside(data / "bad.mov")
    with open(data / "metadata.csv", "a") as file:
        file.write("\nbad.mov,rain\n")
    clips = read(data, settings).clips
    assert len(clips) == 3 + 8
    failures = encode_missing(clips, settings, *process).failures
    assert 1 <= len(failures) < 8
    assert all(re.search(r"bad\.mov: (cannot be decoded|is damaged) \(.+\); ", failure) for failure in failures)
    manifest = read(data, settings)
    assert manifest.dropped == []
    assert {row.file for row in manifest.dropped_windows} == {"bad.mov"}
    kept = [clip.window for clip in manifest.clips if clip.name == "bad.mov"]
    assert sorted(kept + [row.window for row in manifest.dropped_windows]) == list(range(8))
    assert len(manifest.clips) == 3 + len(kept)
    assert 'bad.mov,4,,,dropped,"damaged: ' in manifest.write().read_text()
    assert encode_missing(manifest.clips, settings, *process).seconds_per_clip is None  # nothing is missing
    # The repaired file is used again.
    write_video(data / "good.mp4", counter_frames(5, 32, 48), 16)
    shutil.move(data / "good.mp4", data / "bad.mov")
    assert len(read(data, settings).clips) == 4


def test_a_file_that_cannot_be_read_for_a_while_is_not_dropped(data, settings, process):
    clips = read(data, settings).clips
    (data / "a.mp4").rename(data / "away.mp4")
    with pytest.raises(InputError, match=r"a\.mp4: cannot be read \(No such file or directory\); start again when"):
        encode_missing(clips, settings, *process)
    (data / "away.mp4").rename(data / "a.mp4")
    assert read(data, settings).dropped == []
    assert encode_missing(clips, settings, *process).failures == []
    assert find_missing(clips, settings).count == 0


def test_a_damaged_control_is_found_before_training(data, settings, process):
    write_video(data / "fine.mp4", counter_frames(40, 32, 48), 16)
    broken_inside(data / "coarse.mov")
    rows = ["file_name,control_name,text", "a.mp4,a.mp4,a", "b.mp4,b.mp4,a", "fine.mp4,coarse.mov,a"]
    (data / "metadata.csv").write_text("\n".join(rows))
    failures = encode_missing(read(data, settings, "cg").clips, settings, *process).failures
    assert "coarse.mov" in failures[0]
    assert {row.file for row in read(data, settings, "cg").dropped_windows} == {"fine.mp4"}


def test_data_loader_workers_do_not_change_the_latents(data, settings, process, tmp_path):
    clips = read(data, settings).clips
    cache_settings = CacheSettings.of(settings)
    for workers in (0, 2):
        encode_missing(clips, replace(settings, num_workers=workers, cache_dir=tmp_path / str(workers)), *process)
    for clip in clips:
        alone, parallel = (load_file(clip_path(tmp_path / n, clip, cache_settings)) for n in ("0", "2"))
        assert all(torch.equal(alone[name], parallel[name]) for name in alone)


def command(data, settings):
    """Return the options of c2r.encode that give these settings."""
    (bucket,) = settings.buckets
    return [
        f"--dataset={data}",
        f"--pretrained_model_name_or_path={settings.base_model}",
        *(f"--{name}={value}" for name, value in bucket._asdict().items()),
        f"--fps={settings.fps}",
        f"--dataloader_num_workers={settings.num_workers}",
    ]


@pytest.mark.slow
def test_two_killed_processes_continue_when_started_again(data, settings, process, tmp_path):
    """After SIGKILL and the same command again, the cache equals one that was filled without interruption."""
    # Long enough that a test which waits for the CPU still kills the processes while they encode.
    write_video(data / "c.mp4", counter_frames(600, 32, 48), 16)
    with open(data / "metadata.csv", "a") as file:
        file.write("\nc.mp4,people\n")

    def count():
        return len(list(data.glob(".c2r_cache/clips/*/*.safetensors")))

    encode = ["-m", "c2r.encode", *command(data, settings)]
    processes = forked_twice(encode, tmp_path)
    try:
        while count() < 5:
            assert all(child.is_alive() for child in processes), (tmp_path / "0/stderr").read_text()
            time.sleep(0.005)
    finally:
        for child in processes:
            child.kill()
            child.join()
    killed = cached(data)
    clips = read(data, settings).clips
    assert 5 <= count() < len(clips) == 123

    assert statuses(forked_twice(encode, tmp_path)) == [0, 0], (tmp_path / "0/stderr").read_text()
    logs = [[(tmp_path / rank / name).read_text() for name in ("stdout", "stderr")] for rank in ("0", "1")]
    assert "kept 123 clips of 3 files" in logs[0][0]
    assert "clips/s" in logs[0][1]
    assert not any("clips" in text for text in logs[1])  # the main process alone reports
    resumed = cached(data)
    cache_settings = CacheSettings.of(settings)
    reference = replace(settings, cache_dir=tmp_path / "reference")
    encode_missing(clips, reference, *process)
    for clip in clips:
        path = clip_path(data / ".c2r_cache", clip, cache_settings)
        assert killed.get(path, resumed[path]) == resumed[path]  # a cached file is not written again
        expected = load_file(clip_path(reference.cache_dir, clip, cache_settings))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())


def test_processes_that_see_different_files_end(data, settings, tmp_path):
    other = tmp_path / "other/data"
    shutil.copytree(data, other)
    (other / "b.mp4").unlink()
    encode = ["-m", "c2r.encode", *command("data", settings)]
    ended = statuses(forked_twice(encode, tmp_path, cwds=(tmp_path, other.parent)))
    assert not {0, -signal.SIGKILL} & set(ended), ended  # each with an error of its own
    assert "its files are not the same for all processes" in (tmp_path / "0/stderr").read_text()
    assert not cached(data)


def test_the_command_fills_the_cache_and_prints_the_result(data, settings, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, settings)])
    run(c2r.encode.main)
    out = capsys.readouterr()
    assert "kept 3 clips of 2 files" in out.out
    assert "3 of 3 clips are in" in out.out
    assert "clips/s" in out.err
    assert len(cached(data)) == 6
    (path,) = data.glob(".c2r_cache/manifest-*.csv")
    with open(path, newline="") as file:
        remarks = {row["file_name"]: row["reason"] for row in csv.DictReader(file)}
    assert remarks == {"a.mp4": "", "b.mp4": "caption of 21 tokens, 16 are used"}


def test_bad_options_end_the_command_with_one_line(data, settings, monkeypatch):
    (data / "file").write_text("")
    errors = {
        f"--preview={data / 'file'}": r"--preview \S+/file: is a file; give a folder",
        "--preview=p --dry_run": r"--preview p: needs latents, which --dry_run does not write; leave one out",
        "--height=50": r"--height 50: must be divisible by 16; try 48",
    }
    for options, error in errors.items():
        monkeypatch.setattr(sys, "argv", ["encode", *command(data, settings), *options.split()])
        with pytest.raises(SystemExit, match=f"^error: {error}$"):
            run(c2r.encode.main)


def test_options_are_parsed_without_heavy_imports():
    succeed("-c", "import sys, c2r.encode; assert not {'torch', 'numpy', 'diffusers'} & sys.modules.keys()")


def test_latents_that_do_not_fit_the_disk_are_refused_before_encoding(data, settings, process, monkeypatch):
    clips = read(data, settings).clips
    assert find_missing(clips, settings).count == 3
    latent_bytes = 6 * LATENT_CHANNELS * 2 * 4 * 6  # of one clip: two latent frames
    (needed,) = find_missing(clips, settings).bytes_needed.values()
    monkeypatch.setattr(c2r.encoding.missing.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"needed for the latents of 3 clips, .* free; make room, or give a --cache"):
        encode_missing(clips, settings, *process)
    assert not cached(data)
    monkeypatch.setattr(c2r.encoding.missing.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    assert encode_missing(clips, settings, *process).seconds_per_clip > 0
    assert find_missing(clips, settings).count == 0
    stored = [load_tensors(path)[0] for path in cached(data)]
    latents = [t["latents_mean"].nbytes + t["latents_logvar"].nbytes for t in stored if "latents_mean" in t]
    assert latents == [latent_bytes] * 3
    # Prompts, in the files of clips and in files of their own, are estimated at three letters per token.
    prompt_bytes = sum(t["prompt_embeds"].nbytes for t in stored)
    assert prompt_bytes < needed - 3 * latent_bytes < 3 * prompt_bytes
    assert encode_missing(clips, settings, *process).seconds_per_clip is None


def preview(data, settings, folder, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, settings), f"--preview={folder}", *options])
    run(c2r.encode.main)
    return capsys.readouterr().out


def test_a_preview_shows_decoded_clips_and_marks_latents_of_another_clip(
    data, settings, monkeypatch, capsys, tmp_path
):
    settings = replace(settings, base_model=str(ROOT / "c2r/toy/weights/model"))  # its VAE can tell clips apart
    out = preview(data, settings, tmp_path / "preview", monkeypatch, capsys)
    assert "LOW" not in out
    assert "b.mp4 #0, real, 5x32x48, " in out
    with Image.open(tmp_path / "preview/preview-real-5x32x48.png") as sheet:
        assert sheet.width == 2 * 3 * 48 + 10  # columns of the video and the cache, three frames in each
    for path in cached(data):
        tensors, metadata = load_tensors(path)
        if metadata.get("file") == "b.mp4":
            save_tensors(path, tensors | {"latents_mean": -tensors["latents_mean"]}, metadata)
    out = preview(data, settings, tmp_path / "again", monkeypatch, capsys)
    assert [line.split()[1] for line in out.splitlines() if "LOW: this VAE reaches " in line] == ["b.mp4"]
    white = np.full((5, 32, 48, 3), 255, np.uint8)
    assert psnr(white, white - 1) == pytest.approx(20 * np.log10(255))


def test_a_preview_shows_the_files_and_the_number_that_are_asked_for(data, settings, monkeypatch, capsys, tmp_path):
    out = preview(data, settings, tmp_path, monkeypatch, capsys, "--preview_count=1", "--preview_files=b*")
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("preview: ") and "#" in line]
    assert shown == ["b.mp4"]
    with pytest.raises(SystemExit, match=r"--preview_files x\*: no clip's file matches it"):
        preview(data, settings, tmp_path, monkeypatch, capsys, "--preview_files=x*")


def test_rows_of_pairs_without_the_domain_cg_are_warned_of(data, settings, monkeypatch, capsys):
    with open(data / "metadata.csv", newline="") as file:
        header, *rows = csv.reader(file)
    warning = "every row names a control_name, as CG pairs do; if this is CG, give --domain cg"
    for first_control, told in (("", False), (rows[0][0], True)):
        controls = [first_control, *(row[0] for row in rows[1:])]
        with open(data / "metadata.csv", "w", newline="") as file:
            lines = [[*row, control] for row, control in zip(rows, controls)]
            csv.writer(file).writerows([[*header, "control_name"], *lines])
        monkeypatch.setattr(sys, "argv", ["encode", *command(data, settings), "--dry_run"])
        run(c2r.encode.main)
        assert (warning in capsys.readouterr().out) == told


def test_a_dry_run_reports_missing_files_and_writes_no_latents(data, settings, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encode", *command(data, settings), "--dry_run"])
    run(c2r.encode.main)
    out = capsys.readouterr().out
    assert "dry run: 3 clips and 3 captions to encode, " in out
    assert "; 0 clips are cached already" in out
    assert "dry run: 5x32x48: 3 clips, " in out
    assert not cached(data)


def break_vae(model, folder):
    """Copy a pipeline folder with a VAE that gives NaN."""
    shutil.copytree(model, folder)
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"] *= torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


def test_a_vae_that_gives_no_finite_latents_is_named(data, settings, model, process, tmp_path):
    broken = replace(settings, base_model=break_vae(model, tmp_path / "broken"))
    clips = read(data, broken).clips
    with pytest.raises(
        InputError, match=r"a\.mp4: .*broken gives latents that are not finite, nor are those of any other clip; check"
    ):
        encode_missing(clips, broken, *process)
    assert len(read(data, broken).clips) == 3


def test_prompts_without_finite_embeddings_are_not_cached(data, settings, model, process, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / "text_encoder/model.safetensors"
    weights = load_file(file)
    weights["shared.weight"] = weights["shared.weight"] * torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    settings = replace(settings, base_model=str(broken))
    with pytest.raises(InputError, match=r"broken: its text encoder gives embeddings of '.*' that are not finite"):
        encode_missing(read(data, settings).clips, settings, *process)
    assert not list(settings.cache_folder(data).glob("clips/*/*"))


def test_clips_with_non_finite_latents_are_dropped_for_this_vae(data, settings, model, process, tmp_path):
    broken = replace(settings, base_model=break_vae(model, tmp_path / "broken"))
    clips = read(data, broken).clips
    # The cached latents of one clip show that this VAE can give finite ones.
    path = clip_path(data / ".c2r_cache", clips[0], CacheSettings.of(broken))
    save_tensors(path, {name: torch.zeros(2) for name in CLIP_TENSORS}, {})
    assert len(encode_missing(clips, broken, *process).failures) == 2
    with pytest.raises(InputError, match=r"none of its 2 rows can be used \(2 non-finite latents\)"):
        read(data, broken)
    # The notes do not apply to another VAE, and a damaged note is ignored.
    (data / ".c2r_cache/failures/cut.json").write_text("{")
    assert read(data, settings).dropped == []


@pytest.mark.parametrize(
    ("given", "command", "script"),
    [
        (["--domain=real"], PHASE1, "train_phase1.py"),
        (["--domain=cg"], PHASE2, "train_phase2.py"),
        (["--domain=real", "--control_only"], PHASE2, "train_phase2.py"),
    ],
)
def test_next_comes_the_training_on_the_same_clips(given, command, script):
    clips = ["--buckets", "5x64x96", "1x64x96", "--fps=12.5", "--vae_dtype=bf16"]
    words = shlex.split(next_command(cli.parse(ENCODE, ["--dataset", "my data", *given, *clips])))
    args = cli.parse(command, words[words.index(script) + 1 :])
    assert "my data" in (args.real_dataset if "--domain=real" in given else args.cg_dataset)
    assert ([*map(str, args.buckets)], args.fps, args.vae_dtype) == (["5x64x96", "1x64x96"], 12.5, "bf16")
    assert (args.output_dir, getattr(args, "cache_control_features", False)) == (
        "outputs/phase1" if command is PHASE1 else "outputs/phase2",
        "--control_only" in given,
    )
