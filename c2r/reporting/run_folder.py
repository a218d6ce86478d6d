"""A run as its output folder shows it: options, logged numbers, losses of validation clips, sample videos.

The folder may be a stranger's, or of a run that is writing into it: files are checked and bounded, and what is missing
is noted.
"""

import fcntl
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import JsonValue
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import parse_json, read_json
from c2r.training.output_files import LOCK, METRICS, START, VALIDATIONS

#: Bounds of what is read: a run of a million steps writes about 700 MB of numbers.
MAX_BYTES, MAX_LINE_BYTES, MAX_NAMES = 2 * 2**30, 2**22, 1000

#: Bound of validations.jsonl, which is kept in memory as lists.
MAX_VALIDATIONS_BYTES = 200_000_000

#: Largest step, and largest size of a number; others could not be drawn.
MAX_STEP, MAX_VALUE = 10**12, 1e30

#: A run that has logged nothing for longer, and holds no lock, counts as stopped, in seconds.
STOPPED_AFTER = 900

_VIDEO = re.compile(r"\d{1,4}\.mp4")
_STEP = re.compile(r"step-(\d{1,9})")


class _Start(TypedDict):
    version: str
    phase: Literal[1, 2]
    started: str
    command: str
    resume: str
    options: dict[str, JsonValue]
    environment: dict[str, str]


class _Clip(TypedDict):
    name: str
    domain: Literal["real", "cg"]
    key: str
    other_control: NotRequired[str]  # keys of the wrong conditions
    other_prompt: NotRequired[str]


class _Validation(TypedDict):
    step: int
    sigmas: list[float]
    clips: list[_Clip]
    losses: dict[str, list[list[float | None]]]


