"""Datasets at an address: fetched on first use, within a size limit, and not removed while they are read."""

import errno
import functools
import http.server
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import MappingProxyType

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem

from c2r import InputError
from c2r.data.buckets import Bucket
from c2r.data.folders import read_frames
from c2r.data.manifest import read_manifest
from c2r.data.remote import RemoteFolder, RemoteStream, is_remote
from c2r.data.video import UnusableVideo
from c2r.data.video_writer import write_video
from tests.helpers.settings import clip_settings
from tests.helpers.videos import counter_frames, encode_video, read_counter


def settings_in(tmp_path):
    """Return settings with a cache in a test's folder."""
    return clip_settings(buckets=(Bucket(5, 48, 64),), fps=16, cache_dir=tmp_path / "cache", video_cache_gb=1)


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
    return sorted(path.read_bytes()[0] for path in remote.folder.iterdir() if path.name != ".lock")


def fetch(remote, number):
    name = f"sub/{number}.bin"
    with remote.fetch(name, *remote.files[name]) as path:
        return path.read_bytes()


def test_an_address_is_distinguished_from_a_path():
    assert is_remote("hf://datasets/user/name")
    assert not is_remote("/data/real")
    assert not is_remote("data:2")


def test_the_least_recently_used_copies_are_removed(origin, tmp_path):
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


def test_a_changed_file_is_fetched_again(origin, tmp_path):
    before = folder_at(origin, tmp_path)
    fetch(before, 0)
    (origin / "sub/0.bin").write_bytes(b"\x09" * 1000)
    os.utime(origin / "sub/0.bin", ns=(0, 10**18))
    after = folder_at(origin, tmp_path)
    assert after.files["sub/0.bin"].version != before.files["sub/0.bin"].version
    assert after.files["sub/1.bin"] == before.files["sub/1.bin"]
    assert fetch(after, 0) == b"\x09" * 1000


def test_a_download_of_another_length_is_refused(origin, tmp_path):
    remote = folder_at(origin, tmp_path)
    (origin / "sub/0.bin").write_bytes(bytes(999 - remote.files["sub/0.bin"].size + 500))
    with pytest.raises(InputError, match=r"sub/0\.bin: 499 bytes received instead of 1000"):
        fetch(remote, 0)
    assert copies(remote) == []


def test_a_missing_remote_file_is_named(origin, tmp_path):
    remote = folder_at(origin, tmp_path)
    with (
        pytest.raises(InputError, match=r"sub/9\.bin: cannot be read .*; check the address"),
        remote.fetch("sub/9.bin", 1, 2),
    ):
        pass


def start(target, *args):
    """Fork a process, as the data loader does, and return it with the queue that it puts results into."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=target, args=(*args, results), daemon=True)
    process.start()
    return process, results


def read_all(remote, order, results):
    most = 0
    for number in order:
        name = f"sub/{number}.bin"
        with remote.fetch(name, *remote.files[name]) as path:
            with remote._locked():  # no process adds or removes a copy meanwhile
                most = max(most, sum(p.stat().st_size for p in remote.folder.iterdir() if p.suffix != ".part"))
            if path.read_bytes() != bytes([number]) * 1000:
                results.put("torn")
                return
    results.put(most)


def test_two_processes_together_keep_the_size_limit(origin, tmp_path):
    remote = pickle.loads(pickle.dumps(folder_at(origin, tmp_path, max_bytes=2000)))
    orders = [[0, 1, 2, 3, 4, 5] * 40, [5, 4, 3, 2, 1, 0] * 40]
    running = [start(read_all, remote, order) for order in orders]
    most = [results.get(timeout=30) for _, results in running]
    assert "torn" not in most
    assert 1000 < max(most) <= 2000


class Shelf(AbstractFileSystem):
    """A filesystem of entries {path: (info in a listing, content or a function that makes or replaces it)}."""

    protocol = "shelf"
    entries = MappingProxyType({})

    def find(self, path, detail=True, **kwargs):
        return {path: listed for path, (listed, _) in self.entries.items()}

    def info(self, path, **kwargs):
        return {"size": len(self.entries[path][1]), "ETag": "from-info"}

    def get_file(self, rpath, lpath, **kwargs):
        content = self.entries[rpath][1]
        if callable(content):
            content = content(lpath)
        with open(lpath, "wb") as file:
            file.write(content)


fsspec.register_implementation("shelf", Shelf, clobber=True)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A function that puts entries on a `Shelf` and returns its `RemoteFolder`."""

    def folder_with(entries, max_bytes=10_000):
        monkeypatch.setattr(Shelf, "entries", entries)
        return RemoteFolder("shelf://data/set", tmp_path / "cache", max_bytes)

    return folder_with


