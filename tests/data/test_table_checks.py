import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2r import InputError
from c2r.data.folders import open_folder
from c2r.data.metadata import find_metadata, rows_of
from c2r.data.table_checks import MAX_DEPTH, MAX_FIELD
from tests.helpers.settings import clip_settings


def read(folder):
    """Return the rows of a dataset's metadata, as (file_name, text)."""
    ((_, table),) = find_metadata(open_folder(folder, clip_settings()), "real", folder / ".c2r_cache")
    return [row[:2] for row in rows_of(table, str(folder))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("sep", [",", ";", "\t", "|"])
def test_separators_and_byte_order_marks_are_recognised(sep, encoding, tmp_path):
    lines = [sep.join(fields) for fields in (("file_name", "text"), ("a.mp4", "eine Straße"), ("b.mp4", "東京"))]
    (tmp_path / "metadata.csv").write_text("\r\n".join(lines), encoding=encoding)
    assert read(tmp_path) == [("a.mp4", "eine Straße"), ("b.mp4", "東京")]


def test_captions_may_have_quotes_commas_and_several_lines(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\na.mp4,"a sign says ""Open"", in red"\n'
        'b.mp4,"a street,\nwith rain, at night"\nc.mp4,5" pipes\n'
    )
    assert read(tmp_path) == [
        ("a.mp4", 'a sign says "Open", in red'),
        ("b.mp4", "a street,\nwith rain, at night"),
        ("c.mp4", '5" pipes'),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a.mp4,x\nb.mp4,"Open says a sign\nc.mp4,people\nd.mp4,a sign says Closed"\n', "lines 3 to 5 are one row"),
        ('a.mp4,x\nb.mp4,"Open" says a sign\n', "line 3 has a quote that is not closed or not doubled"),
        ('a.mp4,x\nb.mp4,"Open says a sign\nc.mp4,people\n', "line 3 has a quote that is not closed"),
        ("a.mp4,x\nb.mp4,a street, rain\n", "line 3 has 3 fields, the header 2; put captions with a comma in"),
        (f"a.mp4,{'x' * (MAX_FIELD + 1)}\n", "line 2 has .*field larger than field limit"),
    ],
)
def test_a_csv_that_would_be_read_wrongly_is_refused(content, message, tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,eine Straße\n", encoding="cp1252")
    with pytest.raises(InputError, match=r"cannot be read as UTF-8 \(.* at byte \d+\); save it as UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 200_000])
def test_deep_json_is_refused_before_it_is_parsed(depth, tmp_path):
    row = json.dumps({"file_name": "a.mp4", "text": "x", "more": None}).replace("null", "[" * depth + "]" * depth)
    (tmp_path / "metadata.jsonl").write_text(row + "\n")
    with pytest.raises(InputError, match="line 1 is nested more than 100 deep"):
        read(tmp_path)


def test_brackets_in_a_caption_are_no_depth(tmp_path):
    text = "[red] {blue} " * MAX_DEPTH
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": text}) + "\n")
    assert read(tmp_path) == [("a.mp4", text)]


def test_a_long_line_of_json_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "x" * MAX_FIELD}) + "\n")
    with pytest.raises(InputError, match="line 1 has more than 1000000 bytes"):
        read(tmp_path)


def test_a_parquet_file_of_too_many_rows_or_bytes_is_refused(tmp_path, monkeypatch):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int8()), ["a.mp4"])
    pq.write_table(pa.table({"file_name": column, "text": column}), tmp_path / "metadata.parquet")
    monkeypatch.setattr("c2r.data.table_checks.MAX_PARQUET_BYTES", 100)
    with pytest.raises(InputError, match=r"metadata\.parquet: has 0 GB, more than 0; split the dataset"):
        read(tmp_path)
    monkeypatch.setattr("c2r.data.table_checks.MAX_ROWS", 1000)
    with pytest.raises(InputError, match="has 2000 rows, more than 1000; split the dataset"):
        read(tmp_path)
