"""Passes of a renderer: values of PNG, EXR and lossless videos are kept, and others are refused in one line."""

import struct

import av
import numpy as np
import pytest
from PIL import Image

from c2r import InputError
from c2r.data.control_video import name_control
from c2r.scoring.passes import check_pass, read_pass
from tests.helpers.videos import encode_video

FPS = 8


def sequence(folder, pictures, suffix="png"):
    """Write numbered pictures; return the name of the sequence."""
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"p_{number:04d}.{suffix}")
    return name_control(folder, FPS)


def write_exr(folder, pictures, pix_fmt="gbrpf32le", half=False):
    """Write (F, H, W) values as EXR pictures, the colours other than red as zeros; return the name of the sequence."""
    folder.mkdir()
    for number, values in enumerate(pictures):
        path = str(folder / f"p_{number:04d}.exr")
        with av.open(path, "w", format="image2", options={"update": "1"}) as container:
            stream = container.add_stream("exr", rate=FPS, options={"format": "half" if half else "float"})
            stream.height, stream.width = values.shape
            stream.pix_fmt = pix_fmt
            frame = av.VideoFrame(values.shape[1], values.shape[0], pix_fmt)
            for position, plane in enumerate(frame.planes):
                rows = np.zeros((plane.height, plane.line_size // 4), "<f4")
                if position == frame.format.components[0].plane:
                    rows[:, : values.shape[1]] = values
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return name_control(folder, FPS)


def window(name, kind, count=3, height=32, width=48, fps=FPS, start=0.0):
    return read_pass(name, kind, start, count, fps, height, width).numpy()


@pytest.fixture
def ids():
    """(F, H, W) of ids from 0 to 4095."""
    return np.random.default_rng(0).integers(0, 4096, (3, 32, 48))


def test_ids_of_16_bit_pictures_are_kept(tmp_path, ids):
    read = window(sequence(tmp_path / "ids", ids.astype(np.uint16)), "ids")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)


@pytest.mark.parametrize("lossless_video", [False, True])
def test_colours_are_ids(tmp_path, ids, lossless_video):
    colours = np.stack([ids >> 8, ids & 255, ids % 7], -1).astype(np.uint8)
    if lossless_video:
        path = encode_video(tmp_path / "ids.mkv", colours, FPS, codec="ffv1", pix_fmt="bgr0")
    else:
        path = sequence(tmp_path / "ids", colours)
    np.testing.assert_array_equal(window(path, "ids"), (ids >> 8) << 16 | (ids & 255) << 8 | ids % 7)


def test_depth_of_16_bit_pictures_is_kept(tmp_path, ids):
    grey = window(sequence(tmp_path / "grey", ids.astype(np.uint16)), "depth")
    assert grey.dtype == np.float32
    np.testing.assert_array_equal(grey, ids)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pix_fmt", ["grayf32le", "gbrpf32le", "gbrapf32le"])
def test_values_of_exr_are_kept_beyond_1(tmp_path, pix_fmt, half):
    depth = np.random.default_rng(0).uniform(0.5, 900, (3, 30, 45)).astype(np.float16 if half else np.float32)
    depth[:, 0] = np.inf  # no surface
    read = window(write_exr(tmp_path / "depth", depth, pix_fmt, half), "depth", height=30, width=45)
    np.testing.assert_array_equal(read, depth.astype(np.float32))
    numbers = np.random.default_rng(1).integers(0, 2048, (3, 32, 48))  # exact in half precision
    np.testing.assert_array_equal(window(write_exr(tmp_path / "ids", numbers, pix_fmt, half), "ids"), numbers)


def exr_of_integers(values):
    """Return the bytes of an EXR picture with a channel Y of 32-bit integers (openexr.com, "OpenEXR File Layout")."""

    def attribute(name, kind, content):
        return f"{name}\0{kind}\0".encode() + struct.pack("<i", len(content)) + content

    height, width = values.shape
    window = struct.pack("<4i", 0, 0, width - 1, height - 1)
    header = struct.pack("<2i", 20000630, 2)
    header += attribute("channels", "chlist", b"Y\0" + struct.pack("<4i", 0, 0, 1, 1) + b"\0")
    header += attribute("compression", "compression", b"\0") + attribute("lineOrder", "lineOrder", b"\0")
    header += attribute("dataWindow", "box2i", window) + attribute("displayWindow", "box2i", window)
    header += attribute("pixelAspectRatio", "float", struct.pack("<f", 1))
    header += attribute("screenWindowCenter", "v2f", struct.pack("<2f", 0, 0))
    header += attribute("screenWindowWidth", "float", struct.pack("<f", 1)) + b"\0"
    lines = [struct.pack("<2i", y, 4 * width) + row.astype("<u4").tobytes() for y, row in enumerate(values)]
    first = len(header) + 8 * height
    return header + b"".join([struct.pack("<Q", first + y * len(lines[0])) for y in range(height)] + lines)


@pytest.mark.parametrize("kind", ["ids", "depth"])
def test_exr_of_integers_is_refused(tmp_path, ids, kind):
    (tmp_path / "ids").mkdir()
    for number, picture in enumerate(ids):
        (tmp_path / f"ids/p_{number:04d}.exr").write_bytes(exr_of_integers(picture))
    with pytest.raises(InputError, match=r"EXR of whole numbers \(UINT\) cannot be read; write the pass in float"):
        check_pass(name_control(tmp_path / "ids", FPS), kind)


@pytest.mark.parametrize("pix_fmt", ["ya8", "ya16be"])
@pytest.mark.parametrize("kind", ["ids", "depth"])
def test_grey_pictures_with_alpha_are_read_as_grey(tmp_path, ids, pix_fmt, kind):
    values = ids & 255 if pix_fmt == "ya8" else ids
    (tmp_path / "grey").mkdir()
    for number, picture in enumerate(values):
        frame = av.VideoFrame(48, 32, pix_fmt)
        pairs = np.stack([picture, np.full_like(picture, 7)], -1).astype("u1" if pix_fmt == "ya8" else ">u2")
        rows = np.zeros((32, frame.planes[0].line_size), np.uint8)
        rows[:, : pairs[0].nbytes] = pairs.reshape(32, -1).view(np.uint8)
        frame.planes[0].update(rows.tobytes())
        path = str(tmp_path / f"grey/p_{number:04d}.png")
        with av.open(path, "w", format="image2", options={"update": "1"}) as container:
            stream = container.add_stream("png", rate=FPS)
            stream.height, stream.width, stream.pix_fmt = 32, 48, pix_fmt
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    np.testing.assert_array_equal(window(name_control(tmp_path / "grey", FPS), kind), values)


def test_larger_passes_are_resized_as_videos_are(tmp_path, ids):
    large = ids.repeat(3, 1).repeat(3, 2)
    np.testing.assert_array_equal(window(sequence(tmp_path / "large", large.astype(np.uint16)), "ids"), ids)
    wide = np.pad(ids, ((0, 0), (0, 0), (10, 10)))  # the middle is kept
    np.testing.assert_array_equal(window(sequence(tmp_path / "wide", wide.astype(np.uint16)), "ids"), ids)


def test_frames_are_those_nearest_in_time(tmp_path, ids):
    name = sequence(tmp_path / "ids", ids.astype(np.uint16))
    np.testing.assert_array_equal(window(name, "ids", 2, fps=FPS / 2), ids[[0, 2]])
    np.testing.assert_array_equal(window(name, "ids", 2, start=1 / FPS), ids[1:])
    with pytest.raises(InputError, match="gives 3 of 9 frames; render the pass as long as its video"):
        window(name, "ids", 9)


def test_values_that_cannot_be_ids_or_depth_are_refused(tmp_path, ids):
    lossy = encode_video(tmp_path / "ids.mp4", np.zeros((3, 32, 48, 3), np.uint8), FPS)
    with pytest.raises(InputError, match="colours are not kept exactly; give ids as PNG"):
        check_pass(lossy, "ids")
    check_pass(lossy, "depth")
    for suffix in ("jpg", "JPEG"):
        pictures = sequence(tmp_path / suffix, (ids & 3).astype(np.uint8), suffix)
        with pytest.raises(InputError, match=r"JPEG pictures, whose values are not kept exactly; give ids as PNG"):
            check_pass(pictures, "ids")
        check_pass(pictures, "depth")
    colours = np.stack([ids & 255, ids % 7, ids % 5], -1).astype(np.uint8)
    with pytest.raises(InputError, match="colours instead of depth"):
        check_pass(sequence(tmp_path / "colours", colours), "depth")
    with pytest.raises(InputError, match="not whole numbers are no ids"):
        check_pass(write_exr(tmp_path / "exr", np.full((2, 8, 8), 0.5, np.float32)), "ids")


def test_a_damaged_pass_is_one_line(tmp_path, ids):
    name = sequence(tmp_path / "ids", ids.astype(np.uint16))
    (tmp_path / "ids/p_0001.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"is damaged at 0\.12 s; render the pass again"):
        window(name, "ids")


@pytest.mark.parametrize("size", [(160, 240), (96, 144), (320, 480)])
@pytest.mark.parametrize("grey", [True, False])
def test_ids_that_a_filter_has_mixed_are_warned_of(tmp_path, caplog, size, grey):
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:160, :240]
    picture = np.zeros((160, 240) if grey else (160, 240, 3), np.uint8)
    for i in range(12):
        inside = ((x - rng.integers(240)) / rng.integers(5, 30)) ** 2 + ((y - rng.integers(160)) / 25) ** 2 < 1
        picture[inside] = 20 * i + 15 if grey else rng.integers(0, 256, 3)
    for name, filtering in (("exact", Image.Resampling.NEAREST), ("mixed", Image.Resampling.BILINEAR)):
        resized = Image.fromarray(picture).resize(size[::-1], filtering)
        check_pass(sequence(tmp_path / name, [np.asarray(resized)] * 2), "ids")
        if size != (160, 240) and name == "mixed":
            assert "of the pixels at borders of its ids have an id of their own" in caplog.text
        else:
            assert caplog.text == ""
