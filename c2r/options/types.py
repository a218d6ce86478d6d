"""Types of option values: each reads one value from text, or refuses it with a reason and a remedy."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from c2r.data.buckets import check_num_frames, check_pixels, parse_bucket

# A type reads one value from text. It raises ValueError("what is wrong; what to do"); `c2r.cli` names the option.


@dataclass(frozen=True)
class Number:
    """A finite number within bounds.

    Args:
        above: exclusive lower bound.
        least, most: inclusive bounds.
        below: exclusive upper bound.
        whole: only whole numbers.
    """

    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    whole: bool = False

    def __call__(self, text: str) -> float:
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            raise ValueError(f"not a {'whole ' * self.whole}number; give {self}") from None
        if not (math.isfinite(value) and self.above < value < self.below and self.least <= value <= self.most):
            raise ValueError(f"out of range; give {self}")
        return value

    def __str__(self):
        kind = "a whole number" if self.whole else "a number"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{kind} from {_text(self.least)} to {_text(self.most)}"
        if math.isfinite(self.above) and math.isfinite(self.below):
            return f"{kind} between {_text(self.above)} and {_text(self.below)}"
        bounds = (("above", self.above), ("of at least", self.least), ("of at most", self.most), ("below", self.below))
        limits = [f"{words} {_text(bound)}" for words, bound in bounds if math.isfinite(bound)]
        return " and ".join([f"{kind} {limits[0]}", *limits[1:]]) if limits else kind


def _text(bound):
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    words: tuple[str, ...]

    def __call__(self, text: str) -> str:
        if text not in self.words:
            raise ValueError(f"not one of the choices; give {self}")
        return text

    def __str__(self):
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"


@dataclass(frozen=True)
class Text:
    """Any text; `description` is shown in messages and in docs/options.md."""

    description: str = "text"

    def __call__(self, text: str) -> str:
        return text

    def __str__(self):
        return self.description


@dataclass(frozen=True)
class Checked:
    """A value that `read` reads from text or refuses by ValueError."""

    read: Callable[[str], Any]
    description: str

    def __call__(self, text: str) -> Any:
        return self.read(text)

    def __str__(self):
        return self.description


@dataclass(frozen=True)
class OrWord:
    """A value of another type, or one word."""

    other: Callable[[str], Any]
    word: str

    def __call__(self, text: str) -> Any:
        return text if text == self.word else self.other(text)

    def __str__(self):
        return f"{self.other}, or {self.word}"


@dataclass(frozen=True)
class Flag:
    """An option without a value: off unless it is given."""

    def __str__(self):
        return "no value"


@dataclass(frozen=True)
class Switch:
    """An option that is switched on by --name and off by --no-name."""

    def __str__(self):
        return "no value; --no-… switches it off"


def _duration(text):
    number, unit = text[:-1], text[-1:]
    try:
        return {"s": 1, "m": 60, "h": 3600}[unit] * POSITIVE(number)
    except (KeyError, ValueError):
        raise ValueError("not a duration; give one such as 90s, 5m or 1h") from None


def _lora(text):
    """Return (path, scale)."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, ANY_NUMBER(scale)) if colon else (text, 1.0)
    except ValueError:
        raise ValueError("its scale is no number; give FILE:SCALE, such as style.safetensors:0.8") from None


def _memory(text):
    number = re.fullmatch(r"(.+?)\s*GI?B?", text.upper())
    try:
        return POSITIVE(number[1] if number else "") * 2**30
    except ValueError:
        raise ValueError("not a size of memory; give one such as 16GB") from None


COUNT = Number(least=1, whole=True)
COUNT_OR_ZERO = Number(least=0, whole=True)
SEED = Number(least=0, most=2**31 - 1, whole=True)  # numpy takes no others
PORT = Number(least=1, most=65_535, whole=True)
POSITIVE = Number(above=0)
FRAME_RATE = Number(above=0, most=1000)  # a rate of a billion would cut a second of video into millions of clips
NOT_NEGATIVE = Number(least=0)
SHARE = Number(least=0, most=1)
ANY_NUMBER = Number()
ANY_TEXT = Text()
FOLDER = Text("a folder")
FILE = Text("a file")
MODEL = Text("a folder or hub name")
PIXELS = Checked(check_pixels, "pixels, divisible by 16")
FRAMES = Checked(check_num_frames, "frames, 4k + 1")
BUCKET = Checked(parse_bucket, "frames x height x width")
LORA = Checked(_lora, "a file or folder, and perhaps a scale")
MEMORY = Checked(_memory, "a size such as 16GB")
DURATION = Checked(_duration, "a duration such as 90s, 5m or 1h")
