"""The CG monitor: judge if the samples of a phase 2 run look like its real clips or like its CG clips.

Scores run from 0, the mean of the real clips, to 1, the mean of the CG clips. There are four measures: texture,
lighting and geometry of the pixels (`c2r.evaluation.cg_measures`), and a linear probe on frozen DINOv3 features. A
measure that cannot separate the dataset's own real clips from its CG clips tells nothing about samples either. Its
held-out accuracy shows this, and the CG look leaves the measure out.

Samples are decoded by the VAE. The clips that they are compared with must therefore be decoded from their cached
latents, not read from the videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path

import torch
from torch.nn import functional as F
from typing_extensions import TypedDict

from c2r import InputError
from c2r.evaluation.cg_measures import geometry, lighting, texture
from c2r.evaluation.discriminants import (
    accuracy_of,
    fit_discriminant,
    fit_probe,
    folds_of,
    held_out_scores,
    rescale,
)
from c2r.files import damaged_cache_error, load_tensors, save_tensors

MEASURES = ("texture", "lighting", "geometry", "dinov3")

#: A measure counts for the CG look if its held-out accuracy is above this; chance is 0.5.
MIN_ACCURACY = 0.75

#: Files of each domain in a reference: with fewer, differences of single scenes look like differences of domains.
MIN_FILES = 3

#: The score of a clip is clamped to this range, so that one outlier does not decide.
SCORE_RANGE = (-1.0, 2.0)

#: Bootstrap of the mean score: number of resamples, and confidence of the interval.
RESAMPLES, CONFIDENCE = 1000, 0.9


class _ReferenceFiles(TypedDict):
    real: list[str]
    cg: list[str]
    coarse: list[str]


class _ReferenceMetadata(TypedDict):
    """The part of a stored reference's metadata that is read."""

    files: _ReferenceFiles


