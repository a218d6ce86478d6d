"""Photographs and animations that Pillow reads: upright, whole, in sRGB, as a still or a video."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageCms

from c2r.data import pictures
from c2r.data.drop_reasons import DropReason
from c2r.data.video import UnusableVideo, probe, read_window
from tests.helpers.videos import BLUE, GREEN, RED, WHITE, assert_corners, corner_frames, counter_frames, read_counter

STILLS = ["a.jpg", "a.png", "a.webp", "a.avif", "a.heic", "a.tiff", "a.bmp", "a.gif", "a.jp2", "a.mpo"]


def save(path, picture, **options):
    """Save an array or image, of high quality where the format is lossy."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    quality = {"quality": 95} if path.suffix in (".jpg", ".webp", ".avif", ".heic", ".mpo") else {}
    image.save(path, format="HEIF" if path.suffix == ".heic" else None, **quality, **options)
    return path


def centre(path):
    return read_window(path, 0, 1, 16, 48, 64)[0, :, 24, 32].tolist()


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("name", STILLS)
def test_a_photograph_is_one_whole_image(tmp_path, name, renamed):
    path = save(tmp_path / name, corner_frames(1, 96, 128)[0])
    if renamed:
        path = path.rename(tmp_path / "a.mp4")
    info = probe(path)
    assert (info.is_image, info.frames_at(16), info.height) == (True, 1, 96)
    with open(path, "rb") as file:
        assert probe(path, file) == info
    assert_corners(read_window(path, 0, 1, 16, 96, 128), (RED, GREEN, BLUE, WHITE), tolerance=10)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.avif", "a.tiff", "a.mpo"])
def test_orientation_turns_every_photograph_upright(tmp_path, name):
    exif = Image.Exif()
    exif[0x112] = 6  # turn 90° clockwise
    path = save(tmp_path / name, corner_frames(1, 96, 128)[0], exif=exif)
    assert probe(path).aspect == pytest.approx(96 / 128)
    assert_corners(read_window(path, 0, 1, 16, 128, 96), (BLUE, RED, WHITE, GREEN), tolerance=10)


def profile(space):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def linear_profile():
    """Return the sRGB profile with curves of linear light in place of its own."""
    content = bytearray(profile("sRGB"))
    count = struct.unpack_from(">I", content, 128)[0]
    for i in range(count):
        name, offset, _ = struct.unpack_from(">4sII", content, 132 + 12 * i)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sIHI", content, offset, b"para", 0, 0, 0)
            struct.pack_into(">i", content, offset + 12, 1 << 16)  # gamma 1
    return bytes(content)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.avif", "a.heic", "a.tiff"])
def test_colour_profiles_are_applied(tmp_path, name):
    grey = np.full((48, 64, 3), round(0.18 * 255), np.uint8)
    np.testing.assert_allclose(centre(save(tmp_path / name, grey, icc_profile=linear_profile())), [118] * 3, atol=2)
    np.testing.assert_allclose(centre(save(tmp_path / name, grey, icc_profile=profile("sRGB"))), [46] * 3, atol=2)


def test_a_broken_colour_profile_is_refused(tmp_path):
    for name in ("a.jpg", "a.png"):
        with pytest.raises(UnusableVideo, match="colour profile") as error:
            probe(save(tmp_path / name, counter_frames(1)[0], icc_profile=b"broken" * 40))
        assert error.value.reason == DropReason.UNKNOWN_COLOURS


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("L", 118, (118, 118, 118)),
        ("I;16", 30327, (118, 118, 118)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("LAB", (137, 128, 128), (129, 129, 129)),
        ("1", 1, (255, 255, 255)),
        ("LA", (200, 128), (100, 100, 100)),
        ("P", 1, (10, 20, 30)),
    ],
)
@pytest.mark.parametrize("name", ["a.tiff", "a.png", "a.jpg"])
def test_every_mode_of_colour_is_read(tmp_path, mode, pixel, expected, name):
    if mode in {"a.png": ("CMYK", "LAB"), "a.jpg": ("I;16", "LAB", "1", "LA", "P")}.get(name, ()):
        return
    if mode == "I;16":
        image = Image.fromarray(np.full((48, 64), pixel, np.uint16))
    else:
        image = Image.new(mode, (64, 48), pixel)
    if mode == "P":
        image.putpalette([0, 0, 0, *expected])
    np.testing.assert_allclose(centre(save(tmp_path / name, image)), expected, atol=2)


