"""A frozen orthogonal projection of DINOv3's features on the directions that agree between looks of one place.

DINOv3's features carry layout and look. What the control branch cannot see, it cannot copy: before the adapter the
features are projected on the span of directions v that solve B v = λ W v, where B is the scatter of places within a
frame (of the mean over two looks of one place) and W the scatter of looks (of their difference). All v are orthogonal
to the differences between the looks' means, so that nothing that is kept tells CG from real by its mean.

What is kept has the features' width and, in all, their variance, so the adapter has the same shapes with and without a
projection, and inputs of the same scale. All directions have one scale: a variance of 1 for each would make faint
differences of look as large as those between places.
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
#: Smallest length that counts, as a share of the deviation of a feature.
RANK_TOLERANCE = 1e-6
#: Largest error of a file's directions, and of the sum of its shares, for rounding in fp32.
TOLERANCE = 1e-3

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Figure(NamedTuple):
    """An accuracy (0.5 is chance, 1 is always right) or a correlation, and its 90 % interval over files."""

    mean: Share
    low: Share = 0.0
    high: Share = 1.0


class Certificate(TypedDict):
    """Figures of the features of files that neither the fit nor the choice has seen: accuracies, but for the last.

    `cg_or_real`: a place of a coarse control from one of a real clip. `cg_or_real_clip`: the same of a whole clip, by
    the means over its places. `look`: two looks of one place, of the kind of looks that a probe tells best. `place`: a
    place in another look from another place of the same frame. `agreement`: the correlation between the looks of a
    place, both less the mean of their frame, of the direction in which it is lowest.
    """

    cg_or_real: Figure
    cg_or_real_clip: Figure
    look: Figure
    place: Figure
    agreement: Figure


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
    directions: torch.Tensor  #: (n, Dd) fp32, orthonormal, n ≥ `num_directions`
    shares: torch.Tensor  #: (n,) fp32, share of the features' variance along each direction
    num_directions: int  #: directions to use
    projected: dict[int, Certificate]  #: {number of directions: its figures}, `num_directions` among them
    unprojected: Certificate
    dinov3: str  #: fingerprint of the DINOv3 whose features it projects
    datasets: list[str]  #: names of the datasets that it was fitted on

    @property
    def certificate(self) -> dict[str, float]:
        """The figures of the number of directions that is used, and of the features as they are, for a contract.

        {figure + "_projected" or "_unprojected", and with "_low" or "_high" the bounds of its interval: value}
        """
        both = {"projected": self.projected[self.num_directions], "unprojected": self.unprojected}
        return {
            f"{name}_{kind}{suffix}": float(value)
            for kind, figures in both.items()
            for name, figure in cast(dict[str, Figure], figures).items()
            for suffix, value in zip(("", "_low", "_high"), figure)
        }


def most_directions(feature_dim: int) -> int:
    """Return how many directions a projection of features of this width can have, with any kinds of pairs."""
    return min(feature_dim - MAX_ERASED, MAX_DIRECTIONS)


def coordinates_of(features: torch.Tensor, mean: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return directions · (features − mean), (..., K) in fp32.

    Args:
        features: (..., Dd).
        mean: (Dd,).
        directions: (K, Dd).
    """
    with torch.autocast(features.device.type, enabled=False):
        return (features.float() - mean.float()) @ directions.float().T


