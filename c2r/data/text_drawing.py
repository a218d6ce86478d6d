"""Draw text of any script into pictures, with the fonts that the machine has."""

from functools import cache
from itertools import groupby

from PIL import ImageDraw, ImageFont

SIZE = 11  # pixels
#: Fonts of wide coverage, as Linux distributions, macOS and Windows have them. Pillow finds them by name.
FONTS = (
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "unifont.otf",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "arialuni.ttf",
    "msgothic.ttc",
    "seguisym.ttf",
)
# A character that no font has: all others that a font lacks are drawn like it.
_UNASSIGNED = "\U0010fffd"


def draw_text(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str) -> None:
    """Draw a line of black text; a character that no font of the machine has is drawn as \\u6771.

    Args:
        draw: of an RGB image.
        position: of the upper left corner, in pixels.
        text: one line.
    """
    x, y = position
    for font, characters in groupby(text, _font_of):
        run = "".join(characters)
        if font is None:
            font, run = _fonts()[0], run.encode("ascii", "backslashreplace").decode()
        draw.text((x, y), run, fill="black", font=font)
        x += font.getlength(run)


@cache
def _font_of(character):
    return next((font for font in _fonts() if _has(font, character)), None)


@cache
def _fonts():
    fonts = []
    for name in FONTS:
        try:
            fonts.append(ImageFont.truetype(name, SIZE))
        except OSError:  # the machine does not have it
            continue
    return [ImageFont.load_default(SIZE), *fonts]


def _has(font, character):
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(_UNASSIGNED))
