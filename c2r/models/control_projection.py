"""A frozen linear projection of DINOv3's features on the directions that agree between looks of one place.

DINOv3's features carry layout and look. What the control branch cannot see, it cannot copy: before the adapter the
features are projected on directions v that solve B v = λ W v, where B is the scatter of places within a frame (of the
mean over two looks of one place) and W the scatter of looks (of their difference). All v are orthogonal to the
differences between the looks' means, so that no coordinate tells CG from real by its mean.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import torch
from pydantic import Field, FiniteFloat, PositiveInt
from torch import nn
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import parse_json, save_tensors
from c2r.models.control_adapter import ControlAdapter
from c2r.models.hub import SafetensorsFile

#: Value of --control_projection that fits one.
FIT = "fit"
#: Most directions that are tried and stored.
MAX_DIRECTIONS = 512
#: Most directions that the erased means take from the features' width: those between six means, two of each kind of
#: pairs of looks.
MAX_ERASED = 5

#: Added to the scatter of looks, as a share of the mean scatter of a coordinate: directions in which the sample hardly
#: varies must not come first.
RIDGE = 0.05
#: Smallest length and deviation that count, as a share of the deviation of a feature and of the largest variance.
RANK_TOLERANCE = 1e-6

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Figure(NamedTuple):
    """An accuracy and its 90 % interval over files; 0.5 is chance, 1 is always right."""

    mean: Share
    low: Share = 0.0
    high: Share = 1.0


class Certificate(TypedDict):
    """Accuracies of probes on the features of files that neither the fit nor the choice has seen.

    `cg_or_real`: a place of a coarse control from one of a real clip. `cg_or_real_clip`: the same of a whole clip, by
    the means over its places. `look`: two looks of one place, of the kind of looks that a probe tells best. `place`: a
    place in another look from another place of the same frame.
    """

    cg_or_real: Figure
    cg_or_real_clip: Figure
    look: Figure
    place: Figure


class ProjectionMetadata(TypedDict):
    """The checked metadata of a projection's file."""

    directions: PositiveInt  #: directions to use
    projected: dict[str, Certificate]  #: {number of directions: its figures}
    unprojected: Certificate
    dinov3: str  #: fingerprint of the DINOv3 whose features it projects
    datasets: list[str]  #: folders of the datasets that it was fitted on


@dataclass
class FittedProjection:
    """A projection, its directions in the order in which they should be kept."""

    mean: torch.Tensor  #: (Dd,) fp32
    directions: torch.Tensor  #: (n, Dd) fp32, n ≥ `num_directions`; over places and looks a coordinate has variance 1
    num_directions: int  #: directions to use
    projected: dict[int, Certificate]  #: {number of directions: its figures}, `num_directions` among them
    unprojected: Certificate
    dinov3: str  #: fingerprint of the DINOv3 whose features it projects
    datasets: list[str]  #: names of the datasets that it was fitted on

    @property
    def certificate(self) -> dict[str, float]:
        """The figures of the number of directions that is used, and of the features as they are, for a contract.

        {figure + "_projected" or "_unprojected", and with "_low" or "_high" the bounds of its interval: accuracy}
        """
        both = {"projected": self.projected[self.num_directions], "unprojected": self.unprojected}
        return {
            f"{name}_{kind}{suffix}": float(value)
            for kind, figures in both.items()
            for name, figure in cast(dict[str, Figure], figures).items()
            for suffix, value in zip(("", "_low", "_high"), figure)
        }


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
        coordinates = (features.float() - mean.float()) @ directions.float().T
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
        # Frame by frame: in fp32 the features of a whole clip would take gigabytes.
        frames = [project(frame, self.mean, self.directions) for frame in control_features.unbind(1)]
        coordinates = torch.stack(frames, 1)
        if kept is None:
            return coordinates
        numbers = torch.arange(coordinates.shape[-1], device=coordinates.device)
        return coordinates * (numbers < kept[:, None])[:, None, None, None]


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
class _KindSums:
    """Sums over the pairs of one kind."""

    one: torch.Tensor  #: (Dd,), of one look
    other: torch.Tensor  #: (Dd,)
    looks: torch.Tensor  #: (Dd, Dd), products of half the difference
    places: torch.Tensor  #: (Dd, Dd), products of the middle less its mean over the frame
    pairs: int = 0


