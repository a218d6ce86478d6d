"""Photographs and animated WebP, read by Pillow, which knows colour profiles, orientation and tiles.

The content decides which files these are, not the name. Other formats are left to PyAV. It also reads PNG without a
colour profile, because it knows 16 bits and the other tags of colour, and the animations of GIF and PNG.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from c2r.data.colour import CURVES, DISPLAY_CURVES, DISPLAY_PRIMARIES, UNSPECIFIED, WIDE_PRIMARIES, codes_to_srgb
from c2r.data.containers import open_content, require_readable
from c2r.data.drop_reasons import DropReason
from c2r.data.video_info import (
    MAX_PIXELS,
    MAX_SECONDS,
    SeekableFile,
    UnusableVideo,
    VideoInfo,
    require_shape,
    unusable_video,
)

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

Image.init()  # loads Pillow's plugins, of which FORMATS are used
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000"] + ["HEIF"] * (pillow_heif is not None)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
#: TIFF tags: a reduced copy of another picture, as raw photographs begin with; the version of a DNG.
SUBFILE_TYPE, DNG_VERSION = 254, 50706
#: Bytes at the start of an AVIF that hold its tags.
NCLX_REACH = 1 << 20
#: Seconds for which players show a frame of an animation whose file names no duration.
UNSET_DURATION = Fraction(1, 10)
SRGB = ImageCms.createProfile("sRGB")
#: Pillow's mode for the colour spaces of profiles.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


@dataclass(frozen=True)
class Picture:
    """An open photograph or animation."""

    path: str | Path
    image: Image.Image
    #: Seconds at which each frame of an animation begins, and at last its end; None for a photograph.
    times: list[Fraction] | None

    def info(self) -> VideoInfo:
        """Return length, rate and shape; the first frame is decoded, which finds most damage."""
        height, width, _ = _upright_rgb(self.path, self.image).shape
        if self.times is None:
            return VideoInfo(Fraction(0), Fraction(1, 25), width / height, True, height)
        *_, last, end = self.times
        if end > MAX_SECONDS:
            raise unusable_video(self.path, f"it lasts {float(end / 3600):.0f} hours", DropReason.BEYOND_LIMITS)
        return VideoInfo(last, end / (len(self.times) - 1), width / height, False, height)

    @property
    def last_shown(self) -> Fraction:
        """Seconds for which the last frame of an animation is shown."""
        return self.times[-1] - self.times[-2] if self.times else Fraction(0)

    def frames(self, start: Fraction) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        """Yield (seconds from the first frame, upright frame in rgb24), from the frame shown at `start` on."""
        times = self.times[:-1] if self.times else [Fraction(0)]
        for number, time in enumerate(times):
            if number + 1 < len(times) and times[number + 1] <= start:
                continue
            if self.times:
                with _errors_of_pillow(self.path):
                    self.image.seek(number)
            yield time, av.VideoFrame.from_ndarray(_upright_rgb(self.path, self.image), "rgb24")


@contextmanager
def open_picture(path: str | Path, file: SeekableFile | None = None) -> Iterator[Picture | None]:
    """Open a photograph or an animated WebP; gives None for a file that PyAV is to read.

    Args:
        path: the file; only for messages if there is a file object.
        file: a seekable binary file object to read instead.

    Raises:
        UnusableVideo: it is damaged, beyond the limits, or a HEIC that needs the package pillow-heif.
        InputError: the system fails to read it.
    """
    with ExitStack() as stack:
        with _errors_of_pillow(path, file):
            content = stack.enter_context(open_content(path, file))
            picture = _identify(path, content)
        content.seek(0)
        yield picture


def _identify(path: str | Path, content: BinaryIO) -> Picture | None:
    content.seek(0)
    try:
        image = Image.open(content, formats=FORMATS)
    except UnidentifiedImageError:
        content.seek(0)
        start = content.read(12)
        if pillow_heif is None and start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS:
            raise unusable_video(path, "HEIC needs another package: pip install pillow-heif") from None
        return None
    require_shape(path, *image.size)
    if _is_for_pyav(path, image):
        return None
    if image.format == "WEBP" and getattr(image, "is_animated", False):
        times = _webp_times(content)
        if len(times) < 2:
            raise unusable_video(path, "its animation holds no frame")
        return Picture(path, image, times)
    if image.format == "AVIF":
        image.info["nclx"] = _nclx(content)
    return Picture(path, image, None)


@contextmanager
def _errors_of_pillow(path: str | Path, file: SeekableFile | None = None) -> Iterator[None]:
    """Turn what Pillow raises into UnusableVideo; its plugins raise many types for damaged files."""
    try:
        yield
    except UnusableVideo:
        raise
    except Image.DecompressionBombError as error:
        detail = f"it declares more than {MAX_PIXELS} pixels"
        raise unusable_video(path, detail, DropReason.BEYOND_LIMITS) from error
    except Exception as error:
        if file is None:
            require_readable(path)
        raise unusable_video(path, getattr(error, "strerror", None) or error) from error


def _is_for_pyav(path: str | Path, image: Image.Image) -> bool:
    """Return True if PyAV reads this file better.

    Raises:
        UnusableVideo: neither reads it right.
    """
    animated = getattr(image, "is_animated", False)
    if image.format == "GIF":
        return animated
    if image.format == "PNG":
        if animated and "icc_profile" in image.info:
            raise unusable_video(path, "an animation with a colour profile", DropReason.UNKNOWN_COLOURS)
        gamma = image.info.get("gamma")
        known = not gamma or {"srgb", "icc_profile"} & image.info.keys()
        if not known and abs(gamma - 1) > 0.01 and abs(2.2 * gamma - 1) > 0.02:
            raise unusable_video(path, f"a PNG with gamma {gamma:g}", DropReason.UNKNOWN_COLOURS)
        return "icc_profile" not in image.info
    if image.format == "AVIF" and animated:
        if image.mode == "RGBA" or "icc_profile" in image.info:
            detail = "an animated AVIF with alpha or a colour profile"
            raise unusable_video(path, detail, DropReason.UNKNOWN_COLOURS)
        return True
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if DNG_VERSION in tags or tags.get(SUBFILE_TYPE, 0) & 1:
            raise unusable_video(path, "a raw photograph, which begins with a small preview: develop it")
    return False


def _webp_times(content: BinaryIO) -> list[Fraction]:
    """Return the seconds at which each frame of an animated WebP begins, and at last its end.

    Source: RIFF container specification of WebP, chunk ANMF: the duration in milliseconds is at byte 12.
    """
    times, start = [Fraction(0)], 12
    while True:
        content.seek(start)
        header = content.read(23)
        if len(header) < 23:
            return times
        name, size = struct.unpack_from("<4sI", header)
        if name == b"ANMF":
            milliseconds = int.from_bytes(header[20:23], "little")
            times.append(times[-1] + (Fraction(milliseconds, 1000) or UNSET_DURATION))
        start += 8 + size + size % 2


def _nclx(content: BinaryIO) -> tuple[int, int]:
    """Return transfer characteristics and primaries (codes of H.273) of an AVIF.

    Source: ISO/IEC 14496-12, box colr of type nclx.
    """
    content.seek(0)
    _, found, after = content.read(NCLX_REACH).partition(b"colrnclx")
    if not found or len(after) < 4:
        return UNSPECIFIED, UNSPECIFIED
    primaries, curve = struct.unpack_from(">HH", after)
    return curve, primaries


def _upright_rgb(path: str | Path, image: Image.Image) -> np.ndarray:
    """Return the current frame as (H, W, 3) uint8 sRGB: upright and opaque."""
    with _errors_of_pillow(path):
        image.load()
        opaque, alpha = _opaque_and_alpha(path, image)
        rgb = _srgb(path, opaque, image.info)
        if alpha is not None:
            black = Image.new("RGB", rgb.size)
            black.paste(rgb, mask=alpha)
            rgb = black
        orientation = image.getexif().get(0x112, 1)
        if orientation != 1:
            rgb.getexif()[0x112] = orientation
            rgb = ImageOps.exif_transpose(rgb)
        return np.asarray(rgb)


def _opaque_and_alpha(path: str | Path, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours of an image, in one of the modes L, RGB, CMYK and LAB, and its alpha if it has any."""
    if image.mode in ("I", "F"):
        raise unusable_video(path, "grey of 32 bits without a defined white", DropReason.UNKNOWN_COLOURS)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)), None
    if image.mode in ("RGBa", "La"):  # colours times alpha
        return image.convert(image.mode.upper()).convert("RGB"), image.getchannel("a")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB"), None


