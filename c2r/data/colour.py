"""The colours of frames: every file becomes sRGB (8 bits, primaries of BT.709, opaque), or is refused.

- Ordinary video keeps its values: the curves of BT.709, SMPTE 170M, BT.2020 and sRGB are taken for one another, as
  players do, and so are the primaries of BT.709, NTSC and PAL.
- HDR (PQ, HLG): diffuse white, 203 cd/m² (ITU-R BT.2408), becomes white; brighter highlights are clipped.
- Linear light, such as OpenEXR: 1.0 becomes white; brighter values are clipped.
- Alpha: the picture is laid over black.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from c2r.data.drop_reasons import DropReason
from c2r.data.video_info import unusable_video

# swscale widens the bicubic kernel when it shrinks, so this does not alias; the flags keep chroma at full precision.
INTERPOLATION = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)
# Codes of ITU-T H.273, as all containers and codecs store them.
UNSPECIFIED = 2
#: BT.709, FCC, BT.601 (625 and 525 lines), SMPTE 240M, BT.2020: swscale takes any other matrix for BT.601.
MATRICES = {1, UNSPECIFIED, 4, 5, 6, 7, 9}
#: Curves whose values are shown as they are: BT.709, PAL's (players do not honour its 2.8), SMPTE 170M and 240M,
#: xvYCC, BT.1361, sRGB, BT.2020.
DISPLAY_CURVES = {0, 1, UNSPECIFIED, 5, 6, 7, 11, 12, 13, 14, 15}
#: BT.709, BT.601 (both), SMPTE 240M, EBU 3213. Differences between them are small; the codes 0 and 3 are reserved.
DISPLAY_PRIMARIES = {0, 1, UNSPECIFIED, 3, 5, 6, 7, 22}
LINEAR, PQ, HLG = 8, 16, 18
#: Chromaticities x, y of red, green, blue: NTSC of 1953, film, BT.2020, DCI-P3 and Display P3.
WIDE_PRIMARIES = {
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
BT709 = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
D65 = (0.3127, 0.3290)
DIFFUSE_WHITE, PQ_PEAK, HLG_PEAK = 203, 10_000, 1_000  # cd/m²
#: Sample entries of Dolby Vision in mp4 whose stream need not be watchable without its metadata.
DOLBY_VISION = {"dvh1", "dvhe", "dvav", "dva1", "dav1"}


def from_srgb(values: np.ndarray) -> np.ndarray:
    """Return linear light in [0, 1] for sRGB values in [0, 1] (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_srgb(light: np.ndarray) -> np.ndarray:
    """Return sRGB values in [0, 1] for linear light in [0, 1] (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def from_pq(values: np.ndarray) -> np.ndarray:
    """Return linear light, diffuse white being 1, for PQ values in [0, 1] (SMPTE ST 2084, eq. 4.1)."""
    root = values ** (32 / 2523)
    light = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
    return PQ_PEAK / DIFFUSE_WHITE * light ** (16384 / 2610)


def from_hlg(values: np.ndarray) -> np.ndarray:
    """Return linear light of the scene in [0, 1] for HLG values in [0, 1] (ITU-R BT.2100, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)


#: Light of each curve that is not shown as it is: linear, gamma 2.2, PQ, HLG.
CURVES: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    4: lambda values: values**2.2,
    LINEAR: lambda values: values,
    PQ: from_pq,
    HLG: from_hlg,
}


@cache
def _light_of_codes(curve: int, white: int) -> np.ndarray:
    """Return the linear light of each 16-bit code, `white` being the code of value 1: (65536,) fp32."""
    decode = CURVES.get(curve, from_srgb)  # a display curve and the sRGB curve at the end must cancel out
    return decode((np.arange(65536) / white).clip(0, 1)).astype(np.float32)


@cache
def _srgb_of_light() -> np.ndarray:
    """Return the 8-bit sRGB code of linear light in steps of 1/65535: (65536,) uint8."""
    return (255 * to_srgb(np.arange(65536) / 65535)).round().astype(np.uint8)


