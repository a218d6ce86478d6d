"""Plant each fault of `tests.mutations` in a copy of the project and see whether the tests notice it.

    python -m tests.mutate [-j JOBS] [NAME …]

Each fault is planted alone, and the tests that should notice it run until the first failure. Before the first fault
they must all pass. The outcomes go into tests/mutations.md; a run of some faults replaces their rows there. The exit
code is 1 if fewer than 95 % are found.
"""

import argparse
import compileall
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from platform import python_version
from queue import SimpleQueue

import diffusers
import pytest
import torch

from tests.helpers.source import ROOT
from tests.mutations import MUTATIONS, Mutation

RECORD = ROOT / "tests/mutations.md"
REQUIRED_SHARE = 0.95
SURVIVED = "**survived**"
SECONDS = 300  # for the tests of one fault
PASSED, FAILED = 0, 1  # exit codes of pytest; all others mean that the tests could not run


#: Forked for each fault with the libraries that most tests import, which takes longer than most tests.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "accelerate",
        "av",
        "datasets",
        "diffusers.pipelines.wan.pipeline_wan",
        "matplotlib.pyplot",
        "pyarrow",
        "tensorboard.backend.event_processing.event_accumulator",
        "torch.utils.tensorboard",
        "transformers.models.dinov3_vit.modeling_dinov3_vit",
        "transformers.models.umt5.modeling_umt5",
    ]
)


@dataclass(frozen=True)
class Outcome:
    """The result of the tests of one fault."""

    mutation: Mutation
    found_by: str | None  #: the first failing test; None if all passed
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant; default: all")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="faults at a time, each in a copy of its own")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not args.names or mutation.name in args.names]

    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            copies.put(copy_project(Path(folder, str(number))))
        first = copies.get()
        status, output = run_tests(first, dict.fromkeys(mutation.tests for mutation in chosen))
        if status != PASSED:
            sys.exit(f"without a fault the tests do not pass:\n{output}")
        copies.put(first)

        def run(mutation):
            copy = copies.get()
            try:
                outcome = try_mutation(copy, mutation)
            finally:
                copies.put(copy)
            print(f"{outcome.seconds:5.1f} s  {mutation.name}: {outcome.found_by or 'SURVIVED'}", flush=True)
            return outcome

        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = list(pool.map(run, chosen))
    found = sum(outcome.found_by is not None for outcome in outcomes)
    print(f"{found} of {len(outcomes)} faults found ({found / len(outcomes):.1%})")
    earlier = RECORD.read_text(encoding="utf-8") if RECORD.exists() else ""
    RECORD.write_text(record(outcomes, earlier), encoding="utf-8")
    return 0 if found >= REQUIRED_SHARE * len(outcomes) else 1


def copy_project(folder: Path) -> Path:
    """Copy the files that git tracks; return the folder."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    compileall.compile_dir(folder, quiet=1)
    return folder


def mutated(text: str, mutation: Mutation) -> str:
    """Return a file's text with the fault in it.

    Raises:
        ValueError: the text to replace does not occur exactly once.
    """
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: its old text occurs {count} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


@contextmanager
def planted(copy: Path, mutation: Mutation):
    """Plant a fault in a copy of the project within the body."""
    path = copy / mutation.file
    text = mutated(path.read_text(encoding="utf-8"), mutation)
    try:
        path.write_text(text, encoding="utf-8")
        yield
    finally:
        shutil.copy2(ROOT / mutation.file, path)  # with its time of change, so that its compiled form stays valid


def try_mutation(copy: Path, mutation: Mutation) -> Outcome:
    """Run the tests that should notice a fault.

    Raises:
        RuntimeError: they could not run.
    """
    started = time.perf_counter()
    with planted(copy, mutation):
        status, output = run_tests(copy, [mutation.tests], SECONDS)
    seconds = time.perf_counter() - started
    if status == PASSED:
        return Outcome(mutation, None, seconds)
    if status is None:
        return Outcome(mutation, f"no end after {SECONDS} s", seconds)
    failure = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if status != FAILED or failure is None:
        raise RuntimeError(f"{mutation.name}: pytest ended with {status}:\n{output[-3000:]}")
    return Outcome(mutation, failure[1].partition("[")[0], seconds)


def run_tests(copy: Path, tests: Iterable[str], limit: float | None = None) -> tuple[int | None, str]:
    """Run tests in a copy of the project up to the first failure.

    Returns:
        pytest's exit code, None if the tests took longer than `limit` seconds; its output.
    """
    output = copy / "output.txt"
    process = _server.Process(target=_run_pytest, args=(copy, ["-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]))
    process.start()
    process.join(limit)
    status = process.exitcode
    if status is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return status, output.read_text(errors="replace")


def _run_pytest(copy, arguments):
    """Run pytest in a fork of the server, whose output goes into output.txt."""
    os.setsid()
    with open(copy / "output.txt", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # those of the copy are imported instead
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # The compiled files stay those without a fault: Python could not tell two faults of one second and size apart.
    sys.dont_write_bytecode = True
    os.chdir(copy)
    sys.exit(int(pytest.main(arguments)))


def record(outcomes: list[Outcome], earlier: str = "") -> str:
    """Return the page of outcomes, in the order of the list of faults.

    Args:
        outcomes: those of this run.
        earlier: the page of an earlier run, whose other rows are kept.
    """
    rows = {match[1]: match[0] for match in re.finditer(r"^\| ([a-z0-9-]+) \| `.*$", earlier, re.MULTILINE)}
    for outcome in outcomes:
        mutation = outcome.mutation
        found_by = f"`{outcome.found_by}`" if outcome.found_by else SURVIVED
        rows[mutation.name] = f"| {mutation.name} | `{mutation.file}` | {found_by} | {outcome.seconds:.0f} |"
    known = [mutation for mutation in MUTATIONS if mutation.name in rows]
    survivors = [mutation for mutation in known if SURVIVED in rows[mutation.name]]
    found = len(known) - len(survivors)
    lines = [
        "# Faults that the tests notice",
        "",
        f"{found} of {len(known)} faults were found ({found / len(known):.1%}). Each fault of `tests/mutations.py` "
        "was planted alone, and the test named there, or the tests of the file, ran until the first failure. The "
        "seconds are those of a busy machine, and most of them start pytest. This page is written by "
        f"`python -m tests.mutate`, last on {date.today()} with Python {python_version()}, PyTorch "
        f"{torch.__version__} and Diffusers {diffusers.__version__}.",
        "",
        "| fault | file | found by | seconds |",
        "|---|---|---|---|",
        *(rows[mutation.name] for mutation in known),
    ]
    lines += ["", *(f"- {mutation.name}: {mutation.remark}" for mutation in survivors)] if survivors else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
