"""Measured times of a training run."""

import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from c2r.encoding.encoding_pass import EncodingResult
from c2r.encoding.missing import MissingFiles


@dataclass
class Timings:
    """Measured times of a run, for its last line and for the projection of a dry run."""

    started: float = field(default_factory=time.perf_counter)  #: start of the first validation or step
    last: dict[str, float] = field(default_factory=dict)  #: {name: seconds of its last measurement}
    spent: dict[str, float] = field(default_factory=dict)  #: {name: seconds of all measurements since `start`}
    samples_per_second: float = math.nan  #: speed of the last step
    step_seconds: float = math.nan  #: time of a step, the mean of about the last twenty
    to_encode: dict[str, int] = field(default_factory=dict)  #: {kind: clips missing for the whole run}
    seconds_per_clip: dict[str, float] = field(default_factory=dict)  #: {kind: encoding time, all processes together}

    def start(self):
        """Start the clock of the training loop."""
        self.spent, self.started = {}, time.perf_counter()

    @contextmanager
    def measure(self, name: str, part: bool = False):
        """Measure the time of the body and record it under this name.

        Args:
            name: what is measured.
            part: the time is added to what was spent, but is no measurement of the whole.
        """
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        if not part:
            self.last[name] = seconds

    def add_step(self, samples: int, samples_per_second: float):
        """Record the speed of a step of this number of clips."""
        self.samples_per_second, seconds = samples_per_second, samples / samples_per_second
        average = seconds if math.isnan(self.step_seconds) else self.step_seconds
        self.step_seconds = average + (seconds - average) / 20

    def remaining(self, step: int, last_step: int, intervals: Mapping[str, int]) -> tuple[float, bool]:
        """Compute the time that a run still takes, from what was measured so far.

        Args:
            step: steps done.
            last_step: steps of the run.
            intervals: {name of a measurement: steps between two}, each also done at the last step; 0: never.

        Returns:
            seconds, NaN before the first step; and True if each part was measured, else the time is too short.
        """
        seconds, complete = (last_step - step) * self.step_seconds, True
        for name, interval in intervals.items():
            if interval and (count := times_left(step, last_step, interval)):
                seconds += count * self.last.get(name, 0.0)
                complete = complete and name in self.last
        return seconds, complete

    def plan_encoding(self, missing: MissingFiles):
        """Record the clips that the whole run would encode.

        Raises:
            InputError: there is no room for them.
        """
        missing.require_room()
        self.to_encode[missing.kind] = missing.count

    def add_encoding(self, encoded: EncodingResult):
        """Record the time of an encoding pass; the first one of each kind counts."""
        if encoded.seconds_per_clip is not None:
            self.seconds_per_clip.setdefault(encoded.kind, encoded.seconds_per_clip)

    def shares(self) -> str:
        """Return the shares of the time since `start`: "93.1 % training, 0.3 % waiting for data, 6.6 % validation"."""
        total = time.perf_counter() - self.started
        parts = {"training": total - sum(self.spent.values())} | self.spent
        return ", ".join(f"{100 * seconds / total:.1f} % {name}" for name, seconds in parts.items())


def times_left(step: int, last_step: int, interval: int) -> int:
    """Return how often something is still done after a step: at multiples of the interval, and at the last step."""
    at_the_end = step < last_step and last_step % interval != 0
    return last_step // interval - step // interval + at_the_end