@pytest.mark.parametrize("mark", ["ETag", "blob_id", "LastModified", "last_modified", "updated", "created"])
def test_each_mark_of_a_listing_changes_the_version(shelf, mark):
    versions = [shelf({"data/set/a": ({"size": 3, mark: value}, b"")}).files["a"].version for value in ("x", "y", "x")]
    assert versions[0] == versions[2] != versions[1]
    assert all(0 <= version < 2**63 for version in versions)


def test_without_a_mark_the_version_follows_the_size(shelf):
    a, b, c = (shelf({"data/set/a": ({"size": size}, b"")}).files["a"].version for size in (3, 3, 4))
    assert a == b != c


def test_names_that_leave_the_folder_are_not_listed(shelf):
    outside = ["data/set/../a", "data/other/a", "data/settle", "data/set/b//c", "data/set//etc/passwd", "data/set/./a"]
    remote = shelf({path: ({"size": 1}, b"1") for path in [*outside, "data/set/sub/ok.mp4"]})
    assert list(remote.files) == ["sub/ok.mp4"]
    for name in ("../a", "/etc/passwd"):
        with pytest.raises(InputError, match="leads out of the dataset's folder"), remote.fetch(name, 1, 0):
            pass
        with pytest.raises(InputError, match="leads out of the dataset's folder"):
            remote.open(name)


def test_sizes_missing_in_a_listing_are_requested(shelf):
    remote = shelf({"data/set/a": ({"size": None}, b"four")})
    with remote.fetch("a", *remote.files["a"]) as path:
        assert path.read_bytes() == b"four"


def test_an_address_without_files_is_named(tmp_path):
    with pytest.raises(InputError, match=r"memory://nowhere: no files there; check the address"):
        RemoteFolder("memory://nowhere", tmp_path, 1).files  # noqa: B018


def test_a_file_rewritten_in_memory_has_another_version(tmp_path):
    memory = fsspec.filesystem("memory")
    versions = []
    for content in (b"one", b"two"):
        memory.pipe_file("/rewritten/a", content)
        remote = RemoteFolder("memory://rewritten", tmp_path, 10)
        versions.append(remote.files["a"].version)
        with remote.fetch("a", *remote.files["a"]) as path:
            assert path.read_bytes() == content
    assert versions[0] != versions[1]


def test_a_file_larger_than_the_limit_removes_no_copy(origin, tmp_path):
    fetch(folder_at(origin, tmp_path), 0)
    small = folder_at(origin, tmp_path, max_bytes=999)
    with pytest.raises(InputError, match=r"--video_cache_gb .*sub/1.bin .* does not fit"):
        fetch(small, 1)
    assert copies(small) == [0]


def test_a_full_disk_is_named_as_the_cause(shelf):
    def no_room(lpath):
        raise OSError(errno.ENOSPC, "No space left on device", lpath)

    remote = shelf({"data/set/a": ({"size": 1}, no_room)})
    with pytest.raises(InputError, match=r"no room on the disk for shelf://data/set/a; make room, or lower --video"):
        fetch_one(remote, "a")
    assert copies(remote) == []


def fetch_one(remote, name, results=None):
    with remote.fetch(name, *remote.files[name]) as path:
        if results is None:
            return path.read_bytes()
        results.put(path.read_bytes())


def test_a_file_that_several_processes_need_is_fetched_once(shelf, tmp_path):
    def slowly(lpath):
        with open(tmp_path / "fetched", "a") as log:
            log.write("once\n")
        time.sleep(0.3)
        return b"1234"

    # The limit allows one copy: a second download at the same time would fail.
    remote = shelf({"data/set/a": ({"size": 4}, slowly)}, max_bytes=4)
    running = [start(fetch_one, remote, "a") for _ in range(3)]
    assert [results.get(timeout=30) for _, results in running] == [b"1234"] * 3
    assert (tmp_path / "fetched").read_text() == "once\n"


