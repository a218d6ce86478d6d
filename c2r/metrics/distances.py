"""Distances between the generated and the true videos as sets: Fréchet and kernel distances of their features."""

from collections.abc import Callable, Sequence

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

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], name: str):
        self.features, self.name = features, name
        self.generated: list[torch.Tensor] = []
        self.scenes: list[str] = []  # of `generated`
        self.truths: dict[str, torch.Tensor] = {}  # {scene: of its truth}
        self.references: list[torch.Tensor] = []

    def update(self, clip: EvaluatedClip) -> None:
        """Add a clip: its video to the generated set, its truth to the true set, once for each name."""
        self.generated.append(self.features(clip.video).double())
        self.scenes.append(clip.name)
        if clip.truth is not None and clip.name not in self.truths:
            self.truths[clip.name] = self.features(clip.truth).double()

    def update_reference(self, video: torch.Tensor) -> None:
        """Add a true video that belongs to no clip; from then on the truths of clips are not used."""
        self.references.append(self.features(video).double())

    def _usable(self, indices):
        """Return the clips of a draw that have what is needed, a truth or references; none if they are too few."""
        indices = range(len(self.generated)) if indices is None else indices
        clips = [i for i in indices if self.references or self.scenes[i] in self.truths]
        too_few = len({self.scenes[i] for i in clips}) < MIN_VIDEOS or 0 < len(self.references) < MIN_VIDEOS
        return [] if too_few else clips


class FrechetDistance(_Features):
    """Fréchet distance of the features of frames; `fd_dinov2` and the like. See `frechet_distance`.

    It is biased upwards, the more so the fewer frames there are and the more alike those of a clip: compare only sets
    with equal numbers of clips and frames, and against one true set. The kernel distance has no such bias.
    """

    def compute(self, indices: Sequence[int] | None = None) -> float | None:
        """Return the distance of all clips or of some, see `SetMetric`."""
        clips = self._usable(indices)
        if not clips:
            return None
        true = self.references or [self.truths[self.scenes[i]] for i in clips]
        return frechet_distance(torch.cat([self.generated[i] for i in clips]), torch.cat(true))


class KernelDistance(_Features):
    """Squared maximum mean discrepancy of features with a polynomial kernel; `kd_dinov2`, `kd_vjepa2` and the like.

    With k(x, y) = (x·y / D + 1)³, the mean of k between generated videos, plus that between true videos, minus twice
    that between generated and true ones. Frames of one video, several videos of one scene, and a video and its own
    truth are not independent: such pairs are left out, so the value is unbiased, also for few clips, and it can be
    slightly negative. Where clips have truths, it is the U-statistic of pairs, and 0 for equal videos.

    Source: KID of Bińkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012 (JMLR 13), eq. 3 for
    separate true videos, eq. 4 for pairs; on video features as JEDi, Luo et al. 2024 (arXiv 2410.05203).
    """

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], name: str):
        super().__init__(features, name)
        self._block: dict[int, int] = {}  # {clip: its row in the matrices below}
        self._means: tuple[int, list[torch.Tensor]] = (0, [])  # number of references, and see `_kernel_means`

    def compute(self, indices: Sequence[int] | None = None) -> float | None:
        """Return the distance of all clips or of some, see `SetMetric`."""
        clips = self._usable(indices)
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
            pairs = ((generated, generated), (true, true), (generated, true))
            self._means = len(self.references), [kernel_means(first, second) for first, second in pairs]
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
