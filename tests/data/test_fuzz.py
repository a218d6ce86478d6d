"""Thousands of damaged files and metadata tables: each is kept, or dropped with a reason; none crashes or hangs.

A subprocess reads them and prints each name first, so that a crash can be traced to its input.
"""

import csv
import random
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from c2r import InputError
from c2r.data.drop_reasons import DropReason
from c2r.data.manifest import read_manifest
from c2r.data.video import UnusableVideo, probe, read_window
from tests.helpers.forks import fork
from tests.helpers.settings import clip_settings
from tests.helpers.videos import encode_video

SETTINGS = clip_settings()
(BUCKET,) = SETTINGS.buckets
UNUSABLE = {DropReason.UNREADABLE, DropReason.NO_VIDEO_STREAM, DropReason.BEYOND_LIMITS, DropReason.UNKNOWN_COLOURS}
UNUSABLE_WINDOW = {DropReason.DAMAGED, DropReason.FROZEN}
SECONDS_PER_INPUT = 10
#: Enough for the libraries, the decoders and one frame of the largest size, 8192x8192 pixels.
MAX_BYTES = 2 * 2**30


def originals(folder):
    """Write intact files of many formats into a new folder and return their contents by name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 4, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    encode_video(folder / "a.mp4", frames, 8)
    encode_video(folder / "b.mkv", frames, 8)
    encode_video(folder / "c.webm", frames, 8, codec="libvpx-vp9")
    encode_video(folder / "d.avi", frames, 8, codec="mpeg4")
    encode_video(folder / "e.ts", frames, 8)
    encode_video(folder / "f.mov", frames, 8, codec="mjpeg", pix_fmt="yuvj420p")
    for name in ("g.png", "h.jpg", "j.webp", "k.avif", "l.tiff"):
        Image.fromarray(frames[0]).save(folder / name)
    stills = [Image.fromarray(frame) for frame in frames]
    stills[0].save(folder / "i.gif", save_all=True, append_images=stills[1:], duration=125)
    stills[0].save(folder / "m.webp", save_all=True, append_images=stills[1:], duration=125)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def split_boxes(content):
    """Split an mp4 or mov into its top-level boxes, and any other content into quarters."""
    found, place = [], 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 4])
        if not 8 <= size <= len(content) - place or not content[place + 4 : place + 8].isalpha():
            return [content[i * len(content) // 4 : (i + 1) * len(content) // 4] for i in range(4)]
        found.append(content[place : place + size])
        place += size
    return found


def damaged_copy(content, other, rng):
    """Return a damaged copy; the header is damaged more often than the rest."""
    content = bytearray(content)
    reach = min(len(content), rng.choice([32, 200, 1000, len(content)]))
    for _ in range(rng.choice([1, 2, 8])):
        place, kind = rng.randrange(reach), rng.randrange(8)
        if kind == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            content[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
        elif kind == 2:
            del content[place : place + rng.randrange(1, 64)]
        elif kind == 3:
            content[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 4:
            content[:place] = other[:place]
        elif kind == 5:
            end = min(len(content), place + rng.randrange(1, 256))
            content[place:end] = bytes(end - place)
        elif kind == 6:
            parts = split_boxes(bytes(content))
            rng.shuffle(parts)
            content = bytearray(b"".join(parts))
        else:
            del content[max(place, 1) :]
        reach = max(1, min(reach, len(content)))
    return bytes(content)


def announce(name):
    """Print the next input's name and start its time limit.

    SIGALRM ends the process even while a decoder runs, where Python could not raise an exception.
    """
    print(name, flush=True)
    signal.alarm(SECONDS_PER_INPUT)


def read_files(folder, count):
    """Probe `count` damaged files and decode a window of those that are accepted; then read them as one dataset."""
    rng = random.Random(0)
    whole = originals(folder / "originals")
    names = list(whole)
    data = folder / "data"
    data.mkdir()
    outcomes, found = {}, []
    for i in range(count):
        name, other = rng.choice(names), rng.choice(names)
        path = data / f"{i}{Path(rng.choice([name, name, other])).suffix}"
        path.write_bytes(damaged_copy(whole[name], whole[other], rng))
        announce(path.name)
        try:
            info = probe(path)
            outcomes[path.name] = "decoded"
            num_frames = 1 if info.is_image else BUCKET.num_frames
            if info.frames_at(SETTINGS.fps) >= num_frames:
                read_window(path, 0, num_frames, SETTINGS.fps, BUCKET.height, BUCKET.width)
            else:
                outcomes[path.name] = "too short"
        except UnusableVideo as error:
            outcomes[path.name] = f"{outcomes.get(path.name, 'dropped')}, {error.reason}"
            found.append(error)
    assert {error.reason for error in found} <= UNUSABLE | UNUSABLE_WINDOW
    assert not [error for error in found if "\n" in str(error)]
    for outcome in sorted(set(outcomes.values())):
        print(f"{list(outcomes.values()).count(outcome)} {outcome}")
    dropped = {name for name, outcome in outcomes.items() if outcome.startswith("dropped")}
    assert count / 10 < len(dropped) < count * 9 / 10, "too few or too many files are damaged for this test"

    (data / "whole.mp4").write_bytes(whole["a.mp4"])
    with open(data / "metadata.csv", "w", newline="") as table:
        csv.writer(table).writerows([("file_name", "text"), ("whole.mp4", "a"), *((name, "a") for name in outcomes)])
    print("all as one dataset", flush=True)
    signal.alarm(60)
    manifest = read_manifest(data, "real", SETTINGS)
    lost = {row.file: row.reason for row in manifest.dropped}
    assert len({clip.name for clip in manifest.clips}) + len(lost) == count + 1
    assert {name for name, reason in lost.items() if reason in UNUSABLE} == dropped


def read_metadata_tables(folder, count):
    """Read `count` damaged metadata tables of each format."""
    rng = random.Random(1)
    whole = originals(folder / "originals")
    data = folder / "data"
    data.mkdir()
    names = {f"{i}.mp4" for i in range(3)}
    for name in names:
        (data / name).write_bytes(whole["a.mp4"])
    rows = {"file_name": sorted(names), "text": ["a street"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "metadata.parquet")
    tables = {
        "metadata.csv": b"file_name,text\n" + b"".join(b"%d.mp4,a street\n" % i for i in range(3)),
        "metadata.jsonl": b"".join(b'{"file_name": "%d.mp4", "text": "a street"}\n' % i for i in range(3)),
        "metadata.parquet": (folder / "metadata.parquet").read_bytes(),
    }
    total, lines = 0, []
    for table, content in tables.items():
        read = 0
        for i in range(count):
            damaged = damaged_copy(content, content[::-1], rng)
            (folder / "inputs").mkdir(exist_ok=True)
            (folder / "inputs" / f"{i} {table}").write_bytes(damaged)  # kept for inspection after a failure
            (data / table).write_bytes(damaged)
            announce(f"{i} {table}")
            try:
                manifest = read_manifest(data, "real", SETTINGS)
            except InputError as error:
                lines.append(str(error))
            else:
                read += 1
                kept = {clip.name for clip in manifest.clips}
                assert kept <= names
                assert len(kept) + len(manifest.dropped) == manifest.row_count
                assert all(row.reason for row in manifest.dropped)
        (data / table).unlink()
        print(f"{read} of {count} {table} were read")
        assert read < count
        total += read
    assert total
    assert not [line for line in lines if "\n" in line]


def run(reader, folder, count):
    """Run one of the readers above in a subprocess and return its output; a failure names the last input."""
    done = fork("-m", "tests.data.test_fuzz", reader, folder, count)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"ended with {done.returncode} at {last} in {folder}: {done.stderr[-3000:]}"
    return done.stdout


def test_damaged_files_are_kept_or_dropped_with_a_reason(tmp_path):
    assert " decoded\n" in run("read_files", tmp_path, 3000)


def test_damaged_metadata_gives_clips_or_an_error_of_one_line(tmp_path):
    assert run("read_metadata_tables", tmp_path, 100).count(" were read\n") == 3


if __name__ == "__main__":
    readers = {"read_files": read_files, "read_metadata_tables": read_metadata_tables}
    readers[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    signal.alarm(0)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert most < MAX_BYTES, f"{most / 2**30:.1f} GiB"
    print(f"{most / 2**30:.2f} GiB at most")
