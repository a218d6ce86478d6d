"""Distances between the generated and the true videos as sets: Fréchet and kernel distances of their features."""

from collections.abc import Callable, Sequence

import torch

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against

#: Clips, or true videos, that a distance needs at least.
MIN_VIDEOS = 2


class _Features:
    """The features of both sets, by clip.

    Args:
        features: (F, 3, H, W) -> (n, D), n the number of frames, or 1 for a feature of the whole video.
        name: of the measure.
    """

    higher_is_better: bool | None = False
    against: Against = "set"
    unit = "distance"

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], name: str):
        self.features, self.name = features, name
        self.generated: list[torch.Tensor] = []
        self.truths: list[torch.Tensor | None] = []
        self.references: list[torch.Tensor] = []

    def update(self, clip: EvaluatedClip) -> None:
        """Add a clip: its video to the generated set, its truth to the true set."""
        self.generated.append(self.features(clip.video).double())
        self.truths.append(None if clip.truth is None else self.features(clip.truth).double())

    def update_reference(self, video: torch.Tensor) -> None:
        """Add a true video that belongs to no clip; from then on the truths of clips are not used."""
        self.references.append(self.features(video).double())

    def _usable(self, indices):
        """Return the clips of a draw that have what is needed: a truth, if there are no references."""
        indices = range(len(self.generated)) if indices is None else indices
        return [i for i in indices if self.references or self.truths[i] is not None]


class FrechetDistance(_Features):
    """Fréchet distance of the features of frames; `fd_dinov2` and the like. See `frechet_distance`.

    It is biased upwards, the more so the fewer frames there are: compare only sets with equal numbers of clips and
    frames, and against one true set. In a bootstrap draw repeated clips make it larger still, so its interval lies
    above the value; the kernel distance has no such bias.
    """

    def compute(self, indices: Sequence[int] | None = None) -> float | None:
        """Return the distance, of all clips or of a draw; None with fewer than MIN_VIDEOS clips or true videos."""
        clips = self._usable(indices)
        true = self.references or [self.truths[i] for i in clips]
        if min(len(set(clips)), len(true)) < MIN_VIDEOS:
            return None
        return frechet_distance(torch.cat([self.generated[i] for i in clips]), torch.cat(true))


class KernelDistance(_Features):
    """Squared maximum mean discrepancy of features with a polynomial kernel; `kd_dinov2`, `kd_vjepa2` and the like.

    With k(x, y) = (x·y / D + 1)³, the mean of k between generated videos, plus that between true videos, minus twice
    that between generated and true ones. Frames of one video, copies of it in a bootstrap draw, and a video and its
    own truth are not independent: such pairs are left out, so the value is unbiased, also for few clips, and it can be
    slightly negative. Where clips have truths, it is the U-statistic of pairs, and exactly 0 for equal videos.

    Source: KID of Bińkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012 (JMLR 13), eq. 3 for
    separate true videos, eq. 4 for pairs; on video features as JEDi, Luo et al. 2024 (arXiv 2410.05203).
    """

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], name: str):
        super().__init__(features, name)
        self._means: tuple[tuple[int, int], list[torch.Tensor]] | None = None

    def compute(self, indices: Sequence[int] | None = None) -> float | None:
        """Return the distance, of all clips or of a draw; None with fewer than MIN_VIDEOS clips or true videos."""
        clips = self._usable(indices)
        if len(set(clips)) < MIN_VIDEOS or 0 < len(self.references) < MIN_VIDEOS:
            return None
        ours, theirs, between = self._kernel_means()
        draws = torch.bincount(torch.tensor(clips), minlength=len(self.generated)).double()  # (N,)
        pairs = draws[:, None] * draws
        pairs.fill_diagonal_(0)
        if not self.references:
            values = ours + theirs - between - between.T
            return ((pairs * values).sum() / pairs.sum()).item()
        count = len(self.references)
        true = (theirs.sum() - theirs.trace()) / (count * (count - 1))
        cross = (draws @ between).sum() / (draws.sum() * count)
        return ((pairs * ours).sum() / pairs.sum() + true - 2 * cross).item()

    def _kernel_means(self):
        """Return the mean kernel between any two videos: generated, true, and generated (rows) and true."""
        counts = len(self.generated), len(self.references)
        if self._means is None or self._means[0] != counts:
            unused = torch.zeros_like(self.generated[0])  # stands for a truth that is missing, in pairs of weight 0
            true = self.references or [unused if truth is None else truth for truth in self.truths]
            pairs = ((self.generated, self.generated), (true, true), (self.generated, true))
            self._means = counts, [kernel_means(first, second) for first, second in pairs]
        return self._means[1]


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
    means = generated.mean(0), true.mean(0)
    # A'A = S and B'B = T. The eigenvalues of S·T are the squared singular values of A·B', which need no square root of
    # a matrix and are exact also where there are fewer frames than dimensions.
    a, b = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((generated, true), means))
    if a.shape[1] < min(len(a), len(b)):  # the triangular factors have fewer rows than A and B, and the same A'A, B'B
        a, b = (torch.linalg.qr(x, mode="r").R for x in (a, b))
    root = torch.linalg.svdvals(a @ b.T).sum()
    distance = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(distance.item(), 0.0)


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
