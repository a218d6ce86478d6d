"""A frozen linear projection of DINOv3's features on the directions that agree between looks of one place.

DINOv3's features carry layout and look. What the control branch cannot see, it cannot copy: before the adapter the
features are projected on directions v that solve B v = λ W v, where B is the scatter of places (the mean over two
looks of one place) and W the scatter of looks (their difference). Within the directions in which the means of all
looks are equal, so that no linear function of a coordinate's mean tells CG from real.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import torch
from pydantic import Field, FiniteFloat, PositiveInt
from torch import nn
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import parse_json, save_tensors
from c2r.models.control_adapter import ControlAdapter
from c2r.models.hub import SafetensorsFile

#: Added to the scatter of looks, as a share of the mean scatter of a coordinate: directions in which the sample hardly
#: varies must not come first.
RIDGE = 0.05
#: Smallest length and deviation that count, as a share of the deviation of a feature and of the largest variance.
RANK_TOLERANCE = 1e-6

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Certificate(TypedDict):
    """Accuracies of probes on the features of held-out files; 0.5 is chance, 1 is always right.

    `cg_or_real`: coarse controls from real clips. `look`: two looks of one frame. `place`: a place in another look
    from another place of the same frame.
    """

    cg_or_real: Share
    look: Share
    place: Share


FIGURES: tuple[Literal["cg_or_real", "look", "place"], ...] = ("cg_or_real", "look", "place")


class ProjectionMetadata(TypedDict):
    """The checked metadata of a projection's file."""

    available: NotRequired[PositiveInt]  #: directions in the file, filled in from its tensor
    directions: PositiveInt  #: directions to use
    projected: Certificate
    unprojected: Certificate


@dataclass
class FittedProjection:
    """A projection, its directions in the order in which they should be kept."""

    mean: torch.Tensor  #: (Dd,) fp32
    directions: torch.Tensor  #: (n, Dd) fp32, n ≥ `num_directions`; over places and looks a coordinate has variance 1
    num_directions: int  #: directions to use
    projected: Certificate
    unprojected: Certificate


