"""Contact sheets: clips as one picture, a row for each clip and a few frames in each column."""

import io
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw

from c2r.data.text_drawing import draw_text

#: Space between columns and height of a line of text, in pixels.
GAP, TITLE_HEIGHT, CAPTION_HEIGHT = 10, 18, 16


def draw_contact_sheet(
    columns: dict[str, list[np.ndarray]], captions: list[str], num_frames: int = 3, max_frame_width: int = 320
) -> Image.Image:
    """Draw a contact sheet of clips of one size.

    Args:
        columns: {title: list of (F, H, W, 3) uint8 RGB arrays, one for each row}.
        captions: the text above each row.
        num_frames: number of frames shown of each clip, spread from its first to its last.
        max_frame_width: wider frames are scaled down to this width, in pixels.

    Returns:
        an RGB image.
    """
    first = next(iter(columns.values()))[0]
    scale = min(Fraction(1), Fraction(max_frame_width, first.shape[2]))
    height, width = (round(size * scale) for size in first.shape[1:3])
    shown = np.unique(np.linspace(0, len(first) - 1, num_frames).round().astype(int))
    clip_width, row_height = width * len(shown), height + CAPTION_HEIGHT
    size = ((clip_width + GAP) * len(columns) - GAP, TITLE_HEIGHT + row_height * len(captions))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, clips) in enumerate(columns.items()):
        x = column * (clip_width + GAP)
        draw_text(draw, (x + 2, 3), title)
        for row, clip in enumerate(clips):
            y = TITLE_HEIGHT + row * row_height + CAPTION_HEIGHT
            for place, frame in enumerate(shown):
                sheet.paste(Image.fromarray(clip[frame]).resize((width, height)), (x + place * width, y))
    for row, caption in enumerate(captions):
        draw_text(draw, (2, TITLE_HEIGHT + row * row_height), caption)
    return sheet


def image_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """Return the content of an image file; `options` are those of `Image.save`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