def _srgb(path: str | Path, image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """Convert an image to sRGB by its colour profile, or by the tags of AVIF and HEIC."""
    if profile := info.get("icc_profile"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = PROFILE_MODES[source.profile.xcolor_space.strip()]
            # A grey picture may carry the profile of a colour picture, and the other way round.
            image = image if image.mode == mode or "CMYK" in (image.mode, mode) else image.convert(mode)
            return ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, LookupError, ValueError) as error:
            raise unusable_video(path, f"colour profile: {error}", DropReason.UNKNOWN_COLOURS) from error
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, SRGB, outputMode="RGB")
    image = image.convert("RGB")
    curve, primaries = info.get("nclx", (UNSPECIFIED, UNSPECIFIED))
    if nclx := info.get("nclx_profile"):  # of a HEIC
        curve, primaries = int(nclx["transfer_characteristics"]), int(nclx["color_primaries"])
    if curve in DISPLAY_CURVES and primaries in DISPLAY_PRIMARIES:
        return image
    if curve not in DISPLAY_CURVES | CURVES.keys() or primaries not in DISPLAY_PRIMARIES | WIDE_PRIMARIES.keys():
        detail = f"transfer characteristics {curve}, primaries {primaries} of ITU-T H.273"
        raise unusable_video(path, detail, DropReason.UNKNOWN_COLOURS)
    return Image.fromarray(codes_to_srgb(np.asarray(image).astype(np.uint16) * 257, curve, primaries))