@dataclass
class RunFolder:
    """One run.

    Attributes:
        path: its output folder.
        name: how the page calls it.
        start: content of run.json, or None.
        numbers: {name: {step: value}} of every logged number; NaN where it was not finite.
        validations: {step: content of a line of validations.jsonl}.
        videos: {step: {number of the sample: path}}.
        captions: {"samples/0": prompt of that sample}.
        missing: lines on what the folder does not have.
    """

    path: Path
    name: str
    start: _Start | None = None
    numbers: dict[str, dict[int, float]] = field(default_factory=dict)
    validations: dict[int, _Validation] = field(default_factory=dict)
    videos: dict[int, dict[int, Path]] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path, name: str) -> "RunFolder":
        """Read a run's folder.

        Raises:
            InputError: it is no folder, holds nothing of a run, or a file is damaged.
        """
        run = cls(Path(path), name)
        if not run.path.is_dir():
            raise InputError(f"{path}: no such folder; give the --output_dir of a run")
        if _is_file(run.path / START):
            run.start = read_json(run.path / START, _Start)
        else:
            run.missing.append(f"{START}: options, versions and the command are unknown")
        if _is_file(run.path / METRICS):
            run._read_numbers()
        else:
            run.missing.append(f"{METRICS}: there are no curves")
        path = run.path / VALIDATIONS
        if _is_file(path) and path.stat().st_size > MAX_VALIDATIONS_BYTES:
            bound = f"{VALIDATIONS} of at most {MAX_VALIDATIONS_BYTES / 1e6:.0f} MB"
            run.missing.append(f"{bound}: the run is not compared clip by clip")
        elif _is_file(path):
            run._read_validations()
        else:
            run.missing.append(f"{VALIDATIONS}: the run cannot be compared clip by clip")
        run._find_videos()
        if run.start is None and not run.numbers and not run.videos:
            raise InputError(f"{path}: holds no {START}, {METRICS} or samples/; give the --output_dir of a run")
        if not run.videos and run.phase != 1:
            run.missing.append("samples/: there are no sample videos")
        return run

    def _read_numbers(self):
        path = self.path / METRICS
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            entry = parse_json(line, dict[str, JsonValue], where)
            step = entry.pop("step", None)
            if type(step) is not int or not 0 <= step <= MAX_STEP:
                raise InputError(f"{where}: has no step; replace it by an undamaged copy")
            if isinstance(entry.get("caption"), str) and isinstance(entry.get("media"), list):
                self.captions |= {str(name): entry["caption"] for name in entry["media"][:1]}
            for name, value in entry.items():
                if value is None or type(value) in (int, float):
                    known = value is not None and abs(value) <= MAX_VALUE
                    self.numbers.setdefault(name, {})[step] = float(value) if known else math.nan
            if max(len(self.numbers), len(self.captions)) > MAX_NAMES:
                raise InputError(f"{where}: more than {MAX_NAMES} names; replace it by an undamaged copy")

    def _read_validations(self):
        path = self.path / VALIDATIONS
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            entry = parse_json(line, _Validation, where)
            if not 0 <= entry["step"] <= MAX_STEP:
                raise InputError(f"{where}: has no step; replace it by an undamaged copy")
            size = (len(entry["clips"]), len(entry["sigmas"]))
            for condition, table in entry["losses"].items():
                if len(table) != size[0] or any(len(row) != size[1] for row in table):
                    raise InputError(f"{where}: the table {condition[:80]} has another size than its clips and sigmas")
                if any(loss is not None and not abs(loss) <= MAX_VALUE for row in table for loss in row):
                    raise InputError(f"{where}: the table {condition[:80]} has a loss that is not finite")
            self.validations[entry["step"]] = entry

    def _find_videos(self):
        folder = self.path / "samples"
        if folder.is_symlink() or not folder.is_dir():
            return
        for step_folder in sorted(folder.iterdir()):
            match = _STEP.fullmatch(step_folder.name)
            if match is None or step_folder.is_symlink() or not step_folder.is_dir():
                continue
            found = {int(p.stem): p for p in step_folder.iterdir() if _VIDEO.fullmatch(p.name) and _is_file(p)}
            if found:
                self.videos[int(match[1])] = dict(sorted(found.items()))
        self.videos = dict(sorted(self.videos.items()))

    # ---------------------------------------------------------------------------------------------- what it comes to

    @property
    def phase(self) -> int | None:
        """1, 2, or None if it is unknown."""
        if self.start is not None:
            return self.start["phase"]
        return 2 if "validation/control_gain" in self.numbers else None

    def option(self, name: str) -> Any:
        """Return the value of an option, None if it is unknown."""
        return None if self.start is None else self.start["options"].get(name)

    @cached_property
    def step(self) -> int:
        """The last step that is known."""
        steps = [step for series in self.numbers.values() for step in series]
        return max([*steps, *self.videos, 0])

    @cached_property
    def status(self) -> str:
        """The state of the run in words: finished, running or stopped."""
        planned = self.option("max_train_steps")
        planned = planned if type(planned) is int else None
        of = "" if planned is None else f" of {planned:,}"
        if (self.path / "final/c2r.json").is_file() and (planned is None or self.step >= planned):
            return f"finished at step {self.step:,}"
        path = self.path / METRICS
        if not path.is_file():
            return f"step {self.step:,}{of}"
        age = time.time() - path.stat().st_mtime
        if age < STOPPED_AFTER or _is_locked(self.path):
            return f"running, step {self.step:,}{of}"
        return f"stopped at step {self.step:,}{of}"

    @property
    def best_by(self) -> str:
        """The criterion of best/."""
        return "control_gain" if self.option("best_by") == "control_gain" else "loss"

    @cached_property
    def best_step(self) -> int | None:
        """The step of best/: of the lowest validation loss, or of the highest control gain by --best_by."""
        criterion = self.best_by
        values = {step: v for step, v in self.numbers.get(f"validation/{criterion}", {}).items() if math.isfinite(v)}
        if not values:
            return None
        return min(values, key=values.__getitem__) if criterion == "loss" else max(values, key=values.__getitem__)

    def last(self, name: str) -> float | None:
        """Return the last finite value of a number, None if there is none."""
        values = [v for v in self.numbers.get(name, {}).values() if math.isfinite(v)]
        return values[-1] if values else None


def _is_locked(folder):
    """Return True if a run on this machine, or on one that shares its locks, holds the lock of its output folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no lock, a link, or not ours to read
        return False
    try:
        # Shared, so that two reports do not see each other, and given back at once.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _is_file(path):
    """Return True for a plain file, not for a link: it could lead out of the folder."""
    return path.is_file() and not path.is_symlink()


def _lines(path) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines of a file, except a last one that is being written.

    Raises:
        InputError: the file or a line is too large.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES} bytes; replace it by an undamaged copy")
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; replace the file")
            if line.endswith(b"\n"):
                yield number, line


def run_names(paths: list[str]) -> list[str]:
    """Return short names for some folders that tell them apart: their last parts, as few as that takes."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(words[-count:]) for words in parts]
        if len(set(names)) == len(set(map(str, parts))):
            return names
    return names
