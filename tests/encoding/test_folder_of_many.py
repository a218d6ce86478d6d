"""A folder as users bring it: 200 rows, 40 of them broken in 12 ways; encoded by one process, by two, and killed."""

import csv
import os
import random
import re
import subprocess

import av
import numpy as np
import pytest
from PIL import Image

from c2r.data.video_writer import write_video
from tests.helpers.commands import ENVIRONMENT, ROOT, succeed
from tests.helpers.forks import fork, forked_twice, statuses, warm_python
from tests.helpers.videos import counter_frames, encode_video

SIZE = ["--buckets", "5x32x48", "5x48x32", "1x32x48", "--fps=8", "--dataloader_num_workers=1"]
#: Number of rows dropped for each reason.
BROKEN = {
    "unreadable": 15,  # 4 text files, 4 cut off, 4 damaged in the middle, 3 playlists
    "no video stream": 4,
    "too short": 4,
    "too few frames after resampling": 3,
    "missing file": 3,
    "empty caption": 3,
    "path outside the folder": 3,
    "duplicate row": 3,
    "beyond the limits": 2,
}


def write_sound(path):
    """Write a file that holds only sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        for first in range(0, 48000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48000, first
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_huge_png(path):
    """Write a black picture of 20000x20000 pixels, which takes a few kilobytes."""
    Image.MAX_IMAGE_PIXELS = None
    Image.new("1", (20000, 20000)).save(path)


def write_folder(folder):
    """Write 160 good files (landscape, portrait, images; one clip each) and 40 rows to be dropped."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def frames(count, height=32, width=48):
        blocks = rng.integers(0, 256, (count, height // 8, width // 8, 3), np.uint8)
        return blocks.repeat(8, 1).repeat(8, 2)

    rows = []
    for i in range(160):
        name = f"good{i}.png" if i % 8 == 0 else f"good{i}.mp4"
        if i % 8 == 0:
            Image.fromarray(frames(1)[0]).save(folder / name)
        else:
            write_video(folder / name, frames(5) if i % 3 else frames(5, 48, 32), 8)
        rows.append((name, f"a street {i}"))
    noise = rng.integers(0, 255, (40, 32, 48, 3), np.uint8)
    encode_video(folder / "whole.mov", noise, codec="prores_ks", pix_fmt="yuv422p10le")
    whole = (folder / "whole.mov").read_bytes()
    (folder / "whole.mov").unlink()
    for i in range(4):
        (folder / f"text{i}.mp4").write_text("no video")
        write_video(folder / f"cut{i}.mp4", noise, 8)
        (folder / f"cut{i}.mp4").write_bytes((folder / f"cut{i}.mp4").read_bytes()[: -20_000 - i])
        middle = len(whole) // 2
        (folder / f"within{i}.mov").write_bytes(
            whole[: middle - 20_000] + bytes(40_000 + i) + whole[middle + 20_000 + i :]
        )
        write_sound(folder / f"sound{i}.m4a")
        write_video(folder / f"short{i}.mp4", counter_frames(2 + i % 3, 32, 48), 8)
        rows += [(f"{name}{i}.{suffix}", "a") for name, suffix in (("text", "mp4"), ("cut", "mp4"), ("within", "mov"))]
        rows += [(f"sound{i}.m4a", "a"), (f"short{i}.mp4", "a")]
    write_video(folder.parent / "outside.mp4", counter_frames(5, 32, 48), 8)
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    for i in range(3):
        write_video(folder / f"fast{i}.mp4", counter_frames(8, 32, 48), 24)
        write_video(folder / f"mute{i}.mp4", counter_frames(5, 32, 48), 8)
        rows += [
            (f"fast{i}.mp4", "a"),
            (f"gone{i}.mp4", "a"),
            (f"mute{i}.mp4", " "),
            (f"good{i}.{'mp4' if i else 'png'}", f"a street {i}"),
        ]
    rows += [("link.mp4", "a"), ("../outside.mp4", "a"), (str(folder.parent / "outside.mp4"), "a")]
    for i in range(3):
        (folder / f"list{i}.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\ngood{i + 1}.mp4\n#EXT-X-ENDLIST\n")
        rows.append((f"list{i}.m3u8", "a"))
    write_huge_png(folder / "huge0.png")
    os.link(folder / "huge0.png", folder / "huge1.png")
    rows += [("huge0.png", "a"), ("huge1.png", "a")]
    random.Random(0).shuffle(rows)  # broken files stand among good ones
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("many") / "data")


def encode(folder, model, cache):
    return [
        "-m",
        "c2r.encode",
        f"--dataset={folder}",
        f"--pretrained_model_name_or_path={model}",
        f"--cache_dir={cache}",
        *SIZE,
    ]


def content(cache):
    """Return {name of each cached clip and prompt: its bytes}."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for kind in ("clips", "prompts")
        for path in (cache / kind).rglob("*.safetensors")
    }


@pytest.fixture(scope="module")
def by_one(folder, tiny_models, tmp_path_factory):
    """(cache, output) of one process."""
    cache = tmp_path_factory.mktemp("one")
    done = succeed(*encode(folder, tiny_models / "pipeline", cache), by=fork)
    return cache, done.stdout


def test_dropped_rows_are_counted_by_reason_and_the_rest_is_encoded(by_one):
    cache, out = by_one
    last = [line for line in out.splitlines() if "dropped" in line][-1]
    assert "kept 160 clips of 160 files" in last
    for reason, count in BROKEN.items():
        assert f"{count} {reason}" in last, (reason, last)
    assert sum(BROKEN.values()) == 40
    assert "dropped 40 rows" in last
    assert len([name for name in content(cache) if name.startswith("clips")]) == 160


def test_two_processes_fill_the_same_cache_byte_for_byte(by_one, folder, tiny_models, tmp_path):
    processes = forked_twice(encode(folder, tiny_models / "pipeline", tmp_path / "two"), tmp_path)
    assert statuses(processes) == [0, 0], (tmp_path / "0/stderr").read_text()
    one, two = content(by_one[0]), content(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one)


@pytest.mark.slow
def test_two_passes_killed_eight_times_leave_the_same_cache(by_one, folder, tiny_models, tmp_path):
    arguments = encode(folder, tiny_models / "pipeline", tmp_path / "killed")[2:]
    passes = []
    for seed in (0, 1):
        rng = random.Random(seed)
        moments = ",".join(f"{rng.randrange(7)}:{rng.uniform(0, 0.1):.3f}" for _ in range(8))
        call = [warm_python(), "-m", "tests.helpers.encode_server", moments, *arguments]
        environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
        passes.append(subprocess.Popen(call, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    for process in passes:
        out = process.communicate(timeout=200)[0]
        kills = [int(count) for count in re.findall(r"killed at (\d+) clips", out)]
        assert len(kills) >= 6, out
        assert len({count for count in kills if 0 < count < 160}) >= 2, kills  # killed while encoding
        assert "ended with 0" in out
    once, killed = content(by_one[0]), content(tmp_path / "killed")
    assert once.keys() == killed.keys()
    assert all(once[name] == killed[name] for name in once)
