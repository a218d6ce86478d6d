"""Look at a metadata file before it is parsed: its encoding, separators and quotes, and how large it is.

The readers of `datasets` would accept what a stray quote or an unquoted comma makes of a table, and would fill the
memory with whatever a file declares.
"""

import codecs
import csv
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq

from c2r import InputError

#: Bounds of a metadata file, far above what people have.
MAX_ROWS = 20_000_000
MAX_FIELD = 1_000_000  # characters of a caption or name; bytes of a line of JSON
MAX_DEPTH = 100  # of nested JSON
MAX_PARQUET_BYTES = 16 * 2**30  # after decompression

_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
#: What may stand between the fields of a table.
SEPARATORS = (",", ";", "\t", "|")


def marked_encoding(beginning: bytes) -> str | None:
    """Return the encoding that the byte order mark at the beginning of a text tells; None without a mark."""
    return next((encoding for mark, encoding in _BOMS.items() if beginning.startswith(mark)), None)


def check_csv(path: Path, name: str) -> dict[str, str]:
    """Check a CSV file, and return the `encoding` and `sep` to read it with.

    Args:
        path: the file.
        name: its name in messages.

    Raises:
        InputError: it is empty or in an unknown encoding, a quote is not closed or not doubled, a row has more fields
            than the header, or it is beyond the bounds.
    """
    with open(path, "rb") as file:
        beginning = file.read(4096)
    encoding = marked_encoding(beginning) or "utf-8"
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        with open(path, newline="", encoding=encoding) as file:
            header_line = file.readline(MAX_FIELD)
            sep = next((s for s in SEPARATORS if "file_name" in _fields(header_line, s)), ",")
            header = _fields(header_line, sep)
            if not header:
                raise InputError(f"{name}: is empty; write a header and list the videos in it")
            _check_rows(csv.reader(file, delimiter=sep, strict=True), name, header, sep)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: cannot be read as UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8, or let "
            "python -m c2r.prepare convert it"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return {"encoding": encoding, "sep": sep}


def _fields(line, sep):
    return next(csv.reader([line.removeprefix("\ufeff").rstrip("\r\n")], delimiter=sep), [])


def _check_rows(rows, name, header, sep):
    column = header.index("file_name") if "file_name" in header else 0
    first, count = 2, 0  # number of the row's first line, and of rows
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(
                f"{name}: line {first} has a quote that is not closed or not doubled ({error}); write a quote in a "
                'caption twice, and put the caption in quotes: "a sign says ""Open"""'
            ) from None
        if row is None:
            return
        count += 1
        if count > MAX_ROWS:
            raise InputError(f"{name}: has more than {MAX_ROWS} rows; split the dataset")
        last = rows.line_num + 1  # the header is line 1
        if len(row) > len(header):
            raise InputError(
                f"{name}: line {first} has {len(row)} fields, the header {len(header)}; put captions with a "
                f"{'comma' if sep == ',' else repr(sep)} in double quotes"
            )
        if last > first and len(row) > column:
            _refuse_swallowed_rows(row, name, column, sep, first, last)
        first = last + 1


def _refuse_swallowed_rows(row, name, column, sep, first, last):
    """Refuse a field of several lines if one of them looks like a row: its file has the same ending."""
    ending = PurePosixPath(row[column]).suffix
    for field in row:
        for line in field.splitlines()[1:]:
            fields = line.split(sep)
            if len(fields) > column and ending and fields[column].strip('"').endswith(ending):
                raise InputError(
                    f"{name}: lines {first} to {last} are one row, because of a quote at the beginning of a caption; "
                    'write it twice, and put the caption in quotes: """Open"" says a sign"'
                )


def check_jsonl(path: Path, name: str):
    """Raise InputError if a JSON Lines file has too many lines, or one that is too long or nested too deeply."""
    with open(path, "rb") as file:
        for number in range(1, MAX_ROWS + 2):
            line = file.readline(MAX_FIELD + 1)
            if not line:
                return
            if len(line) > MAX_FIELD:
                raise InputError(f"{name}: line {number} has more than {MAX_FIELD} bytes; shorten it")
            # A line with few brackets cannot be deep: only the others are looked at bracket by bracket.
            if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
                raise InputError(f"{name}: line {number} is nested more than {MAX_DEPTH} deep; correct it")
    raise InputError(f"{name}: has more than {MAX_ROWS} rows; split the dataset")


def _depth(line):
    """Return an upper bound of a line's depth: brackets within strings count too."""
    depth = deepest = 0
    for byte in line:
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    return deepest


def check_parquet(path: Path, name: str):
    """Raise InputError if a parquet file holds too many rows or bytes.

    Raises:
        pyarrow.ArrowException: it is no parquet file.
    """
    metadata = pq.read_metadata(path)
    if metadata.num_rows > MAX_ROWS:
        raise InputError(f"{name}: has {metadata.num_rows} rows, more than {MAX_ROWS}; split the dataset")
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if size > MAX_PARQUET_BYTES:
        raise InputError(
            f"{name}: has {size / 1e9:.0f} GB, more than {MAX_PARQUET_BYTES / 1e9:.0f}; split the dataset"
        )
