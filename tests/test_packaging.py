"""The distributions that `python -m build` makes."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import c2r
from tests.helpers.source import ROOT

NEEDED = (
    *("pyproject.toml", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE", "train_phase1.py"),
    *("train_phase2.py", "c2r", "accelerate_configs"),
)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder with a source distribution and the wheel built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in NEEDED:  # a copy, because setuptools writes beside what it builds
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "tree").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree")
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(folder)]
    done = subprocess.run([*command, str(folder / "tree")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_wheel_holds_the_package_and_the_weights_of_the_toy(distributions):
    with zipfile.ZipFile(distributions / f"c2r-{c2r.__version__}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"c2r-{c2r.__version__}.dist-info/METADATA").decode()
    assert names == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "c2r").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    for requirement in (ROOT / "requirements.txt").read_text().split():
        assert f"Requires-Dist: {requirement}\n" in metadata


def test_quickstart_of_an_installed_package_asks_for_a_clone(distributions, tmp_path):
    with zipfile.ZipFile(distributions / f"c2r-{c2r.__version__}-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path)
    for command in ("c2r.quickstart", "c2r.study"):
        done = subprocess.run([sys.executable, "-m", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {tmp_path}/train_phase1.py: not found; ")
        assert done.stderr.count("\n") == 1


def test_source_distribution_holds_scripts_and_configs(distributions):
    with tarfile.open(distributions / f"c2r-{c2r.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"train_phase1.py", "train_phase2.py", "requirements.txt", "LICENSE"} <= names
    assert names >= {f"accelerate_configs/{path.name}" for path in (ROOT / "accelerate_configs").iterdir()}


def test_messages_and_documents_name_the_pinned_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    for extra in project["optional-dependencies"].values():
        pins |= dict(requirement.split("==") for requirement in extra if "==" in requirement)
    folders = ("c2r", "benchmarks", "docs")
    documents = (path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".md"))
    for path in (*documents, *ROOT.glob("*.md")):
        for name, version in re.findall(r"pip install ([\w-]+)==([\w.]+)", path.read_text()):
            assert pins[name] == version.rstrip("."), f"{path.relative_to(ROOT)}: {name}=={version}"
