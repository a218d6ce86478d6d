"""Videos as one picture: a row per clip, a few frames in each column."""

import io
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw

GAP, TITLE_HEIGHT, CAPTION_HEIGHT = 10, 18, 16


def draw_contact_sheet(columns, captions, num_frames=3, max_frame_width=320):
    """A contact sheet of clips of one size.

    Args:
        columns: {title: list of (F, H, W, 3) uint8 RGB arrays}, equally many in each, one for each row.
        captions: one text for each row, drawn above it.
        num_frames: frames shown of each clip, spread from its first to its last.
        max_frame_width: wider frames are scaled down to it, in pixels.

    Returns:
        `PIL.Image`, RGB.
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
        draw.text((x + 2, 3), title, fill="black")
        for row, clip in enumerate(clips):
            y = TITLE_HEIGHT + row * row_height + CAPTION_HEIGHT
            for place, frame in enumerate(shown):
                sheet.paste(Image.fromarray(clip[frame]).resize((width, height)), (x + place * width, y))
    for row, caption in enumerate(captions):
        draw.text((2, TITLE_HEIGHT + row * row_height), caption, fill="black")
    return sheet


def encoded(image, format="PNG", **options) -> bytes:
    """An image as a file's content."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
