"""Paired differences of two runs on the same validation clips, noise and noise levels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from c2r.reporting.run_folder import RunFolder


@dataclass(frozen=True)
class Difference:
    """The mean difference B − A of paired clips.

    Attributes:
        mean: the domains have the same weight, as in validation.
        error: standard error of the mean over the clips; NaN if a domain has one clip.
        clips: number of pairs.
    """

    mean: float
    error: float
    clips: int

    @property
    def is_clear(self) -> bool:
        """True if the mean is more than two standard errors away from 0."""
        return math.isfinite(self.error) and abs(self.mean) > 2 * self.error


def paired_clips(a: Mapping[str, Any], b: Mapping[str, Any], *conditions: str) -> list[tuple[int, int]]:
    """Return the rows of the clips that two validations share, [(row of A, row of B)]; none at other noise levels.

    Args:
        a, b: lines of validations.jsonl.
        conditions: such as "other_control": clips whose wrong control or prompt is not the same in both are left out.
    """
    if a["sigmas"] != b["sigmas"]:
        return []

    def identity(clip):
        return clip["key"], *(clip.get(condition) for condition in conditions)

    rows = {identity(clip): row for row, clip in enumerate(a["clips"])}
    return [(rows[identity(clip)], row) for row, clip in enumerate(b["clips"]) if identity(clip) in rows]


def difference(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    condition: str = "right",
    against: str | None = None,
    domain: str | None = None,
    level: int | None = None,
) -> Difference | None:
    """Compute the paired difference B − A of a loss, or of a gain.

    The losses of a clip at its noise levels are averaged first: they are not independent, the clips are.

    Args:
        a, b: lines of validations.jsonl.
        condition: "right", "other_control" and so on.
        against: another condition whose loss is subtracted: "other_control" against "right" is the control gain.
        domain: "real" or "cg" alone; None: both, with the same weight.
        level: one noise level alone, a position in `sigmas`.

    Returns:
        None if no pair has the condition.
    """
    for name in (condition, against or condition):
        if name not in a["losses"] or name not in b["losses"]:
            return None
    groups: dict[str, list[float]] = {}
    for row_a, row_b in paired_clips(a, b, condition, against or condition):
        clip = b["clips"][row_b]["domain"]
        if domain in (None, clip):
            values = [_of_clip(run, row, condition, against, level) for run, row in ((a, row_a), (b, row_b))]
            if None not in values:
                groups.setdefault(clip, []).append(values[1] - values[0])
    if not groups:
        return None
    mean = sum(float(np.mean(values)) for values in groups.values()) / len(groups)
    # The variance of the mean over domains of the means over their clips.
    variances = [np.var(v, ddof=1) / len(v) if len(v) > 1 else math.nan for v in groups.values()]
    return Difference(mean, math.sqrt(sum(variances)) / len(groups), sum(map(len, groups.values())))


def _of_clip(run, row, condition, against, level):
    """Return a clip's loss or gain, the mean over noise levels; None where the clip does not have the condition."""
    losses = run["losses"][condition][row]
    if against is not None:
        others = run["losses"][against][row]
        if None in others or None in losses:
            return None
        losses = [loss - other for loss, other in zip(losses, others)]
    if None in losses:
        return None
    return float(np.mean(losses)) if level is None else losses[level]


def common_steps(a: RunFolder, b: RunFolder) -> list[int]:
    """Return the steps at which both runs have validated clips that can be paired, with a loss in both."""
    shared = sorted(step for step in a.validations if step in b.validations)
    return [step for step in shared if difference(a.validations[step], b.validations[step]) is not None]
