"""The controller that lowers the CG share of a run while its samples look like CG."""

from dataclasses import dataclass

from c2r.evaluation.monitor import Score


@dataclass
class RatioController:
    """Halves the CG share when the CG look stays above a bound, and never raises it.

    It counts the samplings whose CG look has its whole interval above the bound. An interval that contains the bound
    does not change the count; an interval below the bound resets it.

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
        if look.high < self.bound:
            self.count = 0
        elif look.low > self.bound:
            self.count += 1
        if self.cg_ratio_min is None or self.count < self.patience or cg_ratio <= self.cg_ratio_min:
            return cg_ratio
        self.count = 0
        return max(cg_ratio / 2, self.cg_ratio_min)

    def advice(self, look: Score, cg_ratio: float) -> str | None:
        """Return a line of advice if the CG look has stayed above the bound, else None. Call it after `step`."""
        if self.count < self.patience or not look.low > self.bound:
            return None
        if cg_ratio > (self.cg_ratio_min or 0):
            remedy = f"--cg_ratio {cg_ratio / 2:.2g}"
        else:
            remedy = "--real_weight or --control_augmentation"
        return f"CG look {look} for {self.count} samplings: consider {remedy}"
