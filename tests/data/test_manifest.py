"""Dataset folders, good and bad: kept clips, reasons of dropped rows, held-out files."""

import csv
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from c2r import InputError
from c2r.data.buckets import Bucket
from c2r.data.drop_reasons import DropReason
from c2r.data.failures import Failure, Window, note_failure
from c2r.data.folders import read_frames
from c2r.data.manifest import is_held_out, read_manifest
from c2r.data.video_writer import write_video
from tests.helpers.commands import ROOT
from tests.helpers.settings import clip_settings
from tests.helpers.videos import counter_frames, encode_video, read_counter

SETTINGS = clip_settings(buckets=(Bucket(9, 48, 64),), fps=16)


def write_metadata(folder, rows, name="metadata.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if name.endswith("csv"):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith("jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(folder / name)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The content of an mp4 with 20 frames, which give two windows of 9."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path, counter_frames(20), 16)
    return path.read_bytes()


def add(folder, video, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video)


def test_every_drop_reason_is_documented():
    documented = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert [reason.value for reason in DropReason if f"`{reason}`" not in documented] == []


def reasons(manifest):
    return {row.file: row.reason for row in manifest.dropped}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize(
    ("metadata", "videos", "prefix"),
    [
        (".", ".", ""),
        ("train", "train", ""),
        (".", "train", ""),
        (".", "train", "train/"),
        (".", "sub dir", "sub dir/"),
    ],
)
def test_every_layout_and_format_is_read(tmp_path, video, name, metadata, videos, prefix):
    add(tmp_path / videos, video, "a.mp4", "b.mp4")
    rows = [{"file_name": f"{prefix}a.mp4", "text": "a street"}, {"file_name": f"{prefix}b.mp4", "text": "a"}]
    write_metadata(tmp_path / metadata, rows, name)
    manifest = read_manifest(tmp_path, "real", SETTINGS)
    where = "" if videos == "." else f"{videos}/"
    assert [(c.name, c.window, c.start, c.text) for c in manifest.clips] == [
        (f"{where}a.mp4", 0, 0.0, "a street"),
        (f"{where}a.mp4", 1, 9 / 16, "a street"),
        (f"{where}b.mp4", 0, 0.0, "a"),
        (f"{where}b.mp4", 1, 9 / 16, "a"),
    ]
    assert manifest.dropped == []
    assert all(os.path.samefile(c.target_file.path, tmp_path / c.name) for c in manifest.clips)
    assert all(c.control_file == c.target_file for c in manifest.clips)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_captions_stay_text(tmp_path, video, name):
    texts = ["NA", "007", "null", "1e5", "ça, «rue»", 'said "hi"', "two\nlines", " padded ", "True"]
    names = [f"{n}.mp4" for n in range(len(texts))]
    add(tmp_path, video, *names)
    write_metadata(tmp_path, [{"file_name": n, "text": t, "extra": 1} for n, t in zip(names, texts)], name)
    assert [c.text for c in read_manifest(tmp_path, "real", SETTINGS).clips if c.window == 0] == texts


def test_a_byte_order_mark_is_ignored_and_numbers_stay_text(tmp_path, video):
    add(tmp_path, video, "007", "8")
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,text\n007,12\n8,9\n", encoding="utf-8")
    assert [(c.name, c.text) for c in read_manifest(tmp_path, "real", SETTINGS).clips if not c.window] == [
        ("007", "12"),
        ("8", "9"),
    ]


@pytest.mark.parametrize(
    ("written", "differs_in"),
    [
        ("sub\\Stra\u00dfe.mp4", "back-slashes"),
        ("sub/Stra\u00dfe.mp4 ", "spaces at its ends"),
        ("sub/stra\u00dfe.MP4", "upper and lower case"),
        ("sub/Cafe\u0301.mp4", "the way in which accents are stored"),
    ],
)
@pytest.mark.parametrize("base", ["", "train"])
def test_a_missing_file_names_one_that_is_spelled_otherwise(base, written, differs_in, tmp_path, video):
    for name in ("sub/Stra\u00dfe.mp4", "sub/Caf\u00e9.mp4"):
        add(tmp_path / base, video, name)
    write_metadata(tmp_path / base, [{"file_name": n, "text": "a"} for n in ("sub/Caf\u00e9.mp4", written, "x.mp4")])
    missing, other = read_manifest(tmp_path, "real", SETTINGS).dropped
    assert f"{written}; there is 'sub/" in missing.detail
    assert f"its name differs in {differs_in}; correct the row" in missing.detail
    assert other.detail == "x.mp4"


def test_other_ways_to_name_an_image_sequence_are_answered(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a_0001.png")
    write_metadata(tmp_path, [{"file_name": name, "text": "a"} for name in ("a_*.png", "a_0001.png")])
    with pytest.raises(InputError, match=r"the first: a_\*\.png; name an image sequence by its folder, or as a_####"):
        read_manifest(tmp_path, "real", SETTINGS)
    write_metadata(tmp_path, [{"file_name": "a_0001.png", "text": "a"}])
    with pytest.raises(InputError, match=r"the first: a_0001\.png: no bucket has one frame; name an image sequence"):
        read_manifest(tmp_path, "real", SETTINGS)


def test_rows_of_parts_give_windows_within_them(tmp_path):
    """48 numbered frames at 16 fps, cut at frames 20 and 21: no window holds frames of two parts."""
    encode_video(tmp_path / "a.mp4", counter_frames(48))
    rows = [("", 1.25), (1.25, 1.3125), ("1.3125", ""), (2.0, 2.5625), (1.0, 0.5), ("x", "")]
    write_metadata(
        tmp_path, [{"file_name": "a.mp4", "text": f"part {i}", "start": a, "end": b} for i, (a, b) in enumerate(rows)]
    )
    manifest = read_manifest(tmp_path, "real", SETTINGS)
    frames = {}
    for clip in manifest.clips:
        window = read_frames(clip.target_file, clip, SETTINGS)
        frames.setdefault(clip.text, []).append(read_counter(window))
    expected = {"part 0": [0, 9], "part 2": [21, 30, 39], "part 3": [32]}  # first frames; counted modulo 27
    assert frames == {
        part: [[frame % 27 for frame in range(first, first + 9)] for first in firsts]
        for part, firsts in expected.items()
    }
    assert [clip.window for clip in manifest.clips] == [*range(6)]  # numbered within the file, not the part
    assert manifest.clips.file_count == 1
    assert [(row.reason, row.detail) for row in manifest.dropped] == [
        ("no part of the file", "start '1.0', end '0.5': give seconds, the end after the start"),
        ("no part of the file", "start 'x', end '': give seconds, the end after the start"),
        ("too short", "1 frames at 16 fps, 3.00 s; a clip takes 9"),
    ]


def test_a_damaged_part_leaves_the_numbers_of_later_windows(tmp_path):
    encode_video(tmp_path / "a.mp4", counter_frames(48))
    rows = [("", 1.25), (1.25, ""), (2.0, "")]
    write_metadata(
        tmp_path, [{"file_name": "a.mp4", "text": f"part {i}", "start": a, "end": b} for i, (a, b) in enumerate(rows)]
    )
    before = read_manifest(tmp_path, "real", SETTINGS)
    for clip in before.clips:
        if clip.text == "part 0":
            window = Window(clip.start, 9, 16)
            note_failure(before.cache_dir, Failure(clip.target_file, DropReason.DAMAGED, "a.mp4: bad", window=window))
    after = read_manifest(tmp_path, "real", SETTINGS)
    assert [(row.file, row.reason) for row in after.dropped] == [("a.mp4", DropReason.DAMAGED)]
    assert list(after.clips) == [clip for clip in before.clips if clip.text != "part 0"]


def test_files_with_fewer_frames_per_second_than_clips_are_named(tmp_path, capsys):
    for name, fps in {"slow": 8, "slower": 6, "equal": 16, "rounded": 15.985, "fast": 30}.items():
        encode_video(tmp_path / f"{name}.mp4", counter_frames(25, 48, 64), fps=fps)
    Image.new("RGB", (64, 48)).save(tmp_path / "picture.png")
    names = ("slow", "slower", "equal", "rounded", "fast")
    write_metadata(
        tmp_path, [{"file_name": name, "text": "a"} for name in (*(f"{n}.mp4" for n in names), "picture.png")]
    )
    settings = replace(SETTINGS, buckets=(*SETTINGS.buckets, Bucket(1, 48, 64)))
    read_manifest(tmp_path, "real", settings).report()
    line = "2 of 6 files have fewer frames per second than --fps 16, slower.mp4 the fewest, 6: frames of their clips"
    assert line in capsys.readouterr().out
    for quiet in (replace(settings, fps=6.0), replace(settings, buckets=(Bucket(1, 48, 64),))):
        read_manifest(tmp_path, "real", quiet).report()
        assert "fewer frames per second" not in capsys.readouterr().out


def test_files_that_lose_much_by_cropping_are_named(tmp_path, capsys):
    encode_video(tmp_path / "wide.mp4", counter_frames(9, 48, 64))
    encode_video(tmp_path / "tall.mp4", counter_frames(9, 128, 64))
    write_metadata(tmp_path, [{"file_name": f"{n}.mp4", "text": "a"} for n in ("wide", "tall")])
    manifest = read_manifest(tmp_path, "real", SETTINGS)
    assert manifest.cropped.tolist() == [0, pytest.approx(1 - (64 / 128) / (64 / 48))]
    manifest.report()
    printed = capsys.readouterr().out
    assert "1 of 2 files lose more than 25% of their picture by cropping, tall.mp4 the most, 62% in 9x48x64" in printed
    assert "for this file 9x80x32" in printed
    with open(manifest.write(), newline="") as file:
        assert [row["cropped"] for row in csv.DictReader(file)] == ["0.00", "0.62"]
    read_manifest(tmp_path, "real", clip_settings(buckets=(*SETTINGS.buckets, Bucket(9, 80, 32)), fps=16)).report()
    assert "cropping" not in capsys.readouterr().out


def test_edited_metadata_is_read_again_and_home_is_not_written(tmp_path, video, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    add(tmp_path, video, "a.mp4", "b.mp4")
    for text in ("first", "other"):
        (tmp_path / "metadata.csv").write_text(f"file_name,text\na.mp4,{text}\n")
        assert {c.text for c in read_manifest(tmp_path, "real", SETTINGS).clips} == {text}


def test_no_row_is_dropped_silently(tmp_path, video, capsys):
    data = tmp_path / "data"
    add(data, video, "good.mp4", "twice.mp4")
    add(tmp_path, video, "outside.mp4")
    encode_video(data / "short.mp4", counter_frames(8))
    (data / "text.mp4").write_text("no video")
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 64, 3), np.uint8)
    write_video(data / "cut.mp4", noise, 16)
    (data / "cut.mp4").write_bytes((data / "cut.mp4").read_bytes()[:-50_000])
    Image.fromarray(noise[0]).save(data / "image.png")
    (data / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    names = ["good.mp4", "twice.mp4", "twice.mp4", "short.mp4", "text.mp4", "cut.mp4", "image.png", "link.mp4"]
    names += ["../outside.mp4", str(tmp_path / "outside.mp4"), "gone.mp4", "", "sub/../good.mp4"]
    add(data, video, "no caption.mp4")
    names += ["no caption.mp4"]
    write_metadata(data, [{"file_name": n, "text": " " if n == "no caption.mp4" else "a"} for n in names])
    manifest = read_manifest(data, "real", SETTINGS)
    assert [c.name for c in manifest.clips if c.window == 0] == ["good.mp4", "twice.mp4"]
    assert reasons(manifest) == {
        "twice.mp4": "duplicate row",
        "sub/../good.mp4": "duplicate row",
        "no caption.mp4": "empty caption",
        "short.mp4": "too short",
        "text.mp4": "unreadable",
        "cut.mp4": "unreadable",
        "image.png": "image",
        "link.mp4": "path outside the folder",
        "../outside.mp4": "path outside the folder",
        str(tmp_path / "outside.mp4"): "path outside the folder",
        "gone.mp4": "missing file",
        "": "missing file",
    }
    assert len(manifest.dropped) + 2 == len(names)
    manifest.report()
    printed = capsys.readouterr().out
    assert "kept 4 clips of 2 files" in printed
    assert "dropped 12 rows: 3 path outside the folder, 2 duplicate row, 2 missing file, 2 unreadable, 1 " in printed
    (table,) = (data / ".c2r_cache").glob("manifest-real-data-*.csv")
    with open(table, newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 4 + 12
    assert {row["use"] for row in listed} == {"train", "held out", "dropped"}
    assert any(row["file_name"] == "cut.mp4" and "cut off" in row["reason"] for row in listed)


def test_images_are_clips_in_a_bucket_of_one_frame(tmp_path, video):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "b.jpg")
    add(tmp_path, video, "c.mp4")
    write_metadata(tmp_path, [{"file_name": n, "text": "a"} for n in ("a.png", "b.jpg", "c.mp4")])
    settings = replace(SETTINGS, buckets=(Bucket(1, 48, 64),))
    names = [c.name for c in read_manifest(tmp_path, "real", settings).clips]
    assert names == ["a.png", "b.jpg"] + ["c.mp4"] * 20


def test_the_number_of_windows_follows_the_frame_rate(tmp_path):
    write_video(tmp_path / "a.mp4", counter_frames(25), 24)
    write_metadata(tmp_path, [{"file_name": "a.mp4", "text": "a"}])
    for fps, windows in ((24, 2), (16, 1), (48, 5), (8, 1)):
        settings = replace(SETTINGS, fps=fps)
        assert len(read_manifest(tmp_path, "real", settings).clips) == windows
    with pytest.raises(InputError, match=r"none of its 1 rows.*1 too few frames after resampling"):
        read_manifest(tmp_path, "real", replace(SETTINGS, fps=4))


def test_cg_pairs_that_disagree_are_dropped(tmp_path, video):
    add(tmp_path, video, "fine.mp4", "coarse.mp4")
    half = counter_frames(20)[:, ::2, ::2]
    encode_video(tmp_path / "half_size.webm", half, codec="libvpx-vp9")
    write_video(tmp_path / "longer.mp4", counter_frames(24), 16)
    write_video(tmp_path / "one_more.mp4", counter_frames(21), 16)
    write_video(tmp_path / "faster.mp4", counter_frames(30), 24)
    write_video(tmp_path / "ntsc.mp4", counter_frames(20), 16 * 1000 / 1001)
    write_video(tmp_path / "wide.mp4", counter_frames(20, 48, 72), 16)
    encode_video(tmp_path / "turned.mp4", counter_frames(20, 64, 48), rotation=90)
    encode_video(tmp_path / "sideways.mp4", counter_frames(20), rotation=90)
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    controls = {
        "coarse.mp4": None,
        "half_size.webm": None,
        "one_more.mp4": None,
        "ntsc.mp4": None,
        "turned.mp4": None,
        "longer.mp4": "pair differs in length",
        "faster.mp4": "pair differs in rate",
        "wide.mp4": "pair differs in aspect",
        "sideways.mp4": "pair differs in aspect",
        "image.png": "pair of an image and a video",
        "gone.mp4": "missing file",
        "": "missing file",
        "../coarse.mp4": "missing file",
    }
    for control, reason in controls.items():
        pairs = [("a", "coarse.mp4"), ("another caption", control)]
        rows = [{"file_name": "fine.mp4", "control_name": c, "text": text} for text, c in pairs]
        write_metadata(tmp_path, rows)
        manifest = read_manifest(tmp_path, "cg", SETTINGS)
        assert [row.reason for row in manifest.dropped] == ([reason] if reason else []), control
        assert [c.control_name for c in manifest.clips if c.window == 1] == ["coarse.mp4"] + [control] * (not reason)
        # Real rows are kept: the coarse version serves validation only, and the video is its own control.
        real = read_manifest(tmp_path, "real", SETTINGS)
        assert real.dropped == []
        assert all(c.control_file == c.target_file and c.name == "fine.mp4" for c in real.clips)
        assert [c.coarse_file is not None for c in real.clips if c.window == 1] == [True, not reason]
        # A real row with an empty name has no coarse version, so none is missing.
        assert [row.reason for row in real.without_coarse] == ([reason] if reason and control else []), control


def test_real_rows_kept_without_their_coarse_version_are_reported(tmp_path, video, capsys):
    add(tmp_path, video, "a.mp4", "b.mp4", "coarse.mp4")
    write_video(tmp_path / "longer.mp4", counter_frames(24), 16)
    rows = zip(("a.mp4", "b.mp4", "coarse.mp4", "gone.mp4"), ("coarse.mp4", "longer.mp4", "", "coarse.mp4"))
    write_metadata(tmp_path, [{"file_name": name, "control_name": coarse, "text": "a"} for name, coarse in rows])
    manifest = read_manifest(tmp_path, "real", SETTINGS)
    assert [c.control_name for c in manifest.clips if c.window == 0] == ["coarse.mp4", None, None]
    assert [row.file for row in manifest.dropped] == ["gone.mp4"]
    manifest.report()
    assert "kept 1 rows without their coarse version: 1 pair differs in length" in capsys.readouterr().out
    (table,) = manifest.cache_dir.glob("manifest-real-*.csv")
    assert 'b.mp4,,,,without coarse version,"pair differs in length: 1.25 s, ' in table.read_text()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, r"no such dataset folder; check"),
        (lambda d: d.touch(), r"a file, not a dataset; give the folder"),
        (lambda d: d.mkdir() or (d / "metadata.csv").touch(), r"metadata\.csv: is empty; write a header"),
        (
            lambda d: d.mkdir() or (d / "metadata.csv").write_text("file_name,text\na.mp4,x\nb.mp4,y, z\n"),
            r"metadata\.csv: line 3 has 3 fields, the header 2; put captions with a comma in double quotes",
        ),
        (lambda d: d.mkdir(), r"has no metadata\.csv.*; add"),
        (
            lambda d: write_metadata(d, [{"file": "a.mp4", "text": "a"}]),
            r"csv: has no column file_name.*file, ",
        ),
        (lambda d: write_metadata(d, [{"file_name": "a.mp4"}]), r"metadata\.csv: has no column text.*; add"),
        (lambda d: write_metadata(d, [{"file_name": "a.mp4", "text": "a"}]), r"none of its 1 rows.*1 missing file"),
        (lambda d: d.mkdir() or (d / "metadata.csv").write_text("file_name,text\n"), r"metadata\.csv: has no rows"),
        (lambda d: d.mkdir() or (d / "metadata.csv").write_text("a,b\n1,2,3\n4\n5,6,7,8\n"), r"metadata\.csv: "),
        (
            lambda d: d.mkdir() or (d / "metadata.csv").write_text("file_name,text\na.mp4,a street, rain\n"),
            r"metadata\.csv: line 2 has 3 fields, the header 2; put captions with a comma in double quotes",
        ),
        (lambda d: d.mkdir() or (d / "metadata.csv").write_bytes(b"file_name,text\n\xff\xfe,b\n"), r"csv: cannot be"),
        (lambda d: d.mkdir() or (d / "metadata.jsonl").write_text("{'file_name': 1}\n"), r"jsonl: cannot be read"),
        (lambda d: d.mkdir() or (d / "metadata.parquet").write_text("hi"), r"parquet: cannot be read"),
    ],
)
def test_bad_folders_raise_an_error_of_one_line(tmp_path, prepare, message, capfd):
    prepare(tmp_path / "data")
    with pytest.raises(InputError, match=message) as error:
        read_manifest(tmp_path / "data", "real", SETTINGS)
    assert str(tmp_path / "data") in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_missing_controls_two_tables_and_a_bad_cache_are_named(tmp_path, video):
    add(tmp_path, video, "a.mp4")
    write_metadata(tmp_path, [{"file_name": "a.mp4", "text": "a"}])
    with pytest.raises(InputError, match=r"no column control_name.*coarse"):
        read_manifest(tmp_path, "cg", SETTINGS)
    write_metadata(tmp_path, [{"file_name": "a.mp4", "text": "a"}], "metadata.jsonl")
    with pytest.raises(InputError, match=r"metadata\.csv and metadata\.jsonl; keep one"):
        read_manifest(tmp_path, "real", SETTINGS)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "no_folder").write_text("")
    with pytest.raises(InputError, match=r"no_folder: cannot be written .*; make room, or give a writable --cache"):
        read_manifest(tmp_path, "real", replace(SETTINGS, cache_dir=tmp_path / "no_folder"))


