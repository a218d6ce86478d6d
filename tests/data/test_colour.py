"""Colours of files: HDR, linear light, alpha and unusual tags become the right sRGB, or the file is refused."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from c2r.data.colour import codes_to_srgb, light_to_srgb
from c2r.data.drop_reasons import DropReason
from c2r.data.video import UnusableVideo, probe, read_window, to_rgb
from tests.helpers.videos import counter_frames, encode_video

#: Linear RGB of BT.709 to BT.2020 (ITU-R BT.2087, table 4).
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
# With B-frames, x265 gives the packets of a very short film arbitrary decode times, which the MP4 writer may refuse.
QUIET = {"crf": "5", "x265-params": "log-level=none:bframes=0"}
COLOURS = {"white": (1, 1, 1), "grey": (0.18, 0.18, 0.18), "red": (0.8, 0.05, 0.05), "dark": (0.01, 0.01, 0.02)}


def srgb(light):
    """Return 8-bit sRGB of linear light (IEC 61966-2-1)."""
    return [round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in light]


def pq(light):
    """Return the PQ value of light, 203 cd/m² being 1 (the inverse of the function that the product applies)."""
    y = (203 * max(light, 0) / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(light):
    """Return the HLG values of displayed light of BT.2020, 203 cd/m² being 1, on a display of 1000 cd/m²."""
    shown = np.array(light) * 203 / 1000
    luminance = shown @ (0.2627, 0.6780, 0.0593)
    scene = shown * luminance ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return [math.sqrt(3 * e) if e <= 1 / 12 else a * math.log(12 * e - b) + c for e in scene]


def bt2020_frame(rgb, curve, bits=10):
    """Return a grey-free YUV frame of one colour, given as coded R'G'B' in [0, 1]."""
    r, g, b = rgb
    y = 0.2627 * r + 0.6780 * g + 0.0593 * b
    levels = (219 * y + 16, 224 * (b - y) / 1.8814 + 128, 224 * (r - y) / 1.4746 + 128)
    frame = av.VideoFrame(64, 48, f"yuv420p{bits}le")
    for plane, level in zip(frame.planes, levels):
        plane.update(np.full(plane.buffer_size // 2, round(level * 2 ** (bits - 8)), "<u2").tobytes())
    frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range = 9, curve, 9, 1
    return frame


def write_frames(path, frames, codec, options=None):
    """Encode frames as they are, with the colour tags of the first one."""
    first = frames[0]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options or {})
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, first.format.name
        context = stream.codec_context
        context.color_primaries, context.color_trc = first.color_primaries, first.color_trc
        context.colorspace, context.color_range = first.colorspace, first.color_range
        for n, frame in enumerate(frames):
            frame.pts, frame.time_base = n, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_still(path, codec, frame):
    """Encode one frame as a file without a container."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = frame.width, frame.height, frame.format.name
    context.time_base = Fraction(1, 25)
    path.write_bytes(b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)]))
    return path


def centre(path):
    return read_window(path, 0, 1, 16, 48, 64)[0, :, 24, 32].tolist()


def assert_reason(path, reason, match=""):
    for read in (lambda: probe(path), lambda: read_window(path, 0, 1, 16, 48, 64)):
        with pytest.raises(UnusableVideo, match=match) as error:
            read()
        assert error.value.reason == reason


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize(("curve", "encode"), [(16, lambda light: [pq(v) for v in light]), (18, hlg)])
def test_hdr_becomes_sdr_with_diffuse_white_as_white(name, curve, encode):
    frame = bt2020_frame(encode(TO_2020 @ COLOURS[name]), curve, bits=12)
    np.testing.assert_allclose(to_rgb(frame, 1, 48, 64)[24, 32], srgb(COLOURS[name]), atol=2)


def test_highlights_of_hdr_are_clipped_and_the_brightest_of_hlg_is_white():
    for code, curve in ((pq(4), 16), (0.75, 18), (1, 18)):
        assert to_rgb(bt2020_frame([code] * 3, curve), 1, 48, 64)[24, 32].min() >= 253


@pytest.mark.parametrize(
    ("name", "codec", "curve"),
    [
        ("phone.mp4", "libx265", 18),
        ("film.mkv", "libx265", 16),
        ("camera.mov", "prores_ks", 18),
        ("av1.mp4", "libsvtav1", 16),
    ],
)
def test_hdr_is_recognised_in_every_container(tmp_path, name, codec, curve):
    encode = hlg if curve == 18 else lambda light: [pq(v) for v in light]
    frame = bt2020_frame(encode(TO_2020 @ COLOURS["red"]), curve)
    if codec == "prores_ks":
        frame = frame.reformat(format="yuv422p10le")
        frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range = 9, curve, 9, 1
    path = write_frames(tmp_path / name, [frame] * 2, codec, QUIET if codec == "libx265" else {})
    np.testing.assert_allclose(centre(path), srgb(COLOURS["red"]), atol=8)


@pytest.mark.parametrize(
    ("primaries", "light", "expected"),
    [
        (9, TO_2020 @ COLOURS["red"], COLOURS["red"]),  # BT.2020 without HDR
        (12, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (12, (1, 0, 0), (1, 0, 0)),  # outside of sRGB: as near as it can be
        (12, (0.2958, 0.2125, 0.2055), (0.3142, 0.2090, 0.2)),  # by the matrix of CSS Color 4
    ],
)
@pytest.mark.parametrize("curve", [1, 13, 14])
def test_wide_gamuts_keep_their_colours(primaries, light, expected, curve):
    codes = np.array([[round(257 * code) for code in srgb(light)]], np.uint16)
    np.testing.assert_allclose(codes_to_srgb(codes, curve, primaries)[0], srgb(expected), atol=2)


@pytest.mark.parametrize(("curve", "gamma"), [(4, 2.2), (8, 1)])
def test_other_curves_are_converted(curve, gamma):
    codes = np.full((1, 3), round(65535 * 0.18 ** (1 / gamma)), np.uint16)
    np.testing.assert_allclose(codes_to_srgb(codes, curve, 1), [srgb([0.18] * 3)], atol=1)


@pytest.mark.parametrize("light", [-0.5, 0, 0.001, 0.05, 0.18, 0.5, 1, 7, 1e9, math.inf, math.nan])
def test_light_of_any_range_is_shown(light):
    shown = min(max(light, 0), 1) if light == light else 0
    np.testing.assert_allclose(light_to_srgb(np.full((1, 3), light)), [srgb([shown] * 3)], atol=1)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(("name", "codec"), [("a.exr", "exr"), ("a.pfm", "pfm"), ("a.hdr", "hdr"), ("a.dpx", "dpx")])
def test_float_stills_hold_light(tmp_path, name, codec, alpha):
    """OpenEXR, PFM and Radiance hold light; DPX (10 bits) does not. Alpha of OpenEXR is multiplied in already."""
    if alpha and codec != "exr":
        return
    pixel_format = {"dpx": "gbrp10le"}.get(codec, "gbrapf32le" if alpha else "gbrpf32le")
    frame = av.VideoFrame(64, 48, pixel_format)
    for plane, value in zip(frame.planes, (0.18, 0.02, 0.5, 0.25)):  # green, blue, red, alpha
        numbers = np.full(plane.buffer_size // 2, 512, "<u2") if codec == "dpx" else np.float32(value)
        plane.update(np.resize(numbers, plane.buffer_size // numbers.dtype.itemsize).tobytes())
    path = write_still(tmp_path / name, codec, frame)
    assert probe(path).is_image
    np.testing.assert_allclose(centre(path), [128] * 3 if codec == "dpx" else srgb((0.5, 0.18, 0.02)), atol=2)


def rgba_picture():
    """Return (48, 64, 4) uint8: magenta that is transparent, grey of half alpha, and opaque grey, from the left."""
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[:] = (255, 0, 255, 0)
    picture[:, 24:40] = (200, 200, 200, 128)
    picture[:, 40:] = (200, 200, 200, 255)
    return picture


ALPHA = {
    "prores.mov": ("prores_ks", "yuva444p10le"),
    "animation.mov": ("qtrle", "argb"),
    "png.mov": ("png", "rgba"),
    "ffv1.mkv": ("ffv1", "bgra"),
    "vp9.webm": ("libvpx-vp9", "yuva420p"),
    "vp8.mkv": ("libvpx", "yuva420p"),
    "apng.apng": ("apng", "rgba"),
}


@pytest.mark.parametrize("name", [*ALPHA, "a.png", "a.webp", "a.tiff", "a.avif", "palette.png", "animated.gif"])
def test_alpha_is_laid_over_black(tmp_path, name):
    path, picture = tmp_path / name, rgba_picture()
    if name in ALPHA:
        codec, pixel_format = ALPHA[name]
        frames = [av.VideoFrame.from_ndarray(picture, "rgba").reformat(format=pixel_format) for _ in range(4)]
        write_frames(path, frames, codec, {"auto-alt-ref": "0", "crf": "4", "b": "4M"} if "vp" in codec else None)
    elif "gif" in name or "palette" in name:
        picture[:, 24:40] = picture[0, 0]  # alpha of one bit
        stills = [Image.fromarray(picture[:, ::step]) for step in (1, -1)]
        if "gif" in name:
            stills[0].save(path, save_all=True, append_images=stills[1:], duration=60)
        else:
            stills[0].quantize(8).save(path)
    else:
        Image.fromarray(picture).save(path, **({} if name.endswith("tiff") else {"lossless": True, "quality": 100}))
    one_bit = "gif" in name or "palette" in name
    window = read_window(path, 0, 1, 16, 48, 64)[0].permute(1, 2, 0).numpy().astype(int)
    for x, expected in ((8, 0), (32, 0 if one_bit else 100), (52, 200)):
        np.testing.assert_allclose(window[24, x], [expected] * 3, atol=6, err_msg=f"at {x}")
    # The magenta does not bleed into its neighbours when the picture shrinks, but for the chroma of lossy codecs.
    small = read_window(path, 0, 1, 16, 32, 32)[0].permute(1, 2, 0).numpy().astype(int)
    assert (small[..., 0] - small[..., 1]).max() <= 24


@pytest.mark.parametrize("matrix", [8, 10, 14])
@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("b.mkv", "libx265"), ("a.ts", "libx264")])
def test_matrices_that_cannot_be_converted_are_refused(tmp_path, matrix, name, codec):
    frame = av.VideoFrame.from_ndarray(counter_frames(1)[0], "rgb24").reformat(format="yuv444p")
    frame.colorspace = matrix
    path = write_frames(tmp_path / name, [frame] * 20, codec, QUIET if codec == "libx265" else {})
    assert_reason(path, DropReason.UNKNOWN_COLOURS, f"matrix {matrix} ")


@pytest.mark.parametrize(("curve", "primaries"), [(9, 1), (17, 1), (1, 10)])
def test_tags_that_cannot_be_converted_are_refused(tmp_path, curve, primaries):
    frame = av.VideoFrame.from_ndarray(counter_frames(1)[0], "rgb24").reformat(format="yuv420p")
    frame.color_trc, frame.color_primaries = curve, primaries
    for name in ("a.mkv", "a.mp4", "a.mov"):
        path = write_frames(tmp_path / name, [frame] * 2, "libx264")
        assert_reason(path, DropReason.UNKNOWN_COLOURS, "H.273")


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_dolby_vision_without_a_plain_base_is_refused(tmp_path, name):
    path = encode_video(tmp_path / name, counter_frames(3), codec="libx265", options=QUIET)
    content = path.read_bytes()
    entry = b"hev1" if b"hev1" in content else b"hvc1"
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, b"dvh1"))
    assert_reason(path, DropReason.UNKNOWN_COLOURS, "Dolby Vision")
