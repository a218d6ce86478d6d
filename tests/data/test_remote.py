"""Datasets at an address: fetched on first use, within a bound, and never torn from a reader."""

import multiprocessing
import os
from types import SimpleNamespace

import fsspec
import pytest

from c2r import InputError
from c2r.data.folders import read_source
from c2r.data.manifest import read_manifest
from c2r.data.remote import RemoteFolder, is_remote
from c2r.data.video import write_video
from tests.videos import counter_frames, read_counter


@pytest.fixture
def origin(tmp_path):
    """A folder with six files of 1000 bytes, and its address."""
    folder = tmp_path / "origin"
    for i in range(6):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / f"sub/{i}.bin").write_bytes(bytes([i]) * 1000)
    return folder


def folder_at(origin, tmp_path, max_bytes=10_000):
    return RemoteFolder(f"file://{origin}", tmp_path / "cache", max_bytes)


def copies(remote):
    return sorted(path.read_bytes()[0] for path in remote.folder.iterdir())


def fetch(remote, number):
    name = f"sub/{number}.bin"
    with remote.fetch(name, *remote.files[name]) as path:
        return path.read_bytes()


def test_an_address_is_told_from_a_path():
    assert is_remote("hf://datasets/user/name")
    assert not is_remote("/data/real")
    assert not is_remote("data:2")


def test_the_least_recently_used_copies_make_room(origin, tmp_path):
    remote = folder_at(origin, tmp_path, max_bytes=3000)
    for number in (0, 1, 2):
        assert fetch(remote, number) == bytes([number]) * 1000
    fetch(remote, 0)
    fetch(remote, 3)
    assert copies(remote) == [0, 2, 3]
    fetch(remote, 4)
    assert copies(remote) == [0, 3, 4]


def test_a_copy_in_use_is_not_removed(origin, tmp_path):
    remote = folder_at(origin, tmp_path, max_bytes=1000)
    with remote.fetch("sub/0.bin", *remote.files["sub/0.bin"]) as path:
        with pytest.raises(InputError, match=r"--video_cache_gb 1e-06: .*sub/1.bin .* does not fit.*; raise it"):
            fetch(remote, 1)
        assert path.read_bytes() == bytes(1000)
    fetch(remote, 1)
    assert copies(remote) == [1]


def test_a_changed_file_is_another_one(origin, tmp_path):
    before = folder_at(origin, tmp_path)
    fetch(before, 0)
    (origin / "sub/0.bin").write_bytes(b"\x09" * 1000)
    os.utime(origin / "sub/0.bin", ns=(0, 10**18))
    after = folder_at(origin, tmp_path)
    assert after.files["sub/0.bin"].version != before.files["sub/0.bin"].version
    assert after.files["sub/1.bin"] == before.files["sub/1.bin"]
    assert fetch(after, 0) == b"\x09" * 1000


def test_what_comes_in_another_length_is_refused(origin, tmp_path):
    remote = folder_at(origin, tmp_path)
    (origin / "sub/0.bin").write_bytes(bytes(999 - remote.files["sub/0.bin"].size + 500))
    with pytest.raises(InputError, match=r"sub/0\.bin: 499 bytes came of 1000"):
        fetch(remote, 0)
    assert list(remote.folder.iterdir()) == []


def test_what_is_missing_is_named(origin, tmp_path):
    remote = folder_at(origin, tmp_path)
    with (
        pytest.raises(InputError, match=r"sub/9\.bin: cannot be read .*; check the address"),
        remote.fetch("sub/9.bin", 1, 2),
    ):
        pass


def read_all(remote, order, results):
    results.put(all(fetch(remote, number) == bytes([number]) * 1000 for number in order))


def test_two_processes_at_once_keep_the_bound(origin, tmp_path):
    remote = folder_at(origin, tmp_path, max_bytes=4000)
    results = multiprocessing.get_context("spawn").Queue()
    orders = [[0, 1, 2, 3, 4, 5] * 10, [5, 4, 3, 2, 1, 0] * 10]
    processes = [
        multiprocessing.get_context("spawn").Process(target=read_all, args=(remote, order, results))
        for order in orders
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    # Both may make room for one file each at the same moment.
    assert sum(path.stat().st_size for path in remote.folder.iterdir()) <= 5000


@pytest.fixture
def dataset(tmp_path):
    """A folder of two videos with metadata."""
    folder = tmp_path / "real"
    write_video(folder / "train/a.mp4", counter_frames(12), 16)
    write_video(folder / "train/b.mp4", counter_frames(12), 16)
    (folder / "metadata.csv").write_text("file_name,text\ntrain/a.mp4,one\nb.mp4,two\n../x.mp4,three\n")
    write_video(tmp_path / "x.mp4", counter_frames(12), 16)
    return folder


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_dataset_at_an_address_gives_the_clips_of_the_folder(dataset, tmp_path, kind):
    options = SimpleNamespace(
        height=48, width=64, num_frames=5, fps=16, cache_dir=str(tmp_path / "cache"), video_cache_gb=1
    )
    address = f"file://{dataset}"
    if kind == "memory":
        fsspec.filesystem("memory").put(str(dataset), "/data/real", recursive=True)
        address = "memory://data/real"
    local, remote = read_manifest(dataset, "real", options), read_manifest(address, "real", options)
    assert [(c.name, c.text, c.start, c.held_out) for c in remote.clips] == [
        (c.name, c.text, c.start, c.held_out) for c in local.clips
    ]
    assert [(row.file, row.reason) for row in remote.dropped] == [("../x.mp4", "path outside the folder")]
    window = read_source(remote.clips[1].source, remote.clips[1], options)
    assert read_counter(window) == [5, 6, 7, 8, 9]


def test_a_remote_dataset_needs_a_place_for_its_cache():
    options = SimpleNamespace(height=48, width=64, num_frames=5, fps=16, cache_dir=None, video_cache_gb=1)
    with pytest.raises(InputError, match=r"memory://nothing: is not on this machine: give a --cache_dir"):
        read_manifest("memory://nothing", "real", options)
