"""Captions that people have: text files beside their videos, and tables."""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from c2r import InputError
from c2r.data.folders import spelling
from c2r.data.table_checks import SEPARATORS, marked_encoding
from c2r.preparation.sources import Source, some

#: Bytes of a text file and of a table, far above what people write.
MAX_TEXT_BYTES, MAX_TABLE_BYTES = 1_000_000, 2**30
#: Names of columns, without case, spaces and hyphens. The first one that a table has is used.
COLUMNS = {
    "file_name": ("file_name", "filename", "file", "video", "video_path", "video_name", "video_file", "path", "clip"),
    "text": ("text", "caption", "captions", "prompt", "description", "caption_text"),
    "control_name": ("control_name", "control", "coarse", "coarse_name", "control_video", "coarse_video"),
    "start": ("start", "start_time", "start_seconds"),
    "end": ("end", "end_time", "end_seconds"),
    "fps": ("fps", "frame_rate"),
}


class TableRow(NamedTuple):
    """A row of a table of captions; "" for a missing value."""

    file_name: str
    text: str
    control_name: str = ""
    start: str = ""
    end: str = ""
    fps: str = ""


@dataclass
class Captions:
    """The captions of a folder's videos, and remarks on how they were read."""

    rows: dict[str, list[TableRow]] = field(default_factory=lambda: defaultdict(list))  #: of a table, by source
    texts: dict[str, str] = field(default_factory=dict)  #: of text files, by source
    remarks: list[str] = field(default_factory=list)

    @property
    def rates(self) -> dict[str, float]:
        """The rates that a table gives to image sequences and their controls, by source."""
        rows = [row for rows in self.rows.values() for row in rows if row.fps]
        return {name: float(row.fps) for row in rows for name in (row.file_name, row.control_name) if name}


def decode(content: bytes, name: str) -> tuple[str, str | None]:
    """Decode text of a byte order mark's encoding, UTF-8, UTF-16 without a mark, or Windows-1252.

    Returns:
        the text, and a remark if its encoding is a guess.

    Raises:
        InputError: it is text in none of these.
    """
    encoding = marked_encoding(content)
    guesses = [encoding] if encoding else ["utf-8", "cp1252"]
    if encoding is None and b"\0" in content[:1000]:  # no other text has zeros: half of the bytes of Latin letters
        guesses = ["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]
    for guess in guesses:
        try:
            text = content.decode(guess)
        except UnicodeDecodeError:
            continue
        if guess in ("utf-8", encoding):
            return text, None
        kind = "Windows-1252 (cp1252)" if guess == "cp1252" else "UTF-16"
        return text, f"{name}: is not UTF-8, read as {kind}; check its accents in metadata.csv"
    raise InputError(f"{name}: is in no encoding that is known here; save it as UTF-8")


def one_line(text: str) -> str:
    """Return a text with single spaces instead of line breaks and other white space."""
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------- text files


def read_text_files(folder: str, sources: Iterable[Source], captions: Captions) -> None:
    """Read the text file beside each source: of its name, or the only one in the folder of a sequence."""
    for source in sources:
        for name in _text_names(folder, source):
            text, remark = decode(_read(Path(folder, name), name, MAX_TEXT_BYTES), name)
            captions.remarks += [remark] if remark else []
            if caption := one_line(text):
                captions.texts[source.name] = caption
                break


def _text_names(folder: str, source: Source) -> Iterator[str]:
    names = [f"{source.stem}.txt", f"{source.name}.txt"]
    if source.is_sequence and os.path.isdir(f"{folder}/{source.name}"):
        inside = [name for name in os.listdir(f"{folder}/{source.name}") if name.lower().endswith(".txt")]
        names += [f"{source.name}/{name}" for name in inside] if len(inside) == 1 else []
    for name in names:
        if _is_inside(f"{folder}/{name}", folder):
            yield name


def _is_inside(path, folder):
    """Return True for a regular file that no link leads out of the folder to."""
    return os.path.isfile(path) and os.path.realpath(path).startswith(folder.rstrip("/") + "/")


def _read(path, name, max_bytes):
    if path.stat().st_size > max_bytes:
        raise InputError(f"{name}: has more than {max_bytes} bytes; give captions only")
    return path.read_bytes()


# -------------------------------------------------------------------------------------------------------------- tables


def find_table(folder: str, own: Path | None, captions: Captions) -> Path | None:
    """Return the one table of captions that lies in a folder; None if there is none.

    Args:
        folder: is searched, but not the folders in it.
        own: the metadata.csv that this command wrote, which does not count.
        captions: gets a remark for each table without the columns.

    Raises:
        InputError: there are several.
    """
    found = []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() not in (".csv", ".tsv") or path.name.startswith(".") or path == own:
            continue
        if not _is_inside(path, folder):
            continue
        try:
            read_table(path, path.name)
        except InputError as error:
            captions.remarks.append(f"{error} (not used)")
        else:
            found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder}: holds {len(found)} tables of captions ({names}); name one by --captions")
    return found[0] if found else None