def test_the_list_is_written_even_if_no_row_can_be_used(tmp_path, video):
    """Datasets that share a cache have separate lists."""
    shared = replace(SETTINGS, cache_dir=tmp_path / "cache")
    lists = set()
    for folder in (tmp_path / "a/train", tmp_path / "b/train"):
        write_metadata(folder, [{"file_name": "gone.mp4", "text": folder.parent.name}])
        with pytest.raises(InputError, match="none of its 1 rows can be used") as error:
            read_manifest(folder, "real", shared)
        lists.add(str(error.value).partition("list in ")[2].partition(";")[0])
    assert len(lists) == 2
    assert all("gone.mp4,,,,dropped,missing file: gone.mp4" in Path(path).read_text() for path in lists)


def test_other_files_do_not_change_which_files_are_held_out(tmp_path, video):
    names = [f"{n}.mp4" for n in range(40)]
    add(tmp_path, video, *names)
    write_metadata(tmp_path, [{"file_name": n, "text": "a"} for n in names])
    manifest = read_manifest(tmp_path, "real", SETTINGS)
    held_out = {c.name for c in manifest.held_out}
    assert held_out == {n for n in names if is_held_out(n)}
    assert 1 <= len(held_out) <= 8
    assert held_out.isdisjoint(c.name for c in manifest.train)
    assert len(manifest.held_out) == 2 * len(held_out)  # both windows
    # A file stays on its side if the rows are reordered and others are removed.
    write_metadata(tmp_path, [{"file_name": n, "text": "a"} for n in names[::-1][10:]])
    again = read_manifest(tmp_path, "real", SETTINGS)
    assert {c.name for c in again.held_out} == held_out & set(names[::-1][10:])
    assert manifest.fingerprint != again.fingerprint


