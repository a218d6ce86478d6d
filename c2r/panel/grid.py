"""Videos side by side in one, each with a label."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Width of a sweep's grid in pixels; wider videos are scaled down to fit.
GRID_WIDTH = 1920


def grid_columns(count: int) -> int:
    """Return the number of columns of a grid that is about as wide as it is high, in cells."""
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)


def labelled(frames: "np.ndarray", label: str, columns: int) -> "np.ndarray":
    """Scale frames (F, H, W, 3) down to a cell of a grid, and write a label above; sizes stay even, as H.264 needs."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    height, width = frames.shape[1:3]
    shrink = min(1, GRID_WIDTH / (columns * width))
    height, width = (2 * round(size * shrink / 2) for size in (height, width))
    title = 2 * max(8, height // 24)
    cell = Image.new("RGB", (width, title), "white")
    font = ImageFont.load_default(title * 0.75)
    ImageDraw.Draw(cell).text((width / 2, title / 2), label, "black", font, anchor="mm")
    strip = np.broadcast_to(np.asarray(cell), (len(frames), title, width, 3))
    resized = np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])
    return np.concatenate([strip, resized], axis=1)


def arrange(cells: Sequence["np.ndarray"], columns: int) -> "np.ndarray":
    """Arrange videos (F, h, w, 3) row by row in a grid; places without a video are white."""
    import numpy as np

    white = np.full_like(cells[0], 255)
    rows = [[*cells[i : i + columns]] for i in range(0, len(cells), columns)]
    rows[-1] += [white] * (columns - len(rows[-1]))
    return np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)