@cache
def _to_xyz(primaries: tuple[float, ...]) -> np.ndarray:
    """Return the (3, 3) matrix from linear RGB to XYZ; RGB (1, 1, 1) is D65 (SMPTE RP 177)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (*zip(primaries[::2], primaries[1::2]), D65)]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


@cache
def _to_bt709(primaries: int) -> np.ndarray:
    """Return the (3, 3) fp32 matrix from linear RGB of wide primaries to linear RGB of BT.709; white stays white."""
    return np.linalg.solve(_to_xyz(BT709), _to_xyz(WIDE_PRIMARIES[primaries])).astype(np.float32)


def codes_to_srgb(codes: np.ndarray, curve: int, primaries: int, white: int = 65535) -> np.ndarray:
    """Convert stored colours to sRGB.

    Args:
        codes: (..., 3) uint16 RGB, full range.
        curve, primaries: codes of H.273.
        white: the code of value 1.

    Returns:
        (..., 3) uint8 sRGB.
    """
    light = _light_of_codes(curve, white)[codes]
    if curve == HLG:
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= HLG_PEAK / DIFFUSE_WHITE * luminance[..., None] ** 0.2  # the system gamma of BT.2100, note 5f
    if primaries in WIDE_PRIMARIES:
        light = light @ _to_bt709(primaries).T
    return light_to_srgb(light)


def light_to_srgb(light: np.ndarray) -> np.ndarray:
    """Convert linear light of any range, 1 being white, to uint8 sRGB codes; NaN becomes black."""
    clipped = np.nan_to_num(light, nan=0, posinf=1, neginf=0).clip(0, 1)
    return _srgb_of_light()[(65535 * clipped + 0.5).astype(np.uint16)]


@cache
def _has_alpha(pixel_format: str) -> bool:
    format = av.VideoFormat(pixel_format)
    return format.has_palette or any(component.is_alpha for component in format.components)


@cache
def _has_matrix(pixel_format: str) -> bool:
    """Return True if the format is YUV."""
    format = av.VideoFormat(pixel_format)
    return not (format.is_rgb or format.has_palette or len(format.components) < 3)


@cache
def _white(pixel_format: str) -> int:
    """Return the code that white gets when swscale converts a format to 16 bits per channel."""
    format = av.VideoFormat(pixel_format)
    return 255 << 8 if _has_matrix(pixel_format) or format.components[0].bits == 8 else 65535


def is_float(pixel_format: str) -> bool:
    """Return True if the format stores numbers of 16 or 32 bits with an exponent, which by convention are light."""
    return _without_order(pixel_format).endswith(("f16", "f32"))


def _without_order(pixel_format: str) -> str:
    """Return the name without the order of bytes: gbrpf32 for gbrpf32le."""
    return pixel_format.removesuffix("le").removesuffix("be")


def require_known_colours(path: str | Path, frame: av.VideoFrame, tag: str = "") -> None:
    """Check that the colours of a frame can be converted.

    Args:
        path: the file, for messages.
        frame: any frame of it.
        tag: the four letters that its container gives the codec, or "".

    Raises:
        UnusableVideo: they cannot.
    """
    curve, primaries = frame.color_trc, frame.color_primaries
    if _has_matrix(frame.format.name) and frame.colorspace not in MATRICES:
        problem = f"YUV of matrix {int(frame.colorspace)} in ITU-T H.273"
    elif tag in DOLBY_VISION and curve not in (PQ, HLG):
        problem = "Dolby Vision without an HDR10 or HLG base, such as profile 5"
    elif curve not in DISPLAY_CURVES | CURVES.keys():
        problem = f"transfer characteristics {int(curve)} of ITU-T H.273"
    elif primaries not in DISPLAY_PRIMARIES | WIDE_PRIMARIES.keys():
        problem = f"primaries {int(primaries)} of ITU-T H.273"
    elif is_float(frame.format.name) and _without_order(frame.format.name) not in FLOAT_PLANES:
        problem = f"numbers stored as {frame.format.name}"
    else:
        return
    raise unusable_video(path, problem, DropReason.UNKNOWN_COLOURS)


#: Float formats of FFmpeg, and the planes that hold red, green and blue.
FLOAT_PLANES = {"gbrpf32": (2, 0, 1), "gbrapf32": (2, 0, 1), "gbrpf16": (2, 0, 1), "gbrapf16": (2, 0, 1)}
FLOAT_PLANES |= {"grayf32": (0, 0, 0), "grayf16": (0, 0, 0)}


def rgb_pixels(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Convert a frame to (height, width, 3) uint8 sRGB, see the top of this module.

    The frame must have passed `require_known_colours`.
    """
    name, curve, primaries = frame.format.name, frame.color_trc, frame.color_primaries
    if is_float(name):
        frame = av.VideoFrame.from_ndarray(_float_to_srgb(frame, primaries), "rgb24")
    elif _has_alpha(name):
        # Before it is resized: the colour of transparent pixels has no meaning and must not bleed into their
        # neighbours.
        frame = av.VideoFrame.from_ndarray(_over_black(frame, curve, primaries), "rgb24")
    elif curve not in DISPLAY_CURVES or primaries not in DISPLAY_PRIMARIES:
        return codes_to_srgb(_reformat(frame, height, width, "rgb48le"), curve, primaries, _white(name))
    return _reformat(frame, height, width, "rgb24")


