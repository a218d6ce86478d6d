"""The two interfaces of measures: of one clip, and of a set of clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from c2r.metrics.clip import EvaluatedClip

#: The other side of a measure. `passes` are the renderer's ids and depth; `set`: all true videos together.
Against = Literal["truth", "control", "passes", "prompt", "itself", "set"]


class Metric(Protocol):
    """A measure of one clip.

    Attributes:
        name: key of its results, for instance `edge_f1`.
        higher_is_better: None where neither direction is.
        against: see `Against`.
        unit: a word or two for tables and plots.
        bounds: the lowest and the highest value that it can have.
    """

    name: str
    higher_is_better: bool | None
    against: Against
    unit: str
    bounds: tuple[float, float]

    def __call__(self, clip: EvaluatedClip) -> float | None:
        """Return the measure, or None if the clip lacks what it is measured against."""


class SetMetric(Protocol):
    """A distance between a set of generated videos and a set of true ones.

    It keeps features, not videos: of clip k what the k-th call of `update` computed. Clips of one name are of one
    scene, as from several models or seeds.

    Attributes:
        name, higher_is_better, against, unit, bounds: see `Metric`; `against` is "set".
    """

    name: str
    higher_is_better: bool | None
    against: Against
    unit: str
    bounds: tuple[float, float]

    def update(self, clip: EvaluatedClip) -> None:
        """Add a clip: its video to the generated set, its truth, if it has one, to the true set."""

    def update_reference(self, video: torch.Tensor) -> None:
        """Add a true video that belongs to no clip, (F, 3, H, W) float32 RGB in [0, 1], to the true set.

        From then on the truths of clips are not used.
        """

    def compute(self, indices: Sequence[int] | None = None) -> float | None:
        """Return the distance.

        Args:
            indices: some clips, also with repetitions, counted from 0 in the order of `update`: those of one model,
                of a jackknife or of a bootstrap draw. None: all.

        Returns:
            None if there are too few scenes in either set.
        """


@dataclass(frozen=True)
class Skipped:
    """A measure that cannot be computed here, with the reason and what to do about it on one line."""

    name: str
    reason: str
