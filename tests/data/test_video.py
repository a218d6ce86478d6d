"""Decoding of real files: the right frames, upright, in the right colours; errors of one line."""

import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from c2r import InputError
from c2r.data.video import UnusableVideo, nearest_frames, open_video, probe, read_window, to_rgb
from c2r.data.video_writer import write_video
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.datasets import noise_video
from tests.helpers.videos import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    assert_corners,
    corner_frames,
    counter_frames,
    encode_video,
    read_counter,
)

CODECS = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "3"}),
    "open_gop.mp4": ("libx264", "yuv420p", {"x264-params": "open-gop=1:bframes=4:keyint=24:min-keyint=24"}),
    "h264.ts": ("libx264", "yuv420p", {}),
    "h264.avi": ("libx264", "yuv420p", {}),
    "h264_422_10bit.mkv": ("libx264", "yuv422p10le", {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2", "qmin": "1", "qmax": "2"}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "ffv1.mkv": ("ffv1", "yuv444p", {}),
    "full_range.avi": ("mjpeg", "yuvj420p", {}),
}


def encode(path, frames, name, **kwargs):
    codec, pix_fmt, options = CODECS[name]
    return encode_video(path / name, frames, codec=codec, pix_fmt=pix_fmt, options=options, **kwargs)


@pytest.mark.parametrize("name", CODECS)
def test_windows_of_every_codec_hold_the_right_frames(tmp_path, name):
    path = encode(tmp_path, counter_frames(60), name)
    info = probe(path)
    assert info.frames_at(16) == 60
    assert info.aspect == pytest.approx(64 / 48)
    for start in (0, 1, 9, 23, 24, 25, 36, 50):
        window = read_window(path, start / 16, 9, 16, 48, 64)
        assert window.dtype == torch.uint8
        assert window.shape == (9, 3, 48, 64)
        assert read_counter(window) == [n % 27 for n in range(start, start + 9)]


@pytest.mark.parametrize("name", ["h264.mp4", "open_gop.mp4", "h264.ts", "vp9.webm", "mpeg4.avi"])
def test_seeking_gives_the_same_frames_as_decoding_from_the_beginning(tmp_path, name):
    rng = np.random.default_rng(0)
    path = encode(tmp_path, rng.integers(0, 255, (120, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2), name)
    with open_video(path) as (container, stream):
        expected = np.stack([to_rgb(frame, 1, 48, 64) for frame in container.decode(stream)])
    for start in range(0, 108, 9):
        window = read_window(path, start / 16, 9, 16, 48, 64)
        np.testing.assert_array_equal(window.permute(0, 2, 3, 1).numpy(), expected[start : start + 9])


@pytest.mark.parametrize(("file_fps", "fps"), [(24, 16), (30, 16), (16, 24), (8, 16), (29.97, 16), (16, 23.976)])
def test_resampling_takes_the_nearest_frame(tmp_path, file_fps, fps):
    path = encode_video(tmp_path / "a.mp4", counter_frames(26), fps=file_fps)
    count = probe(path).frames_at(fps)
    assert count == pytest.approx(26 * fps / file_fps, abs=1)
    # ceil(x - 1/2) rounds to the nearest number, and down if two are equally near.
    expected = [int(np.ceil(n * file_fps / fps - 0.5 - 1e-6)) for n in range(count)]
    assert read_counter(read_window(path, 0.0, count, fps, 48, 64)) == expected
    assert read_counter(read_window(path, 5 / fps, count - 5, fps, 48, 64)) == expected[5:]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(5, 150), min_size=8, max_size=26), st.integers(0, 20), st.sampled_from([8, 12, 16, 25]))
def test_variable_frame_times_are_followed(tmp_path_factory, gaps, skip, fps):
    times = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    path = encode_video(tmp_path_factory.mktemp("vfr") / "a.mkv", counter_frames(len(times)), times=times)
    count = probe(path).frames_at(fps)
    skip = min(skip, count - 1)
    window = read_window(path, skip / fps, count - skip, fps, 48, 64)
    for n, shown in zip(range(skip, count), read_counter(window)):
        assert abs(times[shown] - n / fps) <= abs(times - n / fps).min() + 1e-9
    assert times[-1] - (count - 1) / fps < 1 / fps + 1e-9  # the window reaches the end of the file


@given(st.lists(st.fractions(0, 10, max_denominator=24), min_size=1, max_size=20, unique=True), st.data())
def test_nearest_frames_equal_a_brute_force_search(times, data):
    times = sorted(times)
    wanted = sorted(data.draw(st.lists(st.fractions(times[0], 12, max_denominator=24), min_size=1, max_size=20)))
    reach = Fraction(1, 2)
    got = [frame for count, frame in nearest_frames(zip(times, times), wanted, reach) for _ in range(count)]
    assert got == [min(times, key=lambda t: (abs(t - w), t)) for w in wanted if w <= times[-1] + reach]