def with_chunk(path, name, content):
    """Put a chunk behind the header of a PNG."""
    data = path.read_bytes()
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data[:33] + chunk + data[33:])
    return path


def test_colour_tags_of_png_and_avif_are_applied(tmp_path):
    grey = np.full((48, 64, 3), round(0.18 * 255), np.uint8)
    linear = with_chunk(save(tmp_path / "a.png", grey), b"gAMA", struct.pack(">I", 100_000))
    np.testing.assert_allclose(centre(linear), [118] * 3, atol=2)
    pq = with_chunk(save(tmp_path / "b.png", np.full((48, 64, 3), 148, np.uint8)), b"cICP", bytes([9, 16, 0, 1]))
    np.testing.assert_allclose(centre(pq), [255] * 3, atol=4)
    avif = save(tmp_path / "c.avif", np.full((48, 64, 3), 148, np.uint8))
    content = avif.read_bytes()
    place = content.index(b"colrnclx") + 8
    avif.write_bytes(content[:place] + struct.pack(">HH", 9, 16) + content[place + 4 :])
    np.testing.assert_allclose(centre(avif), [255] * 3, atol=4)
    odd = with_chunk(save(tmp_path / "d.png", grey), b"gAMA", struct.pack(">I", 55_556))
    with pytest.raises(UnusableVideo, match=r"gamma 0\.55556") as error:
        probe(odd)
    assert error.value.reason == DropReason.UNKNOWN_COLOURS


def test_a_raw_photograph_is_not_taken_for_its_preview(tmp_path):
    for tag, value in ((pictures.DNG_VERSION, b"\1\4\0\0"), (pictures.SUBFILE_TYPE, 1)):
        path = save(tmp_path / "a.tiff", counter_frames(1)[0], tiffinfo={tag: value})
        with pytest.raises(UnusableVideo, match="raw photograph"):
            probe(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.avif", "a.webp", "a.tiff"])
def test_a_cut_off_photograph_is_refused(tmp_path, name):
    rng = np.random.default_rng(0)
    path = save(tmp_path / name, rng.integers(0, 256, (96, 128, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UnusableVideo) as error:
        probe(path)
    assert (error.value.reason, "\n" in str(error.value)) == (DropReason.UNREADABLE, False)


def test_heic_without_its_package_names_it(tmp_path, monkeypatch):
    path = save(tmp_path / "a.heic", counter_frames(1)[0])
    monkeypatch.setattr(pictures, "pillow_heif", None)
    monkeypatch.setattr(pictures, "FORMATS", [name for name in pictures.FORMATS if name != "HEIF"])
    with pytest.raises(UnusableVideo, match="pip install pillow-heif"):
        probe(path)


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.png", "a.avif"])
def test_an_animation_is_a_video_with_its_own_times(tmp_path, name):
    frames = [Image.fromarray(frame) for frame in counter_frames(20)]
    durations = [120, 60] * 10
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=durations, **options)
    info = probe(tmp_path / name)
    assert not info.is_image
    assert info.last == pytest.approx(Fraction(9 * 180 + 120, 1000), abs=0.001)
    for start in (0, 1.0):
        window = read_window(tmp_path / name, start, 9, 1000 / 60, 48, 64)
        begins = np.cumsum([0, *durations])[:-1] / 1000
        # Of two frames that are equally near, the earlier.
        assert read_counter(window) == [int(np.abs(begins - start - n * 0.06 + 1e-9).argmin()) for n in range(9)]


def test_an_animation_of_gigabytes_is_refused(tmp_path):
    frames = [Image.fromarray(frame) for frame in counter_frames(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=60)
    content = bytearray((tmp_path / "a.webp").read_bytes())
    place = content.index(b"VP8X") + 12
    content[place : place + 6] = b"\xff\xff\x00" * 2  # a canvas of 65536x65536 pixels
    (tmp_path / "a.webp").write_bytes(content)
    with pytest.raises(UnusableVideo):
        probe(tmp_path / "a.webp")


def test_profiles_are_read_from_a_file_object_too(tmp_path):
    path = save(tmp_path / "a.jpg", np.full((48, 64, 3), 46, np.uint8), icc_profile=linear_profile())
    assert probe(path, io.BytesIO(path.read_bytes())) == probe(path)
