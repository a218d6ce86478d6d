"""Image sequences: numbered pictures of a folder, read as a video at a rate that the user gives.

A user names a sequence by its folder, or by a pattern such as `shot_%04d.png` or `shot_####.exr`. Within the package
its name is the pattern with the rate: `shot_%04d.png@24`.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from c2r.data.drop_reasons import DropReason, DropRow

#: Endings of the pictures of a sequence.
SUFFIXES = (".avif", ".bmp", ".dpx", ".exr", ".jpeg", ".jpg", ".png", ".tga", ".tif", ".tiff", ".webp")
_PATTERN = re.compile(r"(?P<prefix>.*?)(?:%0?(?P<digits>\d*)d|(?P<hashes>#+))(?P<suffix>[^%#]*)")
_NUMBERED = re.compile(r"(?P<prefix>.*?)(?P<number>\d+)(?P<suffix>\D*)")
_WITH_RATE = re.compile(r"(?P<pattern>.*%(0\d+)?d[^/]*)@(?P<fps>[0-9.]+)")
#: Missing numbers and sequences that a message names.
_MAX_NAMED = 5


@dataclass(frozen=True)
class Sequence:
    """The pictures of a sequence."""

    folder: str
    prefix: str
    width: int  #: digits of each number; 0 without leading zeros
    suffix: str
    first: int  #: the lowest number
    count: int
    size: int  #: bytes of all pictures
    state: int  #: changes with the size or time of any picture

    @property
    def pattern(self) -> str:
        """Name of its pictures, with `%04d` or `%d` for the number."""
        return f"{self.prefix}%{f'0{self.width}' if self.width else ''}d{self.suffix}"

    def path(self, number: int) -> str:
        """Return the path of a picture, counted from 0."""
        return os.path.join(self.folder, f"{self.prefix}{self.first + number:0{self.width}d}{self.suffix}")


def is_pattern(name: str) -> bool:
    """Return True if a path's last part is a pattern of numbered pictures."""
    return _PATTERN.fullmatch(os.path.basename(name)) is not None


def split_rate(path: str) -> tuple[str, float] | None:
    """Return the pattern and the rate of a sequence's name; None if it is no such name."""
    match = _WITH_RATE.fullmatch(path)
    return None if match is None else (match["pattern"], float(match["fps"]))


def parse_rate(name: str, fps: str | float) -> float:
    """Return the frame rate of a sequence of this name; it may be written as a number or as 30000/1001.

    Raises:
        DropRow: it is no number above 0.
    """
    try:
        rate = float(Fraction(str(fps)))
    except (ValueError, ZeroDivisionError, OverflowError):
        rate = 0.0
    if not 0 < rate <= 1000:
        raise DropRow(DropReason.NO_RATE, f"{name}: fps {fps!r}: give a number above 0 and up to 1000")
    return rate


def find_sequence(
    path: str, name: str | None = None, is_inside: Callable[[str], bool] = lambda link: True
) -> Sequence:
    """Find the pictures of a sequence.

    Args:
        path: a folder, or a pattern in a folder.
        name: what messages call it; None: its path.
        is_inside: tells whether a link among the pictures leads to a file that may be read.

    Raises:
        DropRow: there are no pictures or several sequences, a number is missing, or a link leads out.
    """
    shown = name or path
    if os.path.isdir(path):
        folder = path
        found = {key: pictures for key, pictures in numbered_pictures(folder).items() if len(pictures) > 1}
    else:
        folder, pattern = os.path.split(path)
        match = _PATTERN.fullmatch(pattern)
        digits = len(match["hashes"]) if match["hashes"] else int(match["digits"] or 1)
        key = (match["prefix"], match["suffix"])
        pictures = _matching(folder, *key) if os.path.isdir(folder) else {}
        found = {key: {text: entry for text, entry in pictures.items() if text == f"{int(text):0{digits}d}"}}
        found = {key: pictures for key, pictures in found.items() if pictures}
    if not found and os.path.isdir(path):
        raise DropRow(DropReason.NOT_A_FILE, f"{shown} is a folder, and holds no numbered pictures")
    if not found:
        raise DropRow(DropReason.MISSING_FILE, f"{shown}: no numbered pictures ({', '.join(SUFFIXES)}) of this name")
    if len(found) > 1:
        names = ", ".join(f"{prefix}####{suffix}" for prefix, suffix in sorted(found)[:_MAX_NAMED])
        raise DropRow(DropReason.MISSING_FILE, f"{shown}: holds {len(found)} sequences ({names}); name one of them")
    (((prefix, suffix), pictures),) = found.items()
    _require_all_numbers(shown, pictures)
    return _sequence(shown, folder, prefix, suffix, pictures, is_inside)


def numbered_pictures(folder: str) -> dict[tuple[str, str], dict[str, os.DirEntry]]:
    """Return {(prefix, suffix): {number as written: entry}} of all numbered pictures in a folder."""
    found: dict[tuple[str, str], dict[str, os.DirEntry]] = defaultdict(dict)
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _NUMBERED.fullmatch(entry.name)
            if entry.name.startswith("."):  # macOS keeps notes on each file in ._ and its name
                continue
            if match is not None and match["suffix"].lower().endswith(SUFFIXES) and entry.is_file():
                found[match["prefix"], match["suffix"]][match["number"]] = entry
    return found


def _matching(folder, prefix, suffix):
    """Return {number as written: entry} of the pictures between a prefix and a suffix."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            number = entry.name[len(prefix) : len(entry.name) - len(suffix)]
            fits = entry.name.startswith(prefix) and entry.name.endswith(suffix) and number.isdecimal()
            if fits and suffix.lower().endswith(SUFFIXES) and entry.is_file():
                found[number] = entry
    return found


def _require_all_numbers(shown, pictures):
    numbers = {int(text) for text in pictures}
    first, last = min(numbers), max(numbers)
    if len(numbers) != len(pictures):
        raise DropRow(DropReason.MISSING_FRAMES, f"{shown}: a number is written in two ways; keep one of the pictures")
    absent = last - first + 1 - len(numbers)
    if absent:
        named = []
        for number in range(first, last):
            if number not in numbers:
                named.append(str(number))
            if len(named) == min(absent, _MAX_NAMED):
                break
        more = ", …" if absent > len(named) else ""
        detail = f"{shown}: of the pictures {first} to {last}, {absent} are missing: {', '.join(named)}{more}"
        raise DropRow(DropReason.MISSING_FRAMES, detail)


def _sequence(shown, folder, prefix, suffix, pictures, is_inside):
    size, states = 0, hashlib.sha256()
    texts = sorted(pictures, key=int)
    for text in texts:
        entry = pictures[text]
        if entry.is_symlink() and not is_inside(entry.path):
            raise DropRow(DropReason.OUTSIDE_FOLDER, f"{shown}: {entry.name} leads out of the folder")
        status = entry.stat()
        if status.st_size == 0:
            raise DropRow(DropReason.MISSING_FRAMES, f"{shown}: {entry.name} is empty")
        size += status.st_size
        states.update(f"{text} {status.st_size} {status.st_mtime_ns} ".encode())
    width = len(texts[0]) if texts[0].startswith("0") and texts[0] != "0" else 0
    if any(text != f"{int(text):0{width}d}" for text in texts):
        raise DropRow(DropReason.MISSING_FRAMES, f"{shown}: the numbers have different widths; rename the pictures")
    state = int.from_bytes(states.digest()[:7], "big")  # in the place of a file's time of change
    return Sequence(folder, prefix, width, suffix, int(texts[0]), len(texts), size, state)