def project(features: torch.Tensor, mean: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return directions · (features − mean) in fp32; features that are all zero, a blank control, stay zero.

    Args:
        features: (..., Dd).
        mean: (Dd,).
        directions: (K, Dd).

    Returns:
        (..., K).
    """
    with torch.autocast(features.device.type, enabled=False):
        coordinates = (features.float() - mean) @ directions.T
    return coordinates * features.any(-1, keepdim=True)


class ControlProjection(nn.Module):
    """The frozen projection in front of the adapter.

    Its tensors are parameters that need no gradient, not buffers: engines split and send parameters alone.

    Args:
        feature_dim: Dd, DINOv3's width.
        directions: K.
    """

    def __init__(self, feature_dim: int, directions: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(feature_dim), requires_grad=False)
        self.directions = nn.Parameter(torch.zeros(directions, feature_dim), requires_grad=False)

    def fill(self, projection: FittedProjection):
        """Take over the first K directions of a fitted projection."""
        with torch.no_grad():
            self.mean.copy_(projection.mean)
            self.directions.copy_(projection.directions[: len(self.directions)])

    def forward(self, control_features: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Project (B, F, h, w, Dd) to (B, F, h, w, K), see `project`.

        Args:
            control_features: any float dtype.
            kept: (B,), how many directions each sample keeps; the others are zero. None keeps all.
        """
        coordinates = project(control_features, self.mean, self.directions)
        if kept is None:
            return coordinates
        places = torch.arange(coordinates.shape[-1], device=coordinates.device)
        return coordinates * (places < kept[:, None])[:, None, None, None]


class ProjectedControlAdapter(ControlAdapter):
    """An adapter that sees the projected features alone.

    It has no LayerNorm: over K coordinates that would remove what two of them or fewer say, and rescale the others
    when the tail is dropped. The coordinates have variance 1.

    Args:
        feature_dim: Dd, DINOv3's width.
        directions: K, the adapter's own width.
        dim, temporal_stride, gated, causal: see `ControlAdapter`.
    """

    def __init__(
        self,
        feature_dim: int,
        directions: int,
        dim: int,
        temporal_stride: int = 4,
        gated: bool = False,
        causal: bool = False,
    ):
        super().__init__(directions, dim, temporal_stride, gated, causal, scaled=True)
        self.projection = ControlProjection(feature_dim, directions)

    def forward(
        self,
        control_features: torch.Tensor,
        token_grid: tuple[int, int, int],
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return control tokens, see `ControlAdapter`; `kept`, see `ControlProjection`."""
        return super().forward(self.projection(control_features, kept), token_grid)


# ----------------------------------------------------------------------------------------------------------------- fit


@dataclass
class LookScatter:
    """Scatter matrices of pairs of looks, summed up batch by batch in fp64.

    Args:
        feature_dim: Dd.
    """

    feature_dim: int
    _sums: dict[str, list] = field(default_factory=dict)  # {kind: [pairs, sum of one look, sum of the other]}

    def __post_init__(self):
        self._looks, self._places = (
            torch.zeros(self.feature_dim, self.feature_dim, dtype=torch.float64) for _ in range(2)
        )

    def add(self, kind: str, one: torch.Tensor, other: torch.Tensor):
        """Add the features (n, Dd) of n places in two looks.

        Args:
            kind: names the two looks; each kind has means of its own.
            one, other: in the same order of places.
        """
        one, other = one.double().cpu(), other.double().cpu()
        sums = self._sums.setdefault(kind, [0, 0.0, 0.0])
        sums[0] += len(one)
        sums[1], sums[2] = sums[1] + one.sum(0), sums[2] + other.sum(0)
        half, middle = (one - other) / 2, (one + other) / 2
        self._looks.addmm_(half.T, half)
        self._places.addmm_(middle.T, middle)

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean (Dd,) and all directions (n, Dd), fp64, by falling λ.

        B v = λ (W + ridge) v within {v: vᵀ(μᵢ − μⱼ) = 0 for all looks i, j}, μ being the looks' means.

        Raises:
            ValueError: nothing was added, or the features do not vary.
        """
        count = sum(sums[0] for sums in self._sums.values())
        if count == 0:
            raise ValueError("no pair of looks was added")
        looks, places, means = self._looks.clone(), self._places.clone(), []
        for pairs, one, other in self._sums.values():
            half, middle = (one - other) / 2 / pairs, (one + other) / 2 / pairs
            looks -= pairs * torch.outer(half, half)
            places -= pairs * torch.outer(middle, middle)
            means += [one / pairs, other / pairs]
        looks, places = looks / count, places / count
        mean = torch.stack(means).mean(0)
        spread = ((looks + places).trace() / len(mean)).clamp(min=0).sqrt()
        erased = _span(torch.stack(means) - mean, RANK_TOLERANCE * spread)  # (Dd, r)
        allowed = torch.linalg.qr(torch.cat([erased, torch.eye(len(mean), dtype=torch.float64)], 1)).Q
        allowed = allowed[:, erased.shape[1] : len(mean)]  # (Dd, Dd − r), orthonormal
        within, between = allowed.T @ looks @ allowed, allowed.T @ places @ allowed
        total = (within + between).trace() / len(within)
        if not total > 0:
            raise ValueError("the features do not vary")
        lower = torch.linalg.cholesky(within + RIDGE * total * torch.eye(len(within), dtype=torch.float64))
        whitened = torch.linalg.solve_triangular(lower, between, upper=False)
        whitened = torch.linalg.solve_triangular(lower, whitened.T.contiguous(), upper=False)
        _, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
        vectors = torch.linalg.solve_triangular(lower.T.contiguous(), vectors.flip(1), upper=True)  # (Dd − r, n)
        variance = torch.einsum("ij,ik,kj->j", vectors, within + between, vectors)
        # A direction without variance would be noise at variance 1.
        kept = variance > RANK_TOLERANCE * variance.max()
        directions = (allowed @ (vectors / variance.clamp(min=1e-300).sqrt())).T[kept]
        # The sign of an eigenvector is arbitrary.
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        return mean, directions * signs


def _span(rows, tolerance):
    """Return an orthonormal basis (Dd, r) of the rows' span; what is not longer than the tolerance is rounding."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > tolerance].T


# ---------------------------------------------------------------------------------------------------------------- file

MEAN, DIRECTIONS = "mean", "directions"


def save_projection(path: Path, projection: FittedProjection) -> None:
    """Write a projection with its figures."""
    metadata = {
        "directions": projection.num_directions,
        "projected": projection.projected,
        "unprojected": projection.unprojected,
    }
    save_tensors(path, {MEAN: projection.mean, DIRECTIONS: projection.directions}, metadata)


def check_projection(path: str | Path, feature_dim: int) -> ProjectionMetadata:
    """Check a projection's file by its header, before a tensor is read.

    Args:
        path: a file that `save_projection` wrote.
        feature_dim: Dd of the DINOv3 that it must fit.

    Raises:
        InputError: it cannot be read, is no projection, or is one for another DINOv3.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give one that a run with --control_projection fit has written")
    file = SafetensorsFile(path)
    shapes = {key: tuple(file.shape(key)) for key in file.keys()}  # noqa: SIM118, it is no dict
    fits = shapes.keys() == {MEAN, DIRECTIONS} and len(shapes[DIRECTIONS]) == 2 and shapes[DIRECTIONS][0] > 0
    if not fits or shapes[MEAN] != shapes[DIRECTIONS][1:] or {file.dtype(key) for key in shapes} != {"F32"}:
        raise InputError(
            f"{path}: is no control projection, which has {MEAN} (Dd,) and {DIRECTIONS} (n, Dd) in fp32; give a "
            "control_projection.safetensors"
        )
    if shapes[MEAN] != (feature_dim,):
        raise InputError(
            f"{path}: projects features of width {shapes[MEAN][0]}, --dinov3 gives {feature_dim}; give the DINOv3 "
            "that it was fitted with, or fit another"
        )
    metadata = parse_json(file.metadata.get("c2r", "{}"), ProjectionMetadata, path, extra="allow")
    if metadata["directions"] > shapes[DIRECTIONS][0]:
        raise InputError(
            f"{path}: has {shapes[DIRECTIONS][0]} directions, but names {metadata['directions']}; copy it again"
        )
    metadata["available"] = shapes[DIRECTIONS][0]
    return metadata


def read_certificate(path: str | Path) -> dict[str, float]:
    """Return the figures of a projection's file for a contract.

    Returns:
        {figure + "_projected" or "_unprojected": accuracy}.

    Raises:
        InputError: the file cannot be read.
    """
    text = SafetensorsFile(Path(path)).metadata.get("c2r", "{}")
    metadata = parse_json(text, ProjectionMetadata, path, extra="allow")
    both = {"projected": metadata["projected"], "unprojected": metadata["unprojected"]}
    return {f"{name}_{kind}": float(figures[name]) for kind, figures in both.items() for name in FIGURES}


def load_projection(path: str | Path, feature_dim: int) -> FittedProjection:
    """Read a projection's file, see `check_projection`.

    Raises:
        InputError: see `check_projection`, or a number in it is not finite.
    """
    metadata = check_projection(path, feature_dim)
    file = SafetensorsFile(Path(path))
    mean, directions = file.tensor(MEAN), file.tensor(DIRECTIONS)
    if not (mean.isfinite().all() and directions.isfinite().all()):
        raise InputError(f"{path}: holds a number that is not finite; copy it again, or fit another")
    return FittedProjection(mean, directions, metadata["directions"], metadata["projected"], metadata["unprojected"])


# -------------------------------------------------------------------------------------------------------------- probes


def probe_accuracy(train: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor]) -> float:
    """Return how often a ridge regression on features and their squares tells two classes, on held-out features.

    The squares see what equal means hide, such as texture.

    Args:
        train, held_out: two classes each, (n, k) per class.

    Returns:
        share of right answers, the mean over both classes; 0.5 is chance.
    """
    rows = [_with_squares(features) for features in train]
    centre = sum(x.mean(0) for x in rows) / 2
    scale = torch.cat([x - centre for x in rows]).square().mean(0).sqrt() + 1e-9
    rows = [(x - centre) / scale / len(x) ** 0.5 for x in rows]
    labels = torch.cat([torch.full((len(x),), sign / len(x) ** 0.5).double() for x, sign in zip(rows, (-1, 1))])
    matrix = torch.cat(rows)
    products = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    penalty = 1e-3 * products.trace() / min(matrix.shape) * torch.eye(len(products), dtype=torch.float64)
    if len(matrix) < matrix.shape[1]:
        weights = matrix.T @ torch.linalg.solve(products + penalty, labels)
    else:
        weights = torch.linalg.solve(products + penalty, matrix.T @ labels)
    scores = [(_with_squares(features) - centre) / scale @ weights for features in held_out]
    right = [(score * sign > 0).double() + 0.5 * (score == 0) for score, sign in zip(scores, (-1, 1))]
    return float(sum(x.mean() for x in right) / 2)


def _with_squares(features):
    features = features.double()
    return torch.cat([features, features.square()], 1)


def place_accuracy(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how often a place in one look is nearer to itself in the other look than another place of its frame is.

    Args:
        one, other: (frames, places, k), two looks in the same order. The other place is the next one in the order.

    Returns:
        share of places; a tie counts half, 0.5 is chance.
    """
    own = (one - other).double().square().sum(-1)
    wrong = (one - other.roll(1, 1)).double().square().sum(-1)
    return float(((own < wrong).double() + 0.5 * (own == wrong)).mean())