@torch.no_grad()
def clip_features(frames: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the features by which the monitor judges a clip.

    Args:
        frames: (F, 3, H, W) floats in [0, 1], as the VAE decodes them; H and W as in the reference.
        features: (F, h, w, Dd), DINOv3's patch features of the same frames.

    Returns:
        dict of 1-D fp32 tensors on CPU: "texture", "lighting" and "geometry", see `c2r.evaluation.cg_measures`;
        "dinov3", (Dd,), the mean over patches and frames.
    """
    frames = frames.float().clamp(0, 1)
    values = {"texture": texture(frames), "lighting": lighting(frames), "geometry": geometry(frames)}
    values["dinov3"] = features.float().mean((0, 1, 2))
    return {name: value.cpu() for name, value in values.items()}


@dataclass
class Reference:
    """The clips that samples are compared with.

    Attributes:
        features: {"real", "cg": {measure: (n, k) fp32}, "coarse": {"dinov3": (n, Dd)}}; `coarse` holds the coarse
            renderings of the CG clips.
        files: {"real", "cg", "coarse": n names}. A cross-validation keeps the clips of one file on one side. A coarse
            rendering has the name of its CG clip.
    """

    features: dict[str, dict[str, torch.Tensor]]
    files: dict[str, tuple[str, ...]]

    @classmethod
    def from_clips(cls, **domains: list[tuple[str, dict[str, torch.Tensor]]]) -> "Reference":
        """Build a reference from real=, cg= and coarse=, each a list of (file, `clip_features`)."""
        features, files = {}, {}
        for domain, clips in domains.items():
            measures = ("dinov3",) if domain == "coarse" else MEASURES
            features[domain] = {m: torch.stack([values[m] for _, values in clips]) for m in measures}
            files[domain] = tuple(file for file, _ in clips)
        return cls(features, files)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {f"{domain}.{m}": x for domain, group in self.features.items() for m, x in group.items()}
        save_tensors(Path(path), tensors, {"files": self.files})

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read a file written by `save`.

        Raises:
            InputError: the file is missing or damaged.
        """
        names = [f"{domain}.{m}" for domain in ("real", "cg") for m in MEASURES] + ["coarse.dinov3"]
        tensors, metadata = load_tensors(Path(path), names, _ReferenceMetadata)
        files: dict[str, list[str]] = {**metadata["files"]}
        features: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            domain, measure = name.split(".")
            if tensor.ndim != 2 or not tensor.is_floating_point() or len(tensor) != len(files[domain]):
                raise damaged_cache_error(Path(path))
            features.setdefault(domain, {})[measure] = tensor
        return cls(features, {domain: tuple(names) for domain, names in files.items()})


@dataclass
class Score:
    """A score of some clips: 0 = like the real clips, 1 = like the CG clips; NaN if it cannot be computed.

    Attributes:
        mean: the mean over the clips.
        low, high: bootstrap interval of the mean, with confidence CONFIDENCE.
        accuracy: held-out accuracy of separating real from CG clips by this measure; NaN for the mean of several.
    """

    mean: float
    low: float
    high: float
    accuracy: float = nan

    def __str__(self):
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class CGLook:
    """The judgement of `CGMonitor.judge`.

    Attributes:
        look: the mean of the informative measures; NaN if there is none.
        measures: {measure: score}, all measures.
        uninformative: the measures that `look` leaves out.
    """

    look: Score
    measures: dict[str, Score]
    uninformative: tuple[str, ...]

    def scalars(self) -> dict[str, float]:
        """Return the numbers for the logs, without those that are NaN."""
        scores = {"cg_look": self.look} | {f"cg_{name}": score for name, score in self.measures.items()}
        named = {
            f"{name}{ending}": getattr(score, attribute)
            for name, score in scores.items()
            for attribute, ending in (("mean", ""), ("low", "_low"), ("high", "_high"), ("accuracy", "_accuracy"))
        }
        return {name: value for name, value in named.items() if isfinite(value)}

    def __str__(self):
        if len(self.uninformative) == len(self.measures):
            return "CG look unknown: no measure tells the real clips from the CG clips; train on more clips of both"
        parts = []
        for name, score in self.measures.items():
            value = f" {score.mean:.2f}" if isfinite(score.mean) else ""
            remark = " (uninformative)" if name in self.uninformative else ""
            parts.append(f"{name}{value}{remark}")
        return f"CG look {self.look}: {', '.join(parts)}"


class CGMonitor:
    """Places samples between the real and the CG clips of a reference.

    Args:
        reference: at least MIN_FILES files in each domain.

    Attributes:
        accuracy: {measure: held-out accuracy}, the mean of both domains' accuracies, cross-validated by file.
        informative, uninformative: names of the measures above and not above MIN_ACCURACY.

    Raises:
        InputError: too few files.
    """

    def __init__(self, reference: Reference):
        for domain in ("real", "cg"):
            if len(set(reference.files[domain])) < MIN_FILES:
                raise InputError(
                    f"the CG monitor needs clips of at least {MIN_FILES} {domain} videos to tell the domains apart; "
                    "add videos"
                )
        # Centred: what the features of all clips have in common would dominate every cosine similarity.
        real, cg = reference.features["real"]["dinov3"], reference.features["cg"]["dinov3"]
        self._centre = (real.mean(0) + cg.mean(0)) / 2
        coarse = reference.features.get("coarse")
        self._coarse = None if coarse is None else coarse["dinov3"] - self._centre
        self._coarse_files = reference.files.get("coarse", ())

        tables = {d: self._tables(reference.features[d], reference.files[d]) for d in ("real", "cg")}
        folds = {d: folds_of(reference.files[d]) for d in ("real", "cg")}
        self._scorers, self.accuracy = {}, {}
        for measure in MEASURES:
            real, cg = tables["real"][measure], tables["cg"][measure]
            fit = fit_probe if measure == "dinov3" else fit_discriminant
            held_out = held_out_scores(fit, real, cg, folds["real"], folds["cg"])
            self.accuracy[measure] = accuracy_of(*held_out)
            self._scorers[measure] = rescale(fit(real, cg), *held_out) if fit is fit_probe else fit(real, cg)
        self.informative = tuple(m for m in MEASURES if self.accuracy[m] > MIN_ACCURACY)
        self.uninformative = tuple(m for m in MEASURES if m not in self.informative)

    def _tables(self, features, files):
        """Return {measure: (n, k)}: the features, those of geometry with one more column.

        It is the mean similarity to the coarse renderings of other scenes. A clip's own coarse rendering is left out,
        since it shares the layout with the clip and not only the look.
        """
        tables = {measure: features[measure] for measure in MEASURES}
        if self._coarse is not None:
            similarity = F.cosine_similarity(
                (features["dinov3"] - self._centre)[:, None], self._coarse[None], dim=-1
            )  # (n, coarse)
            others = torch.tensor([[file != own for file in self._coarse_files] for own in files])
            means = (similarity * others).sum(1) / others.sum(1).clamp(min=1)
            tables["geometry"] = torch.cat([tables["geometry"], means[:, None]], dim=1)
        return tables

    def judge(self, samples: list[dict[str, torch.Tensor]], files: Sequence[str | None] | None = None) -> CGLook:
        """Place samples between the two domains. The same samples give the same intervals.

        Args:
            samples: `clip_features` of each generated clip.
            files: for each sample, the name of the CG clip whose coarse rendering controlled it; None if unknown.
        """
        features = {measure: torch.stack([sample[measure] for sample in samples]) for measure in MEASURES}
        tables = self._tables(features, files or [None] * len(samples))
        scores = {m: self._scorers[m](tables[m]).clamp(*SCORE_RANGE) for m in MEASURES}
        measures = {m: _score(scores[m], self.accuracy[m]) for m in MEASURES}
        informative = [scores[m] for m in self.informative]
        look = torch.stack(informative).mean(0) if informative else torch.full((len(samples),), nan)
        return CGLook(_score(look), measures, self.uninformative)


def _score(values, accuracy=nan):
    """Return the mean of (n,) and its bootstrap interval."""
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[draws].mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(tail).item(), means.quantile(1 - tail).item()
    return Score(values.mean().item(), low, high, accuracy)