def test_remains_of_a_killed_download_are_removed(shelf):
    def half(lpath):
        with open(lpath, "wb") as file:
            file.write(b"12")
        time.sleep(60)

    remote = shelf({"data/set/a": ({"size": 4}, half), "data/set/b": ({"size": 4}, b"abcd")}, max_bytes=4)
    process, _ = start(fetch_one, remote, "a")
    while not list(remote.folder.glob(".*.tmp")):
        time.sleep(0.01)
    with pytest.raises(InputError, match="does not fit beside the files in use"):
        fetch_one(remote, "b")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert fetch_one(remote, "b") == b"abcd"
    assert [path.suffix for path in remote.folder.iterdir() if path.name != ".lock"] == [""]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of a folder that does not log requests."""

    def log_message(self, *args):
        pass


def test_files_of_a_web_server_are_fetched(origin, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(origin.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        remote = RemoteFolder(f"http://127.0.0.1:{server.server_port}/origin", tmp_path / "cache", 2000)
        assert sorted(remote.files) == [f"sub/{number}.bin" for number in range(6)]
        for number in (0, 1, 2):
            assert fetch(remote, number) == bytes([number]) * 1000
        assert copies(remote) == [1, 2]
        with pytest.raises(InputError, match=r"sub/9\.bin: cannot be read"), remote.fetch("sub/9.bin", 1, 2):
            pass
    finally:
        server.shutdown()
        server.server_close()


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
def test_an_address_gives_the_same_clips_as_the_folder(dataset, tmp_path, kind):
    settings = settings_in(tmp_path)
    address = f"file://{dataset}"
    if kind == "memory":
        fsspec.filesystem("memory").put(str(dataset), "/data/real", recursive=True)
        address = "memory://data/real"
    local, remote = read_manifest(dataset, "real", settings), read_manifest(address, "real", settings)
    assert [(c.name, c.text, c.start, c.held_out) for c in remote.clips] == [
        (c.name, c.text, c.start, c.held_out) for c in local.clips
    ]
    assert [(row.file, row.reason) for row in remote.dropped] == [("../x.mp4", "path outside the folder")]
    window = read_frames(remote.clips[1].target_file, remote.clips[1], settings)
    assert read_counter(window) == [5, 6, 7, 8, 9]


def test_an_error_names_the_address_of_a_video_and_not_its_copy(dataset, tmp_path):
    settings = settings_in(tmp_path)
    clip = read_manifest(f"file://{dataset}", "real", settings).clips[0]
    with pytest.raises(UnusableVideo, match=r"^file://\S+/train/a\.mp4: cannot be decoded \(it ends before"):
        read_frames(clip.target_file, replace(clip, start=60.0), settings)


def test_links_out_of_a_folder_at_an_address_are_not_listed(dataset, tmp_path):
    (dataset / "inside.mp4").symlink_to(dataset / "train/a.mp4")
    (dataset / "outside.mp4").symlink_to(tmp_path / "x.mp4")
    (tmp_path / "secret").mkdir()
    shutil.copy(tmp_path / "x.mp4", tmp_path / "secret/y.mp4")
    (dataset / "folder").symlink_to(tmp_path / "secret")
    files = folder_at(dataset, tmp_path).files
    assert sorted(files) == ["inside.mp4", "metadata.csv", "train/a.mp4", "train/b.mp4"]


def test_another_users_copy_is_read(origin, tmp_path, monkeypatch):
    remote = folder_at(origin, tmp_path)
    fetch(remote, 1)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "not the owner")

    monkeypatch.setattr(os, "utime", refuse)
    assert fetch(remote, 1) == bytes([1]) * 1000


def test_a_server_without_range_requests_is_an_error_and_drops_no_video(tmp_path):
    """fsspec reads files above 5 MiB in ranges, which Python's server does not support."""
    folder = tmp_path / "real"
    noise = np.random.default_rng(0).integers(0, 256, (24, 480, 832, 3), np.uint8)
    encode_video(folder / "a.mov", noise, codec="prores_ks", pix_fmt="yuv422p10le")
    assert (folder / "a.mov").stat().st_size > 6 * 2**20
    (folder / "metadata.csv").write_text("file_name,text\na.mov,one\n")
    settings = settings_in(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/real"
        with pytest.raises(InputError, match=r"a\.mov: cannot be read \(.*range.*\); check the address"):
            read_manifest(address, "real", settings)
    finally:
        server.shutdown()
        server.server_close()


def test_a_remote_dataset_needs_a_cache_dir():
    with pytest.raises(InputError, match=r"memory://nothing: is not on this machine; give a --cache_dir"):
        read_manifest("memory://nothing", "real", clip_settings(cache_dir=None))


class Flaky(io.BytesIO):
    """A file whose connection is lost after two reads."""

    def read(self, size=-1):
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads > 2:
            raise ConnectionError("gone away")
        return super().read(min(size, 500))


def test_a_lost_connection_is_an_error_and_drops_no_video(dataset, tmp_path, monkeypatch):
    settings = settings_in(tmp_path)
    content = (dataset / "train/a.mp4").read_bytes()
    monkeypatch.setattr(RemoteFolder, "open", lambda self, name: RemoteStream(Flaky(content)))
    with pytest.raises(InputError, match=r"train/[ab]\.mp4: cannot be read \(gone away\); check the address"):
        read_manifest(f"file://{dataset}", "real", settings)