@dataclass
class LookScatter:
    """Scatter matrices of pairs of looks, summed up batch by batch in fp64. All kinds of pairs weigh the same.

    Args:
        feature_dim: Dd.
    """

    feature_dim: int
    _kinds: dict[str, _KindSums] = field(default_factory=dict)

    def __post_init__(self):
        self._products = self._zeros(2)  # of both looks of all pairs

    def _zeros(self, dims):
        return torch.zeros((self.feature_dim,) * dims, dtype=torch.float64)

    def add(self, kind: str, one: torch.Tensor, other: torch.Tensor):
        """Add the features (frames, places, Dd) of places in two looks.

        Args:
            kind: names the two looks; each kind has means of its own.
            one, other: in the same order of places.
        """
        one, other = one.double().cpu(), other.double().cpu()
        zeros = [self._zeros(dims) for dims in (1, 1, 2, 2)] if kind not in self._kinds else []
        sums = self._kinds[kind] if kind in self._kinds else self._kinds.setdefault(kind, _KindSums(*zeros))
        middle = (one + other) / 2
        # A look of a whole frame that both looks share, such as fog, is no place.
        middle = (middle - middle.mean(1, keepdim=True)).flatten(0, 1)
        one, other = one.flatten(0, 1), other.flatten(0, 1)
        half = (one - other) / 2
        sums.pairs += len(one)
        sums.one += one.sum(0)
        sums.other += other.sum(0)
        sums.looks.addmm_(half.T, half)
        sums.places.addmm_(middle.T, middle)
        self._products.addmm_(one.T, one).addmm_(other.T, other)

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean (Dd,) and all directions (n, Dd), fp64, by falling λ.

        B v = λ (W + ridge) v within {v: vᵀ(μᵢ − μⱼ) = 0 for all looks i, j}, μ being the looks' means.

        Raises:
            ValueError: nothing was added, or the features do not vary.
        """
        if not self._kinds:
            raise ValueError("no pair of looks was added")
        kinds = self._kinds.values()
        means = torch.stack([look / sums.pairs for sums in kinds for look in (sums.one, sums.other)])
        mean = means.mean(0)
        looks, places = self._zeros(2), self._zeros(2)
        for sums in kinds:
            half = (sums.one - sums.other) / 2 / sums.pairs
            looks += (sums.looks / sums.pairs - torch.outer(half, half)) / len(kinds)
            places += sums.places / sums.pairs / len(kinds)
        # Directions that are kept have one mean over all looks, `mean`.
        total = self._products / (2 * sum(sums.pairs for sums in kinds)) - torch.outer(mean, mean)
        spread = (total.trace() / len(mean)).clamp(min=0).sqrt()
        erased = _span(means - mean, RANK_TOLERANCE * spread)  # (Dd, r)
        allowed = torch.linalg.qr(torch.cat([erased, torch.eye(len(mean), dtype=torch.float64)], 1)).Q
        allowed = allowed[:, erased.shape[1] : len(mean)]  # (Dd, Dd − r), orthonormal
        within, between, total = (allowed.T @ matrix @ allowed for matrix in (looks, places, total))
        size = (within + between).trace() / max(len(within), 1)
        if not size > RANK_TOLERANCE**2 * mean.square().mean():
            raise ValueError("the features do not vary")
        lower = torch.linalg.cholesky(within + RIDGE * size * torch.eye(len(within), dtype=torch.float64))
        whitened = torch.linalg.solve_triangular(lower, between, upper=False)
        whitened = torch.linalg.solve_triangular(lower, whitened.T.contiguous(), upper=False)
        _, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
        vectors = torch.linalg.solve_triangular(lower.T.contiguous(), vectors.flip(1), upper=True)  # (Dd − r, n)
        variance = torch.einsum("ij,ik,kj->j", vectors, total, vectors)
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
        "dinov3": projection.dinov3,
        "datasets": projection.datasets,
    }
    save_tensors(path, {MEAN: projection.mean, DIRECTIONS: projection.directions}, metadata)


def check_projection(path: str | Path, feature_dim: int, num_directions: int | None = None) -> ProjectionMetadata:
    """Check a projection's file by its header, before a tensor is read.

    Args:
        path: a file that `save_projection` wrote.
        feature_dim: Dd of the DINOv3 that it must fit.
        num_directions: directions to use instead of those that the file names.

    Raises:
        InputError: it cannot be read, is no projection, is one of features of another width, or has no figures for
            this number of directions.
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
    named, available = {str(metadata["directions"]), *metadata["projected"]}, shapes[DIRECTIONS][0]
    if not all(name.isdecimal() and 0 < int(name) <= available for name in named):
        raise InputError(f"{path}: has {available} directions, but names {', '.join(sorted(named))}; copy it again")
    if str(metadata["directions"]) not in metadata["projected"]:
        raise InputError(f"{path}: has no figures of its {metadata['directions']} directions; copy it again")
    if num_directions is not None and str(num_directions) not in metadata["projected"]:
        raise InputError(
            f"--control_directions {num_directions}: {path} has figures for {', '.join(metadata['projected'])} "
            f"directions; give one of these, or --control_projection {FIT}"
        )
    return metadata


def require_same_dinov3(path: str | Path, metadata: ProjectionMetadata, dinov3: str) -> None:
    """Raise InputError if a projection is for features of another DINOv3 than the one of this fingerprint."""
    if metadata["dinov3"] != dinov3:
        raise InputError(
            f"{path}: was fitted on the features of another DINOv3 (on {', '.join(metadata['datasets'])}); give that "
            f"one as --dinov3, or --control_projection {FIT}"
        )


def load_projection(path: str | Path, feature_dim: int, num_directions: int | None = None) -> FittedProjection:
    """Read a projection's file. For the arguments see `check_projection`.

    Raises:
        InputError: see `check_projection`, or a number in it is not finite.
    """
    metadata = check_projection(path, feature_dim, num_directions)
    file = SafetensorsFile(Path(path))
    mean, directions = file.tensor(MEAN), file.tensor(DIRECTIONS)
    if not (mean.isfinite().all() and directions.isfinite().all()):
        raise InputError(f"{path}: holds a number that is not finite; copy it again, or fit another")
    return FittedProjection(
        *(mean, directions, num_directions or metadata["directions"]),
        projected={int(number): figures for number, figures in metadata["projected"].items()},
        unprojected=metadata["unprojected"],
        dinov3=metadata["dinov3"],
        datasets=metadata["datasets"],
    )
