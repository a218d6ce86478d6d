"""Captions of text files and tables, as other programs write them."""

import re

import pytest

from c2r import InputError
from c2r.preparation.captions import (
    Captions,
    TableRow,
    decode,
    find_table,
    match_table,
    read_table,
    read_text_files,
)
from c2r.preparation.sources import Source

TEXT = "Café at night, naïve “quotes”"


def source(name, is_sequence=False):
    return Source(name, name if is_sequence else name.rpartition(".")[0], is_sequence)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le", "utf-16-be"])
def test_text_of_any_common_encoding_is_read(encoding):
    text, remark = decode(TEXT.encode(encoding), "a.txt")
    assert text == TEXT
    assert (remark is not None) == (encoding in ("cp1252", "utf-16-le", "utf-16-be"))
    if encoding == "cp1252":
        assert remark == "a.txt: is not UTF-8, read as Windows-1252 (cp1252); check its accents in metadata.csv"


def test_text_of_no_known_encoding_is_refused():
    with pytest.raises(InputError, match=r"^a\.txt: is in no encoding that is known here; save it as UTF-8$"):
        decode(b"\x81\x8d", "a.txt")


def test_text_files_are_found_beside_their_videos(tmp_path):
    for name, text in {
        "a.txt": "a street\nat dusk \n",
        "b.mp4.txt": "rain",
        "shots/07.txt": "seven",
        "shots/08/notes.txt": "eight",
        "shots/09/a.txt": "one of two",
        "shots/09/b.txt": "two of two",
        "empty.txt": " \n",
        "take2.txt": "named by a pattern",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = [source("a.mp4"), source("b.mp4"), source("c.mp4"), source("empty.mp4")]
    sources += [source(f"shots/0{n}", True) for n in (7, 8, 9)] + [Source("take2_####.png", "take2", True)]
    (tmp_path / "shots/07").mkdir()
    captions = Captions()
    read_text_files(str(tmp_path), sources, captions)
    assert captions.texts == {
        "a.mp4": "a street at dusk",
        "b.mp4": "rain",
        "shots/07": "seven",
        "shots/08": "eight",
        "take2_####.png": "named by a pattern",
    }


def test_no_text_is_read_through_a_link_that_leads_out(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").symlink_to(tmp_path / "secret.txt")
    captions = Captions()
    read_text_files(str(tmp_path / "data"), [source("a.mp4")], captions)
    assert captions.texts == {}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_tables_of_spreadsheets_are_read(separator, encoding, tmp_path):
    lines = ["id,Video Path,Caption", f'1,a.mp4,"a street{separator} ""Open"""', "2,b.mp4,Straße", ",,"]
    content = "\r\n".join(line.replace(",", separator) if line[0] != "1" else line for line in lines) + "\r\n"
    content = content.replace("1,a.mp4,", f"1{separator}a.mp4{separator}")
    (tmp_path / "t.csv").write_bytes(content.encode(encoding))
    rows, remark = read_table(tmp_path / "t.csv", "t.csv")
    caption = f'a street{separator.strip()} "Open"'  # captions have one line, and no tabs
    assert rows == [TableRow("a.mp4", caption), TableRow("b.mp4", "Straße")]
    assert (remark is not None) == (encoding == "cp1252")


def test_a_table_may_give_parts_controls_and_rates(tmp_path):
    (tmp_path / "t.csv").write_text("file,prompt,coarse,start_time,end_time,fps\nf.mp4,rain,c.mp4,1.5,3,24\n")
    assert read_table(tmp_path / "t.csv", "t.csv")[0] == [TableRow("f.mp4", "rain", "c.mp4", "1.5", "3", "24")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "t.csv: its first line ('') names no columns of files and captions; write file_name,text there"),
        ("a.mp4,a street\n", "t.csv: its first line ('a.mp4,a street') names no columns"),
        ("file,text\na.mp4,rain, at night\n", "t.csv: line 2 has 3 fields, the first line 2; put captions"),
        ('file,text\na.mp4,"rain\nb.mp4,fog\n', "t.csv: line 2 cannot be read (unexpected end of data)"),
        ("file,text,start\na.mp4,rain,soon\n", "t.csv: line 2 has start 'soon'; give a number such as 12.5"),
        ("file,text,fps\na.mp4,rain,0\n", "t.csv: line 2 has fps '0'; give a number such as 12.5"),
    ],
)
def test_a_bad_table_is_answered_in_one_line(content, message, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        read_table(tmp_path / "t.csv", "t.csv")
    assert "\n" not in str(error.value)


def test_rows_find_their_files_by_path_stem_or_end_of_path():
    names = ["day/a.mp4", "night/a.mp4", "night/b.mp4", "Ä.mov"]
    captions = Captions()
    given = ["day/a.mp4", "night/a", "C:\\videos\\night\\b.mp4", "ä.MOV", "a.mp4", "z.mp4"]
    match_table([TableRow(name, name) for name in given], "t.csv", map(source, names), captions)
    assert {name: row.text for name, (row,) in captions.rows.items()} == dict(zip(names, given))
    assert captions.remarks == [
        "t.csv: no file of 1 rows was found: z.mp4",
        "t.csv: several files fit the name of 1 rows: a.mp4",
    ]


def test_the_rate_of_a_row_is_that_of_both_its_sequences():
    captions = Captions()
    rows = [TableRow("f", "rain", "c", fps="24"), TableRow("g", "rain")]
    match_table(rows, "t.csv", [source(name, True) for name in "cfg"], captions)
    assert captions.rates == {"f": 24, "c": 24}


def test_one_table_of_the_folder_is_used(tmp_path):
    (tmp_path / "sizes.csv").write_text("name,bytes\n")
    (tmp_path / "captions.tsv").write_text("file\ttext\n")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    captions = Captions()
    own = tmp_path / "metadata.csv"
    assert find_table(str(tmp_path), own, captions) == tmp_path / "captions.tsv"
    assert [remark[:25] for remark in captions.remarks] == ["sizes.csv: its first line"]
    with pytest.raises(
        InputError, match=r"2 tables of captions \(captions.tsv, metadata.csv\); name one by --captions"
    ):
        find_table(str(tmp_path), None, captions)
