"""Passes of a renderer, ids of objects and depth, from videos and picture sequences. Their values are kept.

A frame is resized as a video's frame is, to cover the clip, then cropped, but each value is that of the nearest pixel:
the average of two ids is the id of another object, and the average of two depths is a surface that does not exist.
"""

import logging
import re
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch

from c2r import InputError
from c2r.data.frame_times import nearest_frames
from c2r.data.video import open_frames
from c2r.data.video_info import require_shape, to_fraction

logger = logging.getLogger(__name__)

Kind = Literal["ids", "depth"]

#: Share of the pixels at borders of ids from which on a pass counts as filtered, see `_mixed_share`. Drawn scenes have
#: up to 0.03; halved or enlarged with a filter they have 0.06 to 0.55, and decoded from lossy video 0.1 to 0.5.
FILTERED = 0.05

#: Pictures that always lose values. Low ids become those of other objects, which `_mixed_share` cannot tell.
JPEG = re.compile(r"\.jpe?g(@|$)", re.IGNORECASE)

#: Seconds after its time for which the last frame of a pass counts, in frames of the clip.
REACH = Fraction(1, 2)

#: Formats whose first component is the value: grey, and the red of EXR pictures. All with or without alpha.
FLOATS = re.compile(r"(gray|ya|gbrp|gbrap)f(16|32)[lb]e")
GREYS = re.compile(r"gray|ya8|(gray|ya)(9|1[0-6])[lb]e")


def read_pass(
    path: str | Path, kind: Kind, start: float, num_frames: int, fps: float, height: int, width: int
) -> torch.Tensor:
    """Read a window of a pass.

    Args:
        path: a video or an image sequence, named as in `c2r.data.sequences`.
        kind: ids: numbers of grey pictures, or colours, each being the number red · 2¹⁶ + green · 2⁸ + blue.
            depth: values of grey or of EXR pictures as they are stored, or the luma of a video.
        start: seconds from its first frame.
        num_frames, fps, height, width: of the clip.

    Returns:
        (F, H, W), int32 for ids, float32 for depth.

    Raises:
        InputError: it cannot be decoded, is too short, or has values that cannot be these.
    """
    wanted = [to_fraction(start) + n / to_fraction(fps) for n in range(num_frames)]
    planes: list[np.ndarray] = []
    lost: list[Fraction] = []
    with open_frames(path, lost) as timed:
        for count, frame in nearest_frames(timed, wanted, REACH / to_fraction(fps)):
            planes += [_resized(_values(path, frame, kind), height, width)] * count
    if lost:
        raise InputError(f"{path}: is damaged at {float(min(lost)):.2f} s; render the pass again")
    if len(planes) < num_frames:
        raise InputError(f"{path}: gives {len(planes)} of {num_frames} frames; render the pass as long as its video")
    return torch.from_numpy(np.stack(planes))


def check_pass(path: str | Path, kind: Kind) -> None:
    """Read the first frame of a pass. Warn of ids that a filter has mixed at the borders of objects.

    Raises:
        InputError: see `read_pass`.
    """
    with open_frames(path, []) as timed:
        first = next(timed, None)
        if first is None:
            raise InputError(f"{path}: has no frame; render the pass again")
        values = _values(path, first[1], kind)
    if kind == "ids" and (share := _mixed_share(values)) > FILTERED:
        logger.warning(
            "%s: %.0f %% of the pixels at borders of its ids have an id of their own, as if ids had been mixed, and "
            "count as objects; render the pass without antialiasing, keep it as PNG pictures or lossless video "
            "(FFV1), and resize it by the nearest pixel",
            *(path, 100 * share),
        )


def _mixed_share(ids):
    """Return the share of pixels unlike all four neighbours, among those unlike one of them, of ids (h, w)."""
    around = np.pad(ids, 1, mode="edge")  # so a pixel at the edge of the picture is never unlike all
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    unlike = sum((ids != neighbour).astype(int) for neighbour in neighbours)
    return (unlike == 4).sum() / max((unlike > 0).sum(), 1)


def _values(path, frame: av.VideoFrame, kind: Kind) -> np.ndarray:
    """Return the values of a frame, (h, w)."""
    require_shape(path, frame.width, frame.height)
    pixels, bits = frame.format, frame.format.components[0].bits
    if kind == "ids" and JPEG.search(str(path)):
        raise _inexact(path, "JPEG pictures, whose values")
    if FLOATS.fullmatch(pixels.name):
        values = _first_component(frame, "f").astype(np.float32)
        return values if kind == "depth" else _as_ids(path, values)
    if "f16" in pixels.name or "f32" in pixels.name:
        raise InputError(f"{path}: floats as {pixels.name}, which are not read; write EXR with grey or RGB channels")
    if ".exr" in Path(path).name.lower():  # FFmpeg keeps the upper half of 32-bit integers alone: all ids become 0
        raise InputError(f"{path}: EXR of whole numbers (UINT) cannot be read; write the pass in float precision")
    if GREYS.fullmatch(pixels.name):
        return _first_component(frame, "u").astype(np.float32 if kind == "depth" else np.int32)
    if pixels.name.startswith("mono"):
        return frame.to_ndarray(format="gray").astype(np.float32 if kind == "depth" else np.int32)
    if pixels.is_rgb or pixels.name == "pal8":
        if bits > 8:
            raise InputError(f"{path}: colours of {bits} bits; give grey pictures of 16 bits, or colours of 8")
        red, green, blue = (frame.to_ndarray(format="rgb24").astype(np.int32)).transpose(2, 0, 1)
        if kind == "ids":
            return red << 16 | green << 8 | blue
        if (red != green).any() or (red != blue).any():
            raise InputError(f"{path}: colours instead of depth; give grey pictures of 16 bits, or EXR")
        return red.astype(np.float32)
    if kind == "ids":
        raise _inexact(path, f"a video of {pixels.name}, whose colours")
    return frame.to_ndarray(format="gray").astype(np.float32)


def _inexact(path, found):
    return InputError(
        f"{path}: {found} are not kept exactly; give ids as PNG pictures, or as a lossless video of RGB or grey"
    )


def _first_component(frame, kind):
    """Return the grey or red values of a frame as they are stored, (h, w); `kind` is NumPy's letter of the type.

    PyAV would convert other formats than its own through 16-bit integers, which clips floats at 1.
    """
    component = frame.format.components[0]
    plane = frame.planes[component.plane]
    interleaved = sum(other.plane == component.plane for other in frame.format.components)
    size = -(-component.bits // 8)
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height]
    stored = (
        rows[:, : frame.width * interleaved * size]
        .copy()
        .view(f"{'>' if frame.format.is_big_endian else '<'}{kind}{size}")
    )
    return stored[:, ::interleaved]


def _as_ids(path, values):
    if not (np.isfinite(values).all() and (np.abs(values) < 2**24).all() and (values == np.round(values)).all()):
        raise InputError(f"{path}: values that are not whole numbers are no ids; give the pass of object indices")
    return values.astype(np.int32)


def _resized(values, height, width):
    """(h, w) -> (height, width), as `c2r.data.video.to_rgb` resizes and crops, by the nearest pixel."""
    rows, columns = values.shape
    scale = max(Fraction(height, rows), Fraction(width, columns))
    covering = max(height, round(rows * scale)), max(width, round(columns * scale))
    picked = []
    for size, covered, wanted in zip((rows, columns), covering, (height, width)):
        first = (covered - wanted) // 2
        centres = np.arange(first, first + wanted) + 0.5
        picked.append(np.minimum((centres * size / covered).astype(np.int64), size - 1))
    return np.ascontiguousarray(values[np.ix_(*picked)])