def test_of_two_files_one_is_held_out(tmp_path, video):
    for a, b in (("a.mp4", "b.mp4"), ("x1.mp4", "x7.mp4")):
        folder = tmp_path / a
        add(folder, video, a, b)
        write_metadata(folder, [{"file_name": n, "text": "a"} for n in (a, b)])
        manifest = read_manifest(folder, "real", SETTINGS)
        assert len(manifest.held_out) == len(manifest.train) == 2
    write_metadata(folder, [{"file_name": a, "text": "a"}])
    assert read_manifest(folder, "real", SETTINGS).held_out.file_count == 0


@given(st.sets(st.text(min_size=1), min_size=2, max_size=30), st.floats(0, 1))
def test_held_out_names_grow_with_the_fraction_from_none_to_all(names, fraction):
    for name in names:
        assert not is_held_out(name, 0)
        assert is_held_out(name, 1)
        assert is_held_out(name, fraction) <= is_held_out(name, min(1, fraction + 0.1))


def test_held_out_names_are_those_of_earlier_versions():
    # With another hash, a resumed run would train on clips that were held out before.
    assert [n for n in range(100) if is_held_out(f"{n}.mp4")] == [7, 8, 70, 71, 82]


@pytest.mark.parametrize("own_metadata", [True, False])
def test_a_validation_folder_replaces_the_hash(tmp_path, video, own_metadata):
    add(tmp_path, video, "train/a.mp4", "train/b.mp4", "validation/c.mp4")
    if own_metadata:
        write_metadata(tmp_path / "train", [{"file_name": n, "text": "a"} for n in ("a.mp4", "b.mp4")])
        write_metadata(tmp_path / "validation", [{"file_name": "c.mp4", "text": "a"}])
    else:
        rows = [{"file_name": n, "text": "a"} for n in ("train/a.mp4", "train/b.mp4", "validation/c.mp4")]
        write_metadata(tmp_path, rows)
    manifest = read_manifest(tmp_path, "real", SETTINGS)
    assert {c.name for c in manifest.held_out} == {"validation/c.mp4"}
    assert {c.name for c in manifest.train} == {"train/a.mp4", "train/b.mp4"}
    (tmp_path / "validation/c.mp4").unlink()
    with pytest.raises(InputError, match="validation/ gives no usable clip"):
        read_manifest(tmp_path, "real", SETTINGS)