def _reformat(frame: av.VideoFrame, height: int, width: int, pixel_format: str) -> np.ndarray:
    # For files that do not name their colour matrix, players take BT.709 for HD; swscale always takes BT.601.
    unnamed_hd = frame.colorspace == UNSPECIFIED and frame.height > 576 and not frame.format.is_rgb
    return frame.reformat(
        width=width,
        height=height,
        format=pixel_format,
        src_colorspace=Colorspace.ITU709 if unnamed_hd else None,
        interpolation=INTERPOLATION,
        threads=1,
    ).to_ndarray()


def _over_black(frame: av.VideoFrame, curve: int, primaries: int) -> np.ndarray:
    """Return the opaque (H, W, 3) uint8 sRGB picture of a frame with straight alpha over black."""
    is_plain = curve in DISPLAY_CURVES and primaries in DISPLAY_PRIMARIES
    pixels = _reformat(frame, frame.height, frame.width, "rgba" if is_plain else "rgba64le")
    shown = np.empty((frame.height, frame.width, 3), np.uint8)
    for rows in _row_blocks(frame.height):
        rgb, alpha = pixels[rows, :, :3], pixels[rows, :, 3:]
        if not is_plain:
            rgb, alpha = codes_to_srgb(rgb, curve, primaries, _white(frame.format.name)), alpha >> 8
        shown[rows] = (rgb.astype(np.uint16) * alpha + 127) // 255
    return shown


def _float_to_srgb(frame: av.VideoFrame, primaries: int) -> np.ndarray:
    """Return the (H, W, 3) uint8 sRGB picture of a frame that stores light.

    Alpha is left out: over black it changes nothing, because float formats store colours that are multiplied by it.
    """
    name = frame.format.name
    dtype = np.dtype((">" if name.endswith("be") else "<") + ("f2" if "f16" in name else "f4"))
    planes = [frame.planes[index] for index in FLOAT_PLANES[_without_order(name)]]
    channels = [
        np.frombuffer(memoryview(plane), dtype).reshape(frame.height, plane.line_size // dtype.itemsize)
        for plane in planes
    ]
    shown = np.empty((frame.height, frame.width, 3), np.uint8)
    for rows in _row_blocks(frame.height):
        light = np.stack([channel[rows, : frame.width] for channel in channels], -1).astype(np.float32)
        shown[rows] = light_to_srgb(light @ _to_bt709(primaries).T if primaries in WIDE_PRIMARIES else light)
    return shown


def _row_blocks(height: int) -> Iterator[slice]:
    """Split rows into blocks: intermediate results of a whole large picture would fill gigabytes."""
    return (slice(top, top + 64) for top in range(0, height, 64))