def test_colours_and_positions_are_preserved(tmp_path):
    frames = corner_frames(2, 96, 128)
    for name in ("ffv1.mkv", "prores.mov", "h264.mp4", "full_range.avi"):
        assert_corners(read_window(encode(tmp_path, frames, name), 0.0, 1, 16, 96, 128), (RED, GREEN, BLUE, WHITE))


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(
    ("colorspace", "height", "kr", "kb"),
    [
        (1, 48, 0.2126, 0.0722),
        (5, 48, 0.299, 0.114),
        (9, 48, 0.2627, 0.0593),
        (2, 480, 0.299, 0.114),
        (2, 720, 0.2126, 0.0722),
    ],
)
def test_colour_matrix_and_range_are_applied(colorspace, height, kr, kb, full_range):
    """Colours follow the equations of ITU-R BT.601, 709 and 2020; without a tag (2) BT.601, or BT.709 for HD."""
    r, g, b = (x / 255 for x in RED)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    levels = (
        (255 * y, 255 * cb + 128, 255 * cr + 128) if full_range else (219 * y + 16, 224 * cb + 128, 224 * cr + 128)
    )
    frame = av.VideoFrame(64, height, "yuv444p")
    for plane, value in zip(frame.planes, levels):
        plane.update(bytes([round(value)]) * plane.buffer_size)
    frame.colorspace, frame.color_range = colorspace, 2 if full_range else 1
    np.testing.assert_allclose(to_rgb(frame, 1, 32, 32)[16, 16], RED, atol=2)


@pytest.mark.parametrize(
    ("rotation", "hflip", "expected"),
    [
        (90, False, (GREEN, WHITE, RED, BLUE)),
        (180, False, (WHITE, BLUE, GREEN, RED)),
        (-90, False, (BLUE, RED, WHITE, GREEN)),
        (0, True, (GREEN, RED, WHITE, BLUE)),
    ],
)
def test_rotation_metadata_turns_the_video_upright(tmp_path, rotation, hflip, expected):
    path = encode_video(tmp_path / "a.mp4", corner_frames(3, 96, 128), rotation=rotation, hflip=hflip)
    sideways = rotation in (90, -90)
    assert probe(path).aspect == pytest.approx(96 / 128 if sideways else 128 / 96)
    height, width = (128, 96) if sideways else (96, 128)
    assert_corners(read_window(path, 0.0, 1, 16, height, width), expected)


