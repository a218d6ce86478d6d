"""Shared fixtures: tiny models, small video datasets, and one finished run of each phase.

Tests marked slow take long: real launches, training engines, crashes. `-m "not slow"` leaves them out and keeps the
unit tests and the two runs below.
"""

import csv
import signal

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from c2r.cli import log_to_stdout
from tests.helpers.commands import SIZE, phase1, phase2, succeed
from tests.helpers.datasets import noise_video, write_dataset
from tests.helpers.forks import fork
from tests.helpers.tiny import save_tiny_dinov3, save_tiny_pipeline
from tests.helpers.videos import encode_video

settings.register_profile("no deadline", deadline=None)  # a busy machine would miss hypothesis' 200 ms
settings.load_profile("no deadline")
log_to_stdout()
torch.set_num_threads(1)  # as in the commands: more threads would compete for the cores


@pytest.fixture
def one_process(tmp_path):
    """Start a process group of this process alone: engines wrap modules as in a group of many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Write tiny random models; return their folder, with pipeline/ and dinov3/ in it."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pipeline(folder / "pipeline")
    save_tiny_dinov3(folder / "dinov3")
    return folder


#: Containers, codecs, sizes and frame rates as users have them. Each file gives two clips, short.mp4 none.
REAL_VIDEOS = {
    "r0.mp4": {},
    "r1.webm": {"codec": "libvpx-vp9", "times": [n / 8 + 0.02 * (n % 2) for n in range(10)], "sound_seconds": 1.2},
    "r2.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "r3.avi": {"codec": "mpeg4"},
    "r4.mkv": {"pix_fmt": "yuv444p", "fps": 24},
    "short.mp4": {},
}


@pytest.fixture(scope="session")
def small_datasets(tmp_path_factory):
    """Write real/ (five videos of two clips each, and one too short) and cg/ (three pairs); return their folder."""
    folder = tmp_path_factory.mktemp("data")
    texts = ["a street", "the city at night", "red brick", "rain", "two people on a street", "a street"]
    write_dataset(folder / "real", [], [])
    with open(folder / "real/metadata.csv", "a", newline="") as file:
        csv.writer(file).writerows(zip(REAL_VIDEOS, texts))
    for seed, (name, options) in enumerate(REAL_VIDEOS.items()):
        frames = noise_video(seed, {"r4.mkv": 30, "short.mp4": 3}.get(name, 10))
        if name == "r1.webm":
            frames = frames.transpose(0, 2, 1, 3)  # portrait
        if name == "r4.mkv":
            frames = frames[:, :31, :47]  # odd
        encode_video(folder / "real" / name, frames, **{"fps": SIZE["fps"]} | options)
    write_dataset(folder / "cg", [f"f{i}.mp4" for i in range(3)], texts[:3], [f"c{i}.mp4" for i in range(3)])
    return folder


@pytest.fixture(scope="session")
def first(tiny_models, small_datasets, tmp_path_factory):
    """Train phase 1 for four steps, launched as a user does; return its folder and the finished process."""
    out = tmp_path_factory.mktemp("run") / "phase1"
    done = succeed(*phase1(tiny_models, small_datasets, out, "--max_train_steps=4"))
    return out, done


@pytest.fixture(scope="session")
def second(first, tiny_models, small_datasets, tmp_path_factory):
    """Train phase 2 for four steps on the result of `first`; return its folder and the finished process."""
    out = tmp_path_factory.mktemp("run") / "phase2"
    done = succeed(*phase2(tiny_models, small_datasets, first[0] / "final", out, "--max_train_steps=4"), by=fork)
    return out, done


@pytest.fixture
def signal_handlers():
    """Restore the signal handlers after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items):
    """Run the longest files first: one that starts last would leave the other worker idle."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_engines.py", item.path not in slow_files))
