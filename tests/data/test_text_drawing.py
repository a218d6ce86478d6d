import numpy as np
import pytest
from PIL import Image, ImageDraw

from c2r.data import text_drawing
from c2r.data.text_drawing import draw_text


def drawn(text):
    image = Image.new("RGB", (400, 20), "white")
    draw_text(ImageDraw.Draw(image), (2, 2), text)
    return np.asarray(image)


@pytest.fixture
def default_font_only(monkeypatch):
    monkeypatch.setattr(text_drawing, "FONTS", ())
    for cached in (text_drawing._fonts, text_drawing._font_of):
        cached.cache_clear()
    yield
    for cached in (text_drawing._fonts, text_drawing._font_of):
        cached.cache_clear()


def test_characters_without_a_font_are_written_as_escapes(default_font_only):
    assert np.array_equal(drawn("a 東 b"), drawn("a \\u6771 b"))
    assert np.array_equal(drawn("Café"), drawn("Caf\\xe9"))
    assert not np.array_equal(drawn("東"), drawn("京"))


@pytest.mark.skipif(len(text_drawing._fonts()) == 1, reason="the machine has none of the fonts")
def test_fonts_of_the_machine_draw_other_scripts():
    assert not np.array_equal(drawn("Straße"), drawn("Stra\\xdfe"))
    assert not np.array_equal(drawn("Ж"), drawn("\\u0416"))


def test_text_of_several_fonts_is_one_line():
    columns = np.flatnonzero((drawn("ab東cd") < 128).any(axis=(0, 2)))
    assert np.diff(columns).max() < 12  # no run is drawn over another, or far from it
    assert columns.max() > np.flatnonzero((drawn("abcd") < 128).any(axis=(0, 2))).max()