class ControlProjection(nn.Module):
    """Projects features x on the span of the directions V: mean + Vᵀ V (x − mean), in fp32.

    The rows of V are orthogonal and of one length, whose square is the factor by which deviations from the mean grow.
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
        """Take over the first K directions of a fitted projection, scaled to keep the features' variance."""
        number = len(self.directions)
        scale = projection.shares[:number].sum() ** -0.25
        with torch.no_grad():
            self.mean.copy_(projection.mean)
            # They are applied twice: deviations grow by the root of 1 / share, and the variance by 1 / share.
            self.directions.copy_(scale * projection.directions[:number])

    def forward(self, control_features: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Project (B, F, h, w, Dd); features that are all zero, a blank control, stay zero.

        Args:
            control_features: any float dtype, which the result has too.
            kept: (B,), how many directions each sample keeps; None keeps all.
        """
        # Frame by frame: in fp32 the features of a whole clip would take gigabytes.
        return torch.stack([self._project(frame, kept) for frame in control_features.unbind(1)], 1)

    def _project(self, features, kept):
        """Project (B, h, w, Dd)."""
        coordinates = coordinates_of(features, self.mean, self.directions)
        if kept is not None:
            numbers = torch.arange(coordinates.shape[-1], device=coordinates.device)
            coordinates = coordinates * (numbers < kept[:, None])[:, None, None]
        with torch.autocast(features.device.type, enabled=False):
            projected = self.mean.float() + coordinates @ self.directions.float()
        return projected.to(features.dtype) * features.any(-1, keepdim=True)


class ProjectedControlAdapter(ControlAdapter):
    """An adapter that sees the projected features alone.

    Args:
        feature_dim: Dd, DINOv3's width.
        directions: K.
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
        super().__init__(feature_dim, dim, temporal_stride, gated, causal)
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
    products: torch.Tensor  #: (Dd, Dd), of both looks
    pairs: int = 0


@dataclass
class LookScatter:
    """Scatter matrices of pairs of looks, summed up batch by batch in fp64. All kinds of pairs weigh the same.

    Args:
        feature_dim: Dd.
    """

    feature_dim: int
    _kinds: dict[str, _KindSums] = field(default_factory=dict)

    def _zeros(self, dims):
        return torch.zeros((self.feature_dim,) * dims, dtype=torch.float64)

    def add(self, kind: str, one: torch.Tensor, other: torch.Tensor):
        """Add the features (frames, places, Dd) of places in two looks.

        Args:
            kind: names the two looks; each kind has means of its own.
            one, other: in the same order of places.
        """
        one, other = one.double().cpu(), other.double().cpu()
        zeros = [self._zeros(dims) for dims in (1, 1, 2, 2, 2)] if kind not in self._kinds else []
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
        sums.products.addmm_(one.T, one).addmm_(other.T, other)

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean (Dd,) and all directions (n, Dd), of length 1, in fp64 by falling λ.

        B v = λ (W + ridge) v within {v: vᵀ(μᵢ − μⱼ) = 0 for all looks i, j}, μ being the looks' means.

        Raises:
            ValueError: nothing was added, or the features do not vary.
        """
        if not self._kinds:
            raise ValueError("no pair of looks was added")
        kinds = self._kinds.values()
        means = self._means()
        mean = means.mean(0)
        looks, places = self._zeros(2), self._zeros(2)
        for sums in kinds:
            half = (sums.one - sums.other) / 2 / sums.pairs
            looks += (sums.looks / sums.pairs - torch.outer(half, half)) / len(kinds)
            places += sums.places / sums.pairs / len(kinds)
        spread = (self._total(mean).trace() / len(mean)).clamp(min=0).sqrt()
        erased = _span(means - mean, RANK_TOLERANCE * spread)  # (Dd, r)
        allowed = torch.linalg.qr(torch.cat([erased, torch.eye(len(mean), dtype=torch.float64)], 1)).Q
        allowed = allowed[:, erased.shape[1] : len(mean)]  # (Dd, Dd − r), orthonormal
        within, between = (allowed.T @ matrix @ allowed for matrix in (looks, places))
        size = (within + between).trace() / max(len(within), 1)
        if not size > RANK_TOLERANCE**2 * mean.square().mean():
            raise ValueError("the features do not vary")
        lower = torch.linalg.cholesky(within + RIDGE * size * torch.eye(len(within), dtype=torch.float64))
        whitened = torch.linalg.solve_triangular(lower, between, upper=False)
        whitened = torch.linalg.solve_triangular(lower, whitened.T.contiguous(), upper=False)
        _, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
        vectors = torch.linalg.solve_triangular(lower.T.contiguous(), vectors.flip(1), upper=True)  # (Dd − r, n)
        directions = nn.functional.normalize((allowed @ vectors).T)
        # The sign of an eigenvector is arbitrary.
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        return mean, directions * signs

    def shares(self, directions: torch.Tensor) -> torch.Tensor:
        """Return the share of the features' variance (n,) along each of orthonormal directions (n, Dd)."""
        total = self._total(self._means().mean(0))
        return torch.einsum("ni,ij,nj->n", directions.double(), total, directions.double()) / total.trace()

    def _means(self):
        """Return the means (looks, Dd) of all looks."""
        return torch.stack([look / sums.pairs for sums in self._kinds.values() for look in (sums.one, sums.other)])

    def _total(self, mean):
        """Return the scatter (Dd, Dd) of all looks about their mean."""
        products = sum(sums.products / (2 * sums.pairs) for sums in self._kinds.values()) / len(self._kinds)
        return products - torch.outer(mean, mean)


def _span(rows, tolerance):
    """Return an orthonormal basis (Dd, r) of the rows' span; what is not longer than the tolerance is rounding."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > tolerance].T


def orthonormal(directions: torch.Tensor) -> torch.Tensor:
    """Return orthonormal directions (n, Dd), of which each first k span what the first k given ones span."""
    q, r = torch.linalg.qr(directions.T.double())
    return (q * r.diagonal().sign()).T.to(directions.dtype).contiguous()


# ---------------------------------------------------------------------------------------------------------------- file

MEAN, DIRECTIONS, SHARES = "mean", "directions", "shares"


def save_projection(path: Path, projection: FittedProjection) -> None:
    """Write a projection with its figures."""
    metadata = {
        "directions": projection.num_directions,
        "projected": projection.projected,
        "unprojected": projection.unprojected,
        "dinov3": projection.dinov3,
        "datasets": projection.datasets,
    }
    tensors = {MEAN: projection.mean, DIRECTIONS: projection.directions, SHARES: projection.shares}
    save_tensors(path, tensors, metadata)


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
        raise InputError(
            f"--control_projection {path}: no such file; give {FIT}, or the control_projection.safetensors of a run"
        )
    file = SafetensorsFile(path)
    shapes = {key: tuple(file.shape(key)) for key in file.keys()}  # noqa: SIM118, it is no dict
    number, width = (*shapes.get(DIRECTIONS, ()), 0, 0)[:2]
    expected = {MEAN: (width,), DIRECTIONS: (number, width), SHARES: (number,)}
    if shapes != expected or not 0 < number <= width or {file.dtype(key) for key in shapes} != {"F32"}:
        raise InputError(
            f"{path}: is no control projection, which has {MEAN} (Dd,), {DIRECTIONS} (n, Dd) and {SHARES} (n,) in "
            "fp32; give a control_projection.safetensors"
        )
    if width != feature_dim:
        raise InputError(
            f"{path}: projects features of width {width}, --dinov3 gives {feature_dim}; give the DINOv3 "
            "that it was fitted with, or fit another"
        )
    metadata = parse_json(file.metadata.get("c2r", "{}"), ProjectionMetadata, path, extra="allow")
    named = {str(metadata["directions"]), *metadata["projected"]}
    if not all(name.isdecimal() and 0 < int(name) <= number for name in named):
        raise InputError(f"{path}: has {number} directions, but names {', '.join(sorted(named))}; copy it again")
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
        InputError: see `check_projection`, or its numbers are not those of a projection.
    """
    metadata = check_projection(path, feature_dim, num_directions)
    file = SafetensorsFile(Path(path))
    mean, directions, shares = (file.tensor(name) for name in (MEAN, DIRECTIONS, SHARES))
    products = directions @ directions.T - torch.eye(len(directions))
    plausible = shares.min() >= 0 and shares[0] > 0 and shares.sum() < 1 + TOLERANCE
    if not (mean.isfinite().all() and plausible and products.abs().max() < TOLERANCE):  # not with NaN either
        raise InputError(
            f"{path}: its directions are not orthonormal, its shares of variance are not positive or exceed 1 in sum, "
            "or a number is not finite; copy it again, or fit another"
        )
    return FittedProjection(
        *(mean, directions, shares, num_directions or metadata["directions"]),
        projected={int(number): figures for number, figures in metadata["projected"].items()},
        unprojected=metadata["unprojected"],
        dinov3=metadata["dinov3"],
        datasets=metadata["datasets"],
    )
