"""Measured times of a training run."""

import math
import time
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
