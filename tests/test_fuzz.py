"""Thousands of damaged files and manifests: each is kept, or dropped with a reason; none hangs or ends the process."""

import csv
import faulthandler
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from c2r import InputError
from c2r.data.folders import read_source
from c2r.data.manifest import read_manifest
from c2r.data.video import UnusableVideo
from tests.commands import ENVIRONMENT, ROOT
from tests.videos import encode_video

OPTIONS = SimpleNamespace(height=32, width=48, num_frames=5, fps=8, cache_dir=None)
UNUSABLE = {"unreadable", "no video stream", "beyond the limits"}
REASONS = UNUSABLE | {"too short", "too few frames after resampling", "image"}
SECONDS_PER_INPUT = 10


def originals(folder):
    """Whole files of many formats."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 4, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    encode_video(folder / "a.mp4", frames, 8)
    encode_video(folder / "b.mkv", frames, 8)
    encode_video(folder / "c.webm", frames, 8, codec="libvpx-vp9")
    encode_video(folder / "d.avi", frames, 8, codec="mpeg4")
    encode_video(folder / "e.ts", frames, 8)
    encode_video(folder / "f.mov", frames, 8, codec="mjpeg", pix_fmt="yuvj420p")
    for name in ("g.png", "h.jpg", "i.gif", "j.webp"):
        Image.fromarray(frames[0]).save(folder / name)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(content, other, rng):
    """A damaged copy: the header more often than the rest."""
    content = bytearray(content)
    reach = min(len(content), rng.choice([32, 200, 1000, len(content)]))
    for _ in range(rng.choice([1, 2, 8])):
        place, kind = rng.randrange(reach), rng.randrange(6)
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
        else:
            del content[max(place, 1) :]
        reach = max(1, min(reach, len(content)))
    return bytes(content)


def watch_files(folder, count):
    """Read `count` damaged files as a dataset; prints each before it is read, for who finds this process dead."""
    rng = random.Random(0)
    (folder / "originals").mkdir(parents=True)
    whole = originals(folder / "originals")
    names = list(whole)
    data = folder / "data"
    data.mkdir()
    for i in range(count):
        name, other = rng.choice(names), rng.choice(names)
        suffix = Path(rng.choice([name, name, other])).suffix
        (data / f"{i}{suffix}").write_bytes(mutated(whole[name], whole[other], rng))
    files = sorted(data.iterdir())
    (data / "whole.mp4").write_bytes(whole["a.mp4"])
    with open(data / "metadata.csv", "w", newline="") as table:
        csv.writer(table).writerows([("file_name", "text"), *((file.name, "a") for file in files), ("whole.mp4", "a")])
    faulthandler.dump_traceback_later(SECONDS_PER_INPUT + count // 20, exit=True)
    manifest = read_manifest(data, "real", OPTIONS)
    kept = {clip.name for clip in manifest.clips}
    lost = {row.file: row.reason for row in manifest.dropped}
    assert set(lost.values()) <= REASONS, set(lost.values()) - REASONS
    assert len(kept) + len(lost) == count + 1
    whole_windows, failed = 0, set()
    for clip in manifest.clips:
        faulthandler.dump_traceback_later(SECONDS_PER_INPUT, exit=True)
        try:
            whole_windows += read_source(clip.source, clip, OPTIONS).shape == (5, 3, 32, 48)
        except UnusableVideo as error:
            failed.add(error.reason)
    assert failed <= UNUSABLE
    faulthandler.cancel_dump_traceback_later()
    print(f"kept {len(kept)}, dropped {len(lost)}, decoded {whole_windows} windows")


@pytest.mark.slow
def test_damaged_files_are_kept_or_dropped_with_a_reason(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_fuzz", str(tmp_path), "3000"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=200,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    assert "kept " in done.stdout


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_damaged_metadata_gives_clips_or_one_line(tmp_path, name):
    rng = random.Random(1)
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    for i in range(3):
        encode_video(tmp_path / f"{i}.mp4", frames, 8)
    whole = {
        "metadata.csv": "file_name,text\n" + "".join(f"{i}.mp4,a street\n" for i in range(3)),
        "metadata.jsonl": "".join(f'{{"file_name": "{i}.mp4", "text": "a street"}}\n' for i in range(3)),
    }[name].encode()
    read, lines = 0, []
    for _ in range(60):
        (tmp_path / name).write_bytes(mutated(whole, whole[::-1], rng))
        try:
            manifest = read_manifest(tmp_path, "real", OPTIONS)
        except InputError as error:
            lines.append(str(error))
        else:
            read += 1
            assert {clip.name for clip in manifest.clips} <= {"0.mp4", "1.mp4", "2.mp4"}
            assert len({clip.name for clip in manifest.clips}) + len(manifest.dropped) == manifest.row_count
    assert 0 < read < 60
    assert not any("\n" in line for line in lines)


if __name__ == "__main__":
    watch_files(Path(sys.argv[1]), int(sys.argv[2]))
