"""Progress of a training run."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pydantic import FiniteFloat, NonNegativeInt


@dataclass
class Progress:
    """Progress of a run, saved with every checkpoint."""

    global_step: NonNegativeInt = 0  #: optimizer steps done
    validated_step: int | None = None  #: step of the last validation
    sampled_step: int | None = None  #: step of the last sample videos
    metrics: dict[str, float] = field(default_factory=dict)  #: numbers of the last validation
    history: list[dict[str, float]] = field(default_factory=list)  #: numbers of all validations, each with its `step`
    best: dict[str, float] = field(default_factory=dict)  #: {criterion of best/: its value}
    logs: dict[str, float | bool] = field(default_factory=dict)  #: numbers logged at the last step
    inputs: dict[str, str] = field(default_factory=dict)  #: fingerprints of datasets and frozen models
    skipped_in_a_row: NonNegativeInt = 0  #: consecutive steps skipped up to now
    log_losses: list[FiniteFloat] = field(default_factory=list)  #: logarithms of the last steps' losses
    cg_ratio: FiniteFloat | None = None  #: share of CG samples from here on
    requested_cg_ratio: float | None = None  #: --cg_ratio of the run that saved the checkpoint
    controller: dict[str, int] = field(default_factory=dict)  #: state of the ratio controller
    cg_look: dict[str, float] = field(default_factory=dict)  #: last numbers of the CG monitor
    validation_setting: str | None = None  #: fingerprint of the clips and noise levels of the last validation

    def state_dict(self) -> dict[str, Any]:
        """Return all fields, as JSON can hold them."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]):
        """Set all fields."""
        for entry in fields(self):
            setattr(self, entry.name, state[entry.name])

    def start_baseline(self, setting: str) -> bool:
        """Discard the previous best and the last numbers if the next validation cannot be compared with them.

        Args:
            setting: fingerprint of the next validation's clips and noise levels.

        Returns:
            True if the setting has changed; the history is marked.
        """
        changed = self.validation_setting not in (None, setting)
        if changed:
            self.best, self.metrics = {}, {}
            self.history = [*self.history, {"step": self.global_step, "new_baseline": 1}]
        self.validation_setting = setting
        return changed

    def add_validation(self, metrics: dict[str, float]):
        """Record the numbers of a validation at this step."""
        self.validated_step, self.metrics = self.global_step, metrics
        self.history = [*self.history, {"step": self.global_step} | metrics]

    def record_best(self, criterion: str = "loss") -> bool:
        """Record the last validation as the best if it is; return True if so.

        Args:
            criterion: "loss", the lowest is best, or "control_gain", the highest is best. Changing the criterion
                discards the previous best.
        """
        value, best = self.metrics[criterion], self.best.get(criterion)
        sign = -1 if criterion == "loss" else 1
        if not math.isfinite(value) or (best is not None and sign * value <= sign * best):
            return False
        self.best = {criterion: value}
        return True

    @property
    def best_text(self) -> str:
        """Criterion and value of best/, such as "validation loss 0.4321"."""
        return ", ".join(f"validation {name.replace('_', ' ')} {value:.4f}" for name, value in self.best.items())
