"""Small files whose tables declare millions of samples are refused before they are opened; pipes are never opened."""

import io
import os
import struct

import pytest

from c2r.data.drop_reasons import DropReason
from c2r.data.manifest import read_manifest
from c2r.data.mp4_tables import require_honest_tables
from c2r.data.video import UnusableVideo, probe, read_window
from tests.helpers.settings import clip_settings
from tests.helpers.videos import counter_frames, encode_video


def patched(path, box, offset, *numbers):
    """Overwrite 32-bit numbers at an offset from the start of a box's content."""
    content = bytearray(path.read_bytes())
    struct.pack_into(f">{len(numbers)}I", content, content.index(box) + 4 + offset, *numbers)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "renamed.mkv"])
@pytest.mark.parametrize(("box", "offset", "numbers"), [(b"stsz", 4, (1, 80_000_000)), (b"stts", 8, (80_000_000,))])
def test_tables_that_declare_more_than_the_file_holds_are_refused(tmp_path, name, box, offset, numbers):
    path = encode_video(tmp_path / ("a.mp4" if name == "renamed.mkv" else name), counter_frames(20))
    path = patched(path.rename(tmp_path / name), box, offset, *numbers)
    for read in (
        lambda: probe(path),
        lambda: probe(path, io.BytesIO(path.read_bytes())),
        lambda: read_window(path, 0, 1, 16, 48, 64),
    ):
        with pytest.raises(UnusableVideo, match=r"its tables declare 80,000,0\d\d samples or more, in") as error:
            read()
        assert error.value.reason == DropReason.BEYOND_LIMITS


def box(kind, content=b""):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def test_fragments_of_a_fragmented_file_are_bounded(tmp_path):
    def fragment(count):
        return box(b"ftyp", b"isom" * 4) + box(b"moof", box(b"traf", box(b"trun", struct.pack(">III", 0, count, 0))))

    require_honest_tables("a.mp4", io.BytesIO(fragment(20)))
    for content in (fragment(80_000_000), fragment(400) * 9):
        with pytest.raises(UnusableVideo, match="samples or more"):
            require_honest_tables("a.mp4", io.BytesIO(content))


@pytest.mark.parametrize("length", [0, 1, 4, 8, 2**31, 2**32 - 1])
def test_boxes_of_any_declared_length_are_read_once(length):
    content = box(b"ftyp", b"isom" * 4) + struct.pack(">I4s", length, b"moov") + box(b"trak", bytes(40)) * 3
    require_honest_tables("a.mp4", io.BytesIO(content))


def test_good_files_pass(tmp_path):
    for name, options in (("a.mp4", {}), ("a.mov", {"sound_seconds": 3})):
        assert probe(encode_video(tmp_path / name, counter_frames(60), **options)).frames_at(16) == 60


def test_pipes_and_folders_are_named_and_never_opened(tmp_path):
    """Opening the pipe, which has no writer, would block."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    encode_video(tmp_path / "a.mp4", counter_frames(20))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,a\npipe.mp4,a\nfolder.mp4,a\n")
    dropped = read_manifest(tmp_path, "real", clip_settings()).dropped
    assert [(row.reason, row.detail) for row in dropped] == [
        (DropReason.NOT_A_FILE, "pipe.mp4 is a pipe"),
        (DropReason.NOT_A_FILE, "folder.mp4 is a folder, and holds no numbered pictures"),
    ]
    for name, kind in (("pipe.mp4", "pipe"), ("folder.mp4", "folder"), ("/dev/zero", "device")):
        with pytest.raises(UnusableVideo, match=f"it is a {kind}"):
            probe(tmp_path / name)
        with pytest.raises(UnusableVideo, match=f"it is a {kind}"):
            read_window(tmp_path / name, 0, 1, 16, 48, 64)
