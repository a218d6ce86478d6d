"""Files and folders that are written as a whole, flushed before they get their name, and fingerprints of tensors."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from c2r.files import atomic_folder, complete_folder, fingerprint, write_atomic


@pytest.fixture
def flushed(monkeypatch):
    """Return {path: set of paths that were flushed before that path got its name}."""
    on_disk, before = set(), {}
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def flush(descriptor):
        fsync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    def recorded(move):
        def moved(source, target, **options):
            before[str(target)] = set(on_disk)
            move(source, target, **options)

        return moved

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", recorded(replace))
    monkeypatch.setattr(os, "rename", recorded(rename))
    return before


def test_a_file_is_flushed_before_it_gets_its_name(flushed, tmp_path):
    path = tmp_path / "inner/file"
    write_atomic(path, b"content")
    assert path.stat().st_ino in flushed[str(path)]


def test_a_folder_is_flushed_with_its_content_before_it_gets_its_name(flushed, tmp_path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        for name in ("a", "inner/b"):
            (temporary / name).write_text(name)
    content = [folder, *folder.rglob("*")]
    assert len(content) == 4
    assert {path.stat().st_ino for path in content} <= flushed[str(folder)]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "runs" / "best"
    for content in ("one", "two"):
        with atomic_folder(folder) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub/file").write_text(content)
            (temporary / content).touch()
        assert (folder / "sub/file").read_text() == content
        assert sorted(path.name for path in folder.iterdir()) == sorted(["sub", content])
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "best"
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text("old")

    def interrupted():
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("renames_done", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_a_complete_folder(tmp_path, monkeypatch, renames_done):
    folder = tmp_path / "best"
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text("old")
    renames, rename, rmtree = [], Path.rename, shutil.rmtree

    def killed(self, target):
        renames.append(target)
        if len(renames) > renames_done:
            os._exit(0)
        return rename(self, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "rename", killed)
        monkeypatch.setattr(shutil, "rmtree", lambda *a, **o: os._exit(0) if len(renames) == 2 else rmtree(*a, **o))
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text("new")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0

    assert folder.exists() == (renames_done != 1)
    assert (complete_folder(folder) / "file").read_text() == ("new" if renames_done == 2 else "old")
    with pytest.raises(FileNotFoundError), atomic_folder(folder) as temporary:  # the next writer, which fails
        (temporary / "no/such/folder").touch()
    assert (folder / "file").read_text() == ("new" if renames_done == 2 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_the_fingerprint_depends_on_names_dtypes_shapes_and_every_byte():
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(1.0), "c": torch.ones(2, dtype=torch.bfloat16)}
    first = fingerprint(tensors)
    assert len(first) == 64
    assert fingerprint(reversed(tensors.items())) == first
    assert fingerprint({name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}) == first
    changed = [
        tensors | {"a": torch.arange(6.0).view(2, 3)},
        tensors | {"a": torch.tensor([0.0, 1, 2, 3, 4, 5.0000005])},
        tensors | {"b": torch.tensor(1.0, dtype=torch.float64)},
        tensors | {"c": torch.ones(2, dtype=torch.float16)},
        tensors | {"c": tensors["c"].view(torch.int16)},  # the same bytes
        {name.upper(): tensor for name, tensor in tensors.items()},
        tensors | {"d": torch.zeros(0)},
    ]
    assert len({first, *map(fingerprint, changed)}) == 1 + len(changed)
    assert fingerprint({"a": torch.arange(6.0).view(2, 3).T}) == fingerprint(
        {"a": torch.arange(6.0).view(2, 3).T.contiguous()}
    )
