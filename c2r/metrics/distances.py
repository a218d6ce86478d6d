"""Distances between the generated and the true videos as sets: Fréchet and kernel distances of their features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against

#: Scenes, or true videos of none, that a distance needs at least.
MIN_VIDEOS = 2


class _Features:
    """The features of both sets, by clip and by scene.

    Args:
        features: (F, 3, H, W) -> (n, D), n the number of frames, or 1 for a feature of the whole video.
        name: of the measure.
    """

    higher_is_better: bool | None = False
    against: Against = "set"
    unit = "distance"
    bounds: tuple[float, float]

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], name: str):
        self.features, self.name = features, name
        self.generated: list[torch.Tensor] = []
        self.scenes: list[str] = []  # of `generated`
        self.truths: dict[str, torch.Tensor] = {}  # {scene: of its truth}
        self.references: list[torch.Tensor] = []
        self._of_references: Any = None  # what a distance needs of the references alone, once it is computed

    def update(self, clip: EvaluatedClip) -> None:
        """Add a clip: its video to the generated set, its truth to the true set, once for each name."""
        self.generated.append(self.features(clip.video).double())
        self.scenes.append(clip.name)
        if not self.references and clip.truth is not None and clip.name not in self.truths:
            self.truths[clip.name] = self.features(clip.truth).double()

    def update_reference(self, video: torch.Tensor) -> None:
        """Add a true video that belongs to no clip; from then on the truths of clips are not used."""
        self.references.append(self.features(video).double())
        self._of_references = None

    def _with_truth(self, indices):
        """Return the clips of a draw that have a truth, or all if there are references; none if they are too few."""
        indices = range(len(self.generated)) if indices is None else indices
        clips = [i for i in indices if self.references or self.scenes[i] in self.truths]
        too_few = len({self.scenes[i] for i in clips}) < MIN_VIDEOS or 0 < len(self.references) < MIN_VIDEOS
        return [] if too_few else clips


class FrechetDistance(_Features):
    """Fréchet distance of the features of frames; `fd_dinov2` and the like. See `frechet_distance`.

    It is biased upwards, the more so the fewer frames there are and the more alike those of a clip: compare only sets
    with equal numbers of clips and frames, and against one true set. The kernel distance has no such bias.
    """

    bounds = (0.0, inf)

    def compute(self, indices: Sequence[int] | None = None) -> float | None:
        """Return the distance of all clips or of some, see `SetMetric`."""
        clips = self._with_truth(indices)
        if not clips:
            return None
        if self.references and self._of_references is None:
            self._of_references = _Gaussian.of(torch.cat(self.references))
        true = self._of_references or _Gaussian.of(torch.cat([self.truths[self.scenes[i]] for i in clips]))
        return _Gaussian.of(torch.cat([self.generated[i] for i in clips])).distance(true)


class KernelDistance(_Features):
    """Squared maximum mean discrepancy of features with a polynomial kernel; `kd_dinov2`, `kd_vjepa2` and the like.

    With k(x, y) = (x·y / D + 1)³, the mean of k between generated videos, plus that between true videos, minus twice
    that between generated and true ones. Frames of one video, several videos of one scene, and a video and its own
    truth are not independent: such pairs are left out, so the value is unbiased, also for few clips, and it can be
    slightly negative. Where clips have truths, it is the U-statistic of pairs, and 0 for equal videos.

    Source: KID of Bińkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012 (JMLR 13), eq. 3 for
    separate true videos, eq. 4 for pairs; on video features as JEDi, Luo et al. 2024 (arXiv 2410.05203).
    """

    bounds = (-inf, inf)

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], name: str):
        super().__init__(features, name)
        self._block: dict[int, int] = {}  # {clip: its row in the matrices below}
        self._means: tuple[int, list[torch.Tensor]] = (0, [])  # number of references, and see `_kernel_means`

    def compute(self, indices: Sequence[int] | None = None) -> float | None:
        """Return the distance of all clips or of some, see `SetMetric`."""
        clips = self._with_truth(indices)
        if not clips:
            return None
        ours, theirs, between = self._kernel_means(clips)
        draws = torch.bincount(torch.tensor([self._block[i] for i in clips]), minlength=len(ours)).double()
        scenes = [self.scenes[i] for i in self._block]
        apart = torch.tensor([[one != other for other in scenes] for one in scenes])
        pairs = draws[:, None] * draws * apart
        if not self.references:
            values = ours + theirs - between - between.T
            return ((pairs * values).sum() / pairs.sum()).item()
        count = len(self.references)
        true = (theirs.sum() - theirs.trace()) / (count * (count - 1))
        cross = (draws @ between).sum() / (draws.sum() * count)
        return ((pairs * ours).sum() / pairs.sum() + true - 2 * cross).item()

    def _kernel_means(self, clips):
        """Return the mean kernel between any two videos: generated, true, and generated (rows) and true.

        The matrices are kept: those of all clips of a model hold what every part of them needs.
        """
        if self._means[0] != len(self.references) or not self._block.keys() >= set(clips):
            self._block = {clip: row for row, clip in enumerate(sorted(set(clips)))}
            generated = [self.generated[i] for i in self._block]
            true = self.references or [self.truths[self.scenes[i]] for i in self._block]
            if self._of_references is None:
                theirs = kernel_means(true, true)
                self._of_references = theirs if self.references else None
            else:
                theirs = self._of_references
            means = [kernel_means(generated, generated), theirs, kernel_means(generated, true)]
            self._means = len(self.references), means
        return self._means[1]


@dataclass(frozen=True)
class _Gaussian:
    """The mean (D,) of a set of features, and a matrix A (n, D) with A'A = their covariance."""

    mean: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "_Gaussian":
        """Compute them of (n, D) float64."""
        mean = features.mean(0)
        factor = (features - mean) / (len(features) - 1) ** 0.5
        if factor.shape[1] < len(factor):  # the triangular factor has fewer rows, and the same A'A
            factor = torch.linalg.qr(factor, mode="r").R
        return cls(mean, factor)

    def distance(self, other: "_Gaussian") -> float:
        """See `frechet_distance`."""
        # A'A = S and B'B = T. The eigenvalues of S·T are the squared singular values of A·B', which need no square
        # root of a matrix and are exact also where there are fewer frames than dimensions.
        a, b = self.factor, other.factor
        root = torch.linalg.svdvals(a @ b.T).sum()
        shift = (self.mean - other.mean).square().sum()
        return max((shift + a.square().sum() + b.square().sum() - 2 * root).item(), 0.0)


def frechet_distance(generated: torch.Tensor, true: torch.Tensor) -> float:
    """Compute the Fréchet distance of two Gaussians with the means and covariances of two sets of features.

    d² = |m − n|² + tr(S + T − 2·(S·T)^½).

    Args:
        generated, true: (n, D) and (m, D) float64, n and m at least 2.

    Returns:
        d² in float64, at least 0, as FID is.

    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6; on features of DINOv2 as Stein et al. 2023 (arXiv
    2306.04675).
    """
    return _Gaussian.of(generated).distance(_Gaussian.of(true))


def kernel_means(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of the polynomial kernel (x·y / D + 1)³ over the features of each two videos.

    Args:
        first, second: the features of each video, (n, D) float64.

    Returns:
        (len(first), len(second)) float64.
    """
    others, sizes = torch.cat(list(second)), torch.tensor([len(features) for features in second])
    video = torch.repeat_interleave(torch.arange(len(second)), sizes)
    rows = []
    for features in first:  # one at a time: all frames against all would take gigabytes
        kernel = (features @ others.T / features.shape[1] + 1) ** 3
        rows.append(torch.zeros(len(second), dtype=kernel.dtype).index_add(0, video, kernel.mean(0)) / sizes)
    return torch.stack(rows)
