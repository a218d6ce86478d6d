import gc
import os
import re
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from c2r import InputError, cli
from c2r.data.buckets import Bucket
from c2r.data.drop_reasons import DropReason, DropRow
from c2r.data.folders import open_folder, read_frames
from c2r.data.manifest import read_manifest
from c2r.data.sequences import find_sequence, is_pattern, split_rate
from c2r.data.video import UnusableVideo, probe, read_window
from c2r.data.video_writer import write_video
from c2r.generation.control import name_controls
from c2r.options import GENERATE
from tests.helpers.settings import clip_settings
from tests.helpers.videos import counter_frames, read_counter

SETTINGS = clip_settings(buckets=(Bucket(9, 48, 64),), fps=16)


def write_pictures(folder, name, count=24, first=1):
    """Write numbered pictures; `name` has {n} for the number."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, frame in enumerate(counter_frames(count), first):
        path = folder / name.format(n=n)
        if path.suffix == ".exr":
            write_exr(path, frame)
        else:
            Image.fromarray(frame).save(path, quality=95)
    return folder


def write_exr(path, frame):
    context = av.CodecContext.create("exr", "w")
    context.height, context.width = frame.shape[:2]
    context.pix_fmt, context.time_base = "gbrpf32le", Fraction(1)
    picture = av.VideoFrame(context.width, context.height, "gbrpf32le")
    for plane in picture.planes:
        plane.update((frame[..., 0] / 255).astype("<f4").tobytes())
    path.write_bytes(b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)]))


def numbers(count, first=0):
    return [n % 27 for n in range(first, first + count)]


@pytest.mark.parametrize(
    ("written", "named", "pattern"),
    [
        ("shot_{n:04d}.png", "", "shot_%04d.png"),
        ("shot_{n:04d}.png", "shot_####.png", "shot_%04d.png"),
        ("shot_{n:04d}.jpg", "shot_%04d.jpg", "shot_%04d.jpg"),
        ("{n}.bmp", "%d.bmp", "%d.bmp"),
        ("a.{n:06d}.tiff", "", "a.%06d.tiff"),
        ("take2_{n:03d}_v1.png", "take2_%03d_v1.png", "take2_%03d_v1.png"),
        ("50%_{n:04d}.png", "", "50%_%04d.png"),
        ("shot#1_{n:04d}.webp", "shot#1_####.webp", "shot#1_%04d.webp"),
        ("{n:04d}.avif", "", "%04d.avif"),
    ],
)
@pytest.mark.parametrize("first", [0, 1, 1001])
def test_a_sequence_is_found_and_read_as_a_video(written, named, pattern, first, tmp_path):
    folder = write_pictures(tmp_path / "50%d off", written, first=first)
    sequence = find_sequence(str(folder / named) if named else str(folder))
    if first < 1000:  # with 1001 a number of three digits has four
        assert (sequence.pattern, sequence.first, sequence.count) == (pattern, first, 24)
    assert [os.path.exists(sequence.path(n)) for n in (0, 23, 24)] == [True, True, False]
    path = f"{folder}/{sequence.pattern}@16"
    info = probe(path)
    assert (info.rate, info.native_frames, info.is_image, info.height) == (16, 24, False, 48)
    assert read_counter(read_window(path, 0, 24, 16, 48, 64)) == numbers(24)
    assert read_counter(read_window(path, 1.0, 8, 16, 48, 64)) == numbers(8, 16)
    assert read_counter(read_window(path, 0, 12, 8, 48, 64)) == [2 * n % 27 for n in range(12)]


def test_the_rate_is_the_users(tmp_path):
    folder = write_pictures(tmp_path / "a", "{n:04d}.png")
    assert probe(f"{folder}/%04d.png@8").duration == 3
    assert read_counter(read_window(f"{folder}/%04d.png@32", 0, 9, 16, 48, 64)) == [2 * n for n in range(9)]


def test_rows_name_sequences_by_folder_or_pattern(tmp_path):
    write_pictures(tmp_path / "fine/a", "{n:04d}.png", count=36)
    write_pictures(tmp_path / "coarse/a", "c_{n:04d}.jpg", count=36, first=7)
    write_pictures(tmp_path / "fine", "b{n}.png", count=18, first=10)
    write_pictures(tmp_path / "coarse", "b{n}.png", count=18, first=10)
    rows = ["fine/a,coarse/a/c_####.jpg,24,x", "fine/b%d.png,coarse/b%d.png,,y"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,control_name,fps,text", *rows]) + "\n")
    manifest = read_manifest(tmp_path, "cg", replace(SETTINGS, sequence_fps=16))
    assert manifest.dropped == []
    found = [(clip.name, clip.control_name, clip.start) for clip in manifest.clips]
    assert found[:2] == [("fine/a/%04d.png@24", "coarse/a/c_%04d.jpg@24", n * 9 / 16) for n in range(2)]
    assert found[2:] == [("fine/b%d.png@16", "coarse/b%d.png@16", n * 9 / 16) for n in range(2)]
    clip = manifest.clips[3]
    for file in (clip.target_file, clip.coarse_file):
        assert read_counter(read_frames(file, clip, SETTINGS)) == numbers(9, 9)


def test_a_changed_picture_changes_the_fingerprint(tmp_path):
    folder = write_pictures(tmp_path / "a", "{n:04d}.png")
    (tmp_path / "metadata.csv").write_text("file_name,fps,text\na,16,x\n")
    before = read_manifest(tmp_path, "real", SETTINGS).fingerprint
    Image.fromarray(counter_frames(3)[2]).save(folder / "0005.png")
    assert read_manifest(tmp_path, "real", SETTINGS).fingerprint != before


def gap(folder):
    (folder / "0007.png").unlink()
    (folder / "0009.png").unlink()


def another(name):
    return lambda folder: (folder / name).write_bytes(b"x")


def link_out(folder):
    (folder.parents[1] / "secret.png").write_bytes((folder / "0007.png").read_bytes())
    (folder / "0007.png").unlink()
    (folder / "0007.png").symlink_to(folder.parents[1] / "secret.png")


@pytest.mark.parametrize(
    ("change", "name", "fps", "reason", "detail"),
    [
        (gap, "a", 16, DropReason.MISSING_FRAMES, "of the pictures 1 to 24, 2 are missing: 7, 9"),
        (lambda f: None, "a", None, DropReason.NO_RATE, "a: give the row an fps, or --sequence_fps"),
        (
            lambda f: write_pictures(f, "b{n}.png"),
            "a",
            16,
            DropReason.MISSING_FILE,
            r"holds 2 sequences \(####.png, b",
        ),
        (
            lambda f: (f / "1.png").write_bytes(b"x"),
            "a",
            16,
            DropReason.MISSING_FRAMES,
            "a number is written in two ways",
        ),
        (
            lambda f: (f / "25.png").write_bytes(b"x"),
            "a",
            16,
            DropReason.MISSING_FRAMES,
            "numbers have different widths",
        ),
        (lambda f: (f / "0005.png").write_bytes(b""), "a", 16, DropReason.MISSING_FRAMES, "0005.png is empty"),
        (lambda f: None, "a", "fast", DropReason.NO_RATE, "fps 'fast': give a number above 0 and up to 1000"),
        (lambda f: None, "../outside", 16, DropReason.OUTSIDE_FOLDER, "leads to"),
        (link_out, "a", 16, DropReason.OUTSIDE_FOLDER, "leads out of the folder"),
    ],
)
def test_a_sequence_that_cannot_be_read_is_named(change, name, fps, reason, detail, tmp_path):
    change(write_pictures(tmp_path / "data/a", "{n:04d}.png"))
    write_pictures(tmp_path / "outside", "{n:04d}.png")
    folder = open_folder(tmp_path / "data", SETTINGS)
    with pytest.raises(DropRow, match=detail) as error:
        folder.locate_sequence(name, fps)
    assert error.value.reason == reason
    assert error.value.detail.startswith(name)


@pytest.mark.parametrize("start", [0, 2])
def test_a_picture_that_cannot_be_decoded_is_named_and_its_windows_are_lost(start, tmp_path):
    folder = write_pictures(tmp_path / "50% off", "{n:04d}.bmp", count=48)
    (folder / "0039.bmp").write_bytes(b"BM" + bytes(60))
    path = f"{folder}/%04d.bmp@16"
    assert read_counter(read_window(path, 1, 9, 16, 48, 64)) == numbers(9, 16)
    with pytest.raises(UnusableVideo, match=rf"^{re.escape(str(folder))}/0039\.bmp: cannot be decoded") as error:
        read_window(path, start, 40 - 16 * start, 16, 48, 64)
    assert error.value.of_window


def test_pictures_of_a_sequence_are_read_like_single_ones(tmp_path):
    """A colour profile is applied, alpha lies over black, and a cut JPEG is found."""
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for n in range(1, 4):
        Image.new("RGBA", (64, 48), (200, 100, 50, 128)).save(tmp_path / f"a{n}.png", icc_profile=swapped)
    single = read_window(tmp_path / "a1.png", 0, 1, 16, 48, 64)
    assert single[0, 0, 0, 0] == 100
    for _ in range(10):
        window = read_window(f"{tmp_path}/a%d.png@16", 0, 3, 16, 48, 64)
        gc.collect()
    assert torch.equal(window, single.expand(3, -1, -1, -1))
    folder = write_pictures(tmp_path / "b", "{n}.jpg", count=9)
    (folder / "5.jpg").write_bytes((folder / "5.jpg").read_bytes()[:300])
    with pytest.raises(UnusableVideo, match=r"5\.jpg: cannot be decoded"):
        read_window(f"{folder}/%d.jpg@16", 0, 9, 16, 48, 64)


def test_names_like_patterns_and_notes_of_macos_are_no_sequences(tmp_path):
    folder = write_pictures(tmp_path / "data/train/s", "a_{n:04d}.png")
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"note")
    write_video(tmp_path / "data/train/clip#1.mp4", counter_frames(9), 16)
    (tmp_path / "data/metadata.csv").write_text("file_name,fps,text\ns,16,x\nclip#1.mp4,30000/1001,y\n")
    manifest = read_manifest(tmp_path / "data", "real", SETTINGS)
    assert manifest.dropped == []
    assert sorted({clip.name for clip in manifest.clips}) == ["train/clip#1.mp4", "train/s/a_%04d.png@16"]


def test_swapped_pictures_change_the_state(tmp_path):
    folder = write_pictures(tmp_path, "{n:04d}.bmp")
    before = find_sequence(str(folder))
    os.utime(folder / "0001.bmp", (1, 1))
    (folder / "0001.bmp").rename(folder / "x")
    (folder / "0002.bmp").rename(folder / "0001.bmp")
    (folder / "x").rename(folder / "0002.bmp")
    assert find_sequence(str(folder)).state != before.state


def test_pictures_that_vanish_later_are_named(tmp_path):
    gap(write_pictures(tmp_path, "{n:04d}.png"))
    with pytest.raises(UnusableVideo, match="2 are missing: 7, 9; correct the sequence") as error:
        read_window(f"{tmp_path}/%04d.png@16", 0, 9, 16, 48, 64)
    assert error.value.reason == DropReason.MISSING_FRAMES


def test_names_of_sequences():
    assert [is_pattern(name) for name in ("a_%04d.png", "a/####.exr", "%d", "a.png", "50%.png", "50%_%d.png")] == [
        *[True] * 3,
        *[False] * 2,
        True,
    ]
    assert split_rate("a/b_%04d.png@23.976") == ("a/b_%04d.png", 23.976)
    assert split_rate("me@24.mp4") is split_rate("50%@2.mp4") is split_rate("a_%04d.png") is None


def controls(folder, *options):
    args = cli.parse(GENERATE, ["--model=m", "--prompt=x", "--output=o.mp4", f"--control_video={folder}", *options])
    args.fps = 16.0
    name_controls(args)
    return args.control_video


def test_generate_takes_sequences(tmp_path):
    folder = write_pictures(tmp_path / "a", "{n:04d}.png")
    assert controls(folder) == [f"{folder}/%04d.png@16"]
    assert controls(f"{folder}/####.png", "--sequence_fps=24") == [f"{folder}/%04d.png@24"]
    gap(folder)
    with pytest.raises(InputError, match=r"--control_video .*2 are missing: 7, 9; give a complete sequence"):
        controls(folder)
    with pytest.raises(InputError, match="no such file; give a video, or a folder or pattern of pictures"):
        controls(tmp_path / "b.mp4")


@pytest.mark.parametrize("count", [9, 24])
def test_exr_sequences_are_read(count, tmp_path):
    folder = write_pictures(tmp_path, "s.{n:04d}.exr", count=count)
    window = read_window(f"{folder}/s.%04d.exr@16", 0, count, 16, 48, 64)
    brightness = window.float().mean(dim=(1, 2, 3))
    assert (np.diff(brightness[: min(count, 27)].numpy()) > 0).all()
