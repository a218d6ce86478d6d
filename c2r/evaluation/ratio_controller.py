"""The controller that lowers the CG share of a run while its samples look like CG."""

from dataclasses import dataclass

from c2r.evaluation.monitor import MIN_SCENES, Score

#: Confidence of the intervals that the controller acts on. Every sampling has the same scenes and seeds, so that one
#: unlucky draw stays above the bound for many samplings (`python -m benchmarks.monitor_statistics`).
ACTING_CONFIDENCE = 0.99


@dataclass
class RatioController:
    """Halves the CG share when the CG look stays above a bound, and never raises it.

    It counts the samplings in a row whose CG look has its whole interval, of ACTING_CONFIDENCE, above the bound. A CG
    look of fewer than MIN_SCENES scenes changes nothing.

    Attributes:
        bound: largest acceptable CG look; 0 is that of the real clips, 1 that of the CG clips.
        patience: the count at which the share is halved.
        cg_ratio_min: lower bound of the share; None: the share is not changed.
        count: the count so far.
    """

    bound: float = 0.5
    patience: int = 3
    cg_ratio_min: float | None = None
    count: int = 0

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run needs, in a form for JSON."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the state of a saved run."""
        self.count = state["count"]

    def step(self, look: Score, cg_ratio: float) -> float:
        """Count the CG look of one sampling and return the CG share from now on.

        Args:
            look: NaN changes nothing.
            cg_ratio: the current share.
        """
        if look.count >= MIN_SCENES:
            self.count = self.count + 1 if self._is_above(look) else 0
        if self.cg_ratio_min is None or self.count < self.patience or cg_ratio <= self.cg_ratio_min:
            return cg_ratio
        self.count = 0
        return max(cg_ratio / 2, self.cg_ratio_min)

    def advice(self, look: Score, cg_ratio: float) -> str | None:
        """Return a line of advice if the CG look has stayed above the bound, else None. Call it after `step`."""
        if self.count < self.patience or look.count < MIN_SCENES:
            return None
        if cg_ratio > (self.cg_ratio_min or 0):
            remedy = f"--cg_ratio {cg_ratio / 2:.2g}"
        else:
            remedy = "--real_weight or --control_augmentation"
        return f"CG look {look} for {self.count} samplings: consider {remedy}"

    def _is_above(self, look):
        return look.interval(ACTING_CONFIDENCE)[0] > self.bound