def test_files_are_probed_again_only_after_a_change(tmp_path, video, monkeypatch):
    add(tmp_path, video, "a.mp4", "b.mp4")
    write_metadata(tmp_path, [{"file_name": n, "text": "a"} for n in ("a.mp4", "b.mp4")])
    first = read_manifest(tmp_path, "real", SETTINGS)
    monkeypatch.setattr("c2r.data.folders.probe", None)  # calling it would raise an error
    assert read_manifest(tmp_path, "real", SETTINGS).fingerprint == first.fingerprint
    monkeypatch.undo()
    time.sleep(0.01)
    write_video(tmp_path / "a.mp4", counter_frames(9), 16)
    second = read_manifest(tmp_path, "real", SETTINGS)
    assert [c.name for c in second.clips] == ["a.mp4", "b.mp4", "b.mp4"]
    assert second.fingerprint != first.fingerprint
    (tmp_path / ".c2r_cache/probes.safetensors").write_text('{"trunca')
    assert read_manifest(tmp_path, "real", SETTINGS).fingerprint == second.fingerprint


@pytest.mark.parametrize("domain", ["real", "cg"])
def test_a_replaced_coarse_file_changes_the_fingerprint(tmp_path, video, domain):
    add(tmp_path, video, "a.mp4", "b.mp4", "coarse.mp4")
    write_metadata(
        tmp_path, [{"file_name": name, "text": "a", "control_name": "coarse.mp4"} for name in ("a.mp4", "b.mp4")]
    )
    before = read_manifest(tmp_path, domain, SETTINGS)
    os.utime(tmp_path / "coarse.mp4", (1e9, 1e9))
    after = read_manifest(tmp_path, domain, SETTINGS)
    assert len(after.clips) == len(before.clips) == 4
    assert after.fingerprint != before.fingerprint
