"""Atomic files and folders: their content is on the disk before they get their name."""

import os

import pytest

from c2r.files import atomic_folder, write_atomic


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