def read_table(path: Path, name: str) -> tuple[list[TableRow], str | None]:
    """Read a table of captions, with commas, semicolons, tabs or | between its fields.

    Returns:
        its rows, and a remark if its encoding is a guess.

    Raises:
        InputError: it cannot be read, lacks a column, or has a row with too many fields or an open quote.
    """
    try:
        content = _read(path, name, MAX_TABLE_BYTES)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check the path") from None
    text, remark = decode(content, name)
    header_line = text.partition("\n")[0].rstrip("\r")
    for separator in SEPARATORS:
        header = next(csv.reader([header_line], delimiter=separator), [])
        columns = _columns(header)
        if {"file_name", "text"} <= columns.keys():
            return _rows(text, name, separator, len(header), columns), remark
    raise InputError(
        f"{name}: its first line ({header_line[:80]!r}) names no columns of files and captions; write "
        "file_name,text there"
    )


def _columns(header: Sequence[str]) -> dict[str, int]:
    """Return the positions of the columns that are known by name."""
    names = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in header]
    return {
        column: names.index(known[0])
        for column, aliases in COLUMNS.items()
        if (known := [alias for alias in aliases if alias in names])
    }


def _rows(text, name, separator, width, columns):
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, line = [], 1
    try:
        for fields in reader:
            if len(fields) > width:
                raise InputError(
                    f"{name}: line {line} has {len(fields)} fields, the first line {width}; put captions that contain "
                    f"{separator!r} in double quotes"
                )
            if line > 1 and any(fields):
                values = {column: one_line(fields[place]) for column, place in columns.items() if place < len(fields)}
                rows.append(TableRow(**{"file_name": "", "text": ""} | values))
                _require_numbers(rows[-1], name, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{name}: line {line} cannot be read ({error}); write a quote in a caption twice, and put the caption in "
            "quotes"
        ) from None
    return rows


def _require_numbers(row, name, line):
    for column in ("start", "end", "fps"):
        value = getattr(row, column)
        try:
            is_time = not value or 0 <= float(value) < float("inf")
        except ValueError:
            is_time = False
        if not is_time or (column == "fps" and value and float(value) == 0):
            raise InputError(f"{name}: line {line} has {column} {value!r}; give a number such as 12.5")


def match_table(rows: Iterable[TableRow], name: str, sources: Iterable[Source], captions: Captions) -> None:
    """Assign the rows of a table to sources, and replace their names by those of the sources.

    A row may name a file by its path, by the path without its ending, or by the end of its path if no other file has
    the same one. Upper and lower case do not count.
    """
    by_name: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for form in (source.name, source.stem):
            parts = spelling(form).split("/")
            for first in range(len(parts)):
                by_name["/".join(parts[first:])].add(source.name)
        by_name[f"={spelling(source.name)}"] = {source.name}

    def find(given):
        parts = [part for part in spelling(given).split("/") if part not in ("", ".")]
        whole = "/".join(parts)
        forms = [f"={whole}", *("/".join(parts[first:]) for first in range(len(parts)))]
        return next((found for form in forms if (found := by_name.get(form))), set())

    unmatched: list[str] = []
    ambiguous: list[str] = []
    for row in rows:
        found, controls = find(row.file_name), find(row.control_name) if row.control_name else set()
        if len(found) != 1 or len(controls) > 1:
            (unmatched if not found else ambiguous).append(row.file_name)
            continue
        if row.control_name and not controls:
            unmatched.append(row.control_name)
        (source_name,) = found
        captions.rows[source_name].append(row._replace(file_name=source_name, control_name="".join(controls)))
    if unmatched:
        captions.remarks.append(f"{name}: no file of {len(unmatched)} rows was found: {some(unmatched)}")
    if ambiguous:
        captions.remarks.append(f"{name}: several files fit the name of {len(ambiguous)} rows: {some(ambiguous)}")