def test_exif_orientation_turns_a_photograph_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # turn 90° clockwise
    Image.fromarray(corner_frames(1, 96, 128)[0]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert probe(tmp_path / "a.jpg").aspect == pytest.approx(96 / 128)
    assert_corners(read_window(tmp_path / "a.jpg", 0.0, 1, 16, 128, 96), (BLUE, RED, WHITE, GREEN))


@pytest.mark.parametrize(("height", "width"), [(96, 64), (33, 128), (49, 65), (128, 96)])
def test_the_crop_is_central_and_has_no_border(tmp_path, height, width):
    # A central crop keeps the borders between the four quarters in the middle.
    path = encode(tmp_path, corner_frames(2, height, width), "ffv1.mkv")
    for target in ((48, 64), (64, 48), (32, 96)):
        window = read_window(path, 0.0, 2, 16, *target)
        assert window.shape == (2, 3, *target)
        assert_corners(window, (RED, GREEN, BLUE, WHITE))


def test_resizing_keeps_the_aspect_ratio_and_does_not_alias(tmp_path):
    frames = np.full((1, 256, 256, 3), 40, np.uint8)
    yy, xx = np.mgrid[:256, :256]
    disc = (yy - 127.5) ** 2 + (xx - 127.5) ** 2 < 64**2
    frames[0][disc] = 220
    window = read_window(encode(tmp_path, frames, "ffv1.mkv"), 0.0, 1, 16, 64, 128)[0, 0] > 130
    assert window.any(dim=0).sum() == pytest.approx(64, abs=2)  # covered: scaled to 128 wide, cut to 64 high
    frames[0] = ((yy + xx) % 2 * 255)[..., None]  # a pixel checkerboard shrinks to grey
    shrunk = read_window(encode(tmp_path, frames, "ffv1.mkv"), 0.0, 1, 16, 48, 48).float()
    assert shrunk.mean() == pytest.approx(127.5, abs=3)
    assert shrunk[..., 2:-2, 2:-2].std() < 12


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    frames = corner_frames(2, 96, 64)
    path = encode_video(tmp_path / "a.mp4", frames, sample_aspect_ratio=Fraction(2, 1))
    assert probe(path).aspect == pytest.approx(128 / 96)
    frames[:, :, :8] = 0  # a window of the shown aspect ratio cuts nothing away, so this bar stays
    path = encode_video(tmp_path / "b.mp4", frames, sample_aspect_ratio=Fraction(2, 1))
    assert read_window(path, 0.0, 1, 16, 96, 128)[0, :, :, :12].float().mean() < 15


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_ignored(tmp_path, suffix):
    path = encode_video(tmp_path / f"a{suffix}", counter_frames(20), sound_seconds=4)
    assert probe(path).frames_at(16) == 20
    assert read_counter(read_window(path, 3 / 16, 17, 16, 48, 64)) == list(range(3, 20))


def test_a_file_with_only_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        samples.sample_rate = 48000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    with pytest.raises(InputError, match=r"a\.mp4.*no video stream"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["a.png", "frame %03d.webp", "a.jpg", "alpha.png", "grey.png"])
def test_an_image_is_a_clip_of_one_frame(tmp_path, name):
    image = Image.fromarray(corner_frames(1, 96, 128)[0])
    image = image.convert("RGBA") if "alpha" in name else image.convert("L") if "grey" in name else image
    image.save(tmp_path / name, **({} if name.endswith("png") else {"quality": 95}))
    info = probe(tmp_path / name)
    assert info.is_image
    assert info.frames_at(16) == 1
    window = read_window(tmp_path / name, 0.0, 1, 16, 48, 64)
    if "grey" not in name:
        assert_corners(window, (RED, GREEN, BLUE, WHITE), tolerance=10)
    with pytest.raises(InputError, match="an image is one frame"):
        read_window(tmp_path / name, 0.0, 5, 16, 48, 64)


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello, this is a text", bytes(range(256)) * 40])
def test_a_file_that_is_no_video_gives_an_error_of_one_line(tmp_path, content):
    (tmp_path / "broken.mp4").write_bytes(content)
    for read in (
        lambda: probe(tmp_path / "broken.mp4"),
        lambda: read_window(tmp_path / "broken.mp4", 0, 1, 16, 16, 16),
    ):
        with pytest.raises(InputError, match=r"broken\.mp4: cannot be decoded \(.+\); ") as error:
            read()
        assert one_line(error)


def declared_png(path, width, height):
    """Write a small PNG file that declares width x height black pixels; it stores at most 2.6e8 of them."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes(min(height * (1 + width // 8), 16_000 * 2_001)), 9)  # a filter byte before each row
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def patched(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


JPEG_SIZE = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 48, 64)
JPEG_BOMB = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 16_000, 16_000)


def write_bomb(path):
    """Write a small file that declares an enormous size or duration, or that resizing would make enormous."""
    frames = counter_frames(20)
    match path.stem:
        case "pixels" | "more_pixels" if path.suffix == ".png":
            declared_png(path, *((16_000, 16_000) if path.stem == "pixels" else (100_000, 100_000)))
        case "pixels":
            Image.fromarray(frames[0]).save(path)
            if path.suffix == ".jpg":
                patched(path, JPEG_SIZE, JPEG_BOMB)
            else:
                patched(path, b"GIF87a" + struct.pack("<HH", 64, 48), b"GIF87a" + struct.pack("<HH", 16_000, 16_000))
        case "frames_larger_than_declared":
            encode_video(path, frames, codec="mjpeg", pix_fmt="yuvj420p")
            patched(path, JPEG_SIZE, JPEG_BOMB)
        case "two_frames_years_apart":
            encode_video(path, frames[:2], times=[0, 10**8])
        case "last_frame_lasts_days":
            encode_video(path, frames)
            times = path.read_bytes().index(b"stts") + 4
            patched(path, path.read_bytes()[times : times + 16], struct.pack(">IIII", 0, 1, 20, 0x7F000000))
        case "wide_pixels" | "high_pixels":
            encode_video(path, frames, sample_aspect_ratio=Fraction(2, 1))
            shape = (30_000, 1) if path.stem == "wide_pixels" else (1, 30_000)
            patched(path, b"pasp" + struct.pack(">II", 2, 1), b"pasp" + struct.pack(">II", *shape))
        case "ribbon":
            encode_video(path, np.zeros((2, 2, 16384, 3), np.uint8))


READ_BOMB = """
import json, sys
from c2r.data.video import UnusableVideo, probe, read_window

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

before, found = peak(), []
for read in (probe, lambda path: read_window(path, 0, 1, 16, 480, 832)):
    try:
        read(sys.argv[1])
        found.append(None)
    except UnusableVideo as error:
        found.append(error.reason)
print(json.dumps([*found, peak() - before]))
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pixels.png", "beyond the limits"),
        ("more_pixels.png", "beyond the limits"),  # above FFmpeg's own limit, unlike the file before
        ("pixels.jpg", "beyond the limits"),
        ("pixels.gif", "beyond the limits"),
        ("frames_larger_than_declared.mov", "unreadable"),  # FFmpeg refuses it without naming a reason
        ("two_frames_years_apart.mkv", "beyond the limits"),
        ("last_frame_lasts_days.mp4", "beyond the limits"),
        ("wide_pixels.mp4", "beyond the limits"),
        ("high_pixels.mp4", "beyond the limits"),
        ("ribbon.mp4", "beyond the limits"),
    ],
)
def test_small_files_of_enormous_content_do_not_fill_the_memory(tmp_path, name, reason):
    write_bomb(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", READ_BOMB, tmp_path / name],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    of_probe, of_window, growth = json.loads(done.stdout)
    assert of_probe == reason
    # The limit of duration does not apply to reading one window.
    assert of_window == (None if name.startswith(("two_frames", "last_frame")) else reason)
    assert growth < 100 * 2**20


@pytest.mark.parametrize("name", [*CODECS, "picture.png", "pixels.png", "text.mp4"])
def test_probing_a_file_object_gives_the_same_as_its_path(tmp_path, name):
    path = tmp_path / name
    if name in CODECS:
        encode(tmp_path, counter_frames(60), name)
    elif name == "pixels.png":
        write_bomb(path)
    elif name == "picture.png":
        Image.fromarray(counter_frames(1)[0]).save(path)
    else:
        path.write_text("no video")

    def result(*file):
        try:
            return probe(path, *file)
        except UnusableVideo as error:
            return str(error), error.reason

    with open(path, "rb") as file:
        assert result(file) == result()


def test_a_rotated_video_is_probed_as_it_is_shown(tmp_path):
    info = probe(encode_video(tmp_path / "a.mp4", counter_frames(40), 24, rotation=90))
    assert (info.height, info.native_frames, info.frames_at(16)) == (64, 40, 27)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.mp4.*No such file"):
        probe(tmp_path / "gone.mp4")


@pytest.mark.parametrize("front", [False, True])
def test_a_cut_off_file_is_refused(tmp_path, front):
    frames = np.random.default_rng(0).integers(0, 255, (64, 48, 64, 3), np.uint8)
    whole = tmp_path / "whole.mp4"
    if front:  # with the index at its front, the cut-off file opens and declares its full length
        write_video(whole, frames, 16)
    else:
        encode_video(whole, frames)
    data = whole.read_bytes()
    assert probe(whole).frames_at(16) == 64
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.mp4: cannot be decoded \(.*(cut off|moov|Invalid)"):
        probe(tmp_path / "cut.mp4")
    with pytest.raises(InputError, match=r"cut\.mp4: cannot be decoded"):
        read_window(tmp_path / "cut.mp4", 3.0, 9, 16, 48, 64)


def test_a_window_beyond_the_end_raises_an_error(tmp_path):
    path = encode_video(tmp_path / "a.mp4", counter_frames(20))
    with pytest.raises(InputError, match=r"a\.mp4.*ends before"):
        read_window(path, 0.0, 25, 16, 48, 64)


def test_files_that_a_playlist_names_are_not_opened(tmp_path):
    """Opening the named pipe, which has no writer, would block."""
    os.mkfifo(tmp_path / "secret.ts")
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.25,\nsecret.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "b.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")

    def too_long(*_):
        raise AssertionError("the file that the playlist names was opened")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    try:
        for name in ("a.m3u8", "b.mp4"):
            with pytest.raises(UnusableVideo, match=name):
                probe(tmp_path / name)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_raw_stream_without_times_is_refused(tmp_path):
    with pytest.raises(InputError, match="carry no times"):
        probe(encode_video(tmp_path / "a.h264", counter_frames(5)))


def test_the_same_small_frames_give_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    frames = np.concatenate([noise_video(seed, 5) for seed in range(4)], axis=2)  # (5, 32, 192, 3)
    files = set()
    for _ in range(20):
        # What lies on the heap beside the frames differs each time, as it does between two runs.
        junk = [rng.integers(0, 256, size, np.uint8) for size in rng.integers(1000, 200_000, 60)]
        del junk[::2]
        write_video(tmp_path / "a.mp4", frames, 8)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_write_video_reads_back(tmp_path):
    frames = corner_frames(9, 96, 160)
    frames[:, 40:56, 72:88] = counter_frames(9, 16, 16)
    path = tmp_path / "made" / "out.mp4"
    write_video(path, torch.from_numpy(frames), 8)
    info = probe(path)
    assert (info.frames_at(8), info.rate) == (9, 8)
    window = read_window(path, 0.0, 9, 8, 96, 160)
    assert_corners(window, (RED, GREEN, BLUE, WHITE), tolerance=4)
    assert read_counter(window[:, :, 42:54, 74:86]) == list(range(9))
    for bad in (frames[:, :95], frames[0], frames.astype(np.float32)):
        with pytest.raises(ValueError, match=r"even|must be"):
            write_video(path, bad, 8)
