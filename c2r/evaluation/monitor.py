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
from math import inf, isfinite, nan
from pathlib import Path

import torch
from scipy.special import stdtrit
from torch.nn import functional as F
from typing_extensions import TypedDict

from c2r import InputError
from c2r.evaluation.cg_measures import geometry, lighting, texture
from c2r.evaluation.discriminants import (
    cross_validate,
    exceeds_chance,
    file_means,
    fit_discriminant,
    fit_probe,
)
from c2r.files import damaged_cache_error, load_tensors, save_tensors

MEASURES = ("texture", "lighting", "geometry", "dinov3")

#: A measure counts for the CG look if its held-out accuracy is above this (chance is 0.5) and exceeds chance.
MIN_ACCURACY = 0.75

#: Files of each domain in a reference: with fewer, differences of single scenes look like differences of domains.
MIN_FILES = 8

#: Scenes among the samples from which the CG share is changed and advice is given. The interval of fewer is so wide
#: that chance decides.
MIN_SCENES = 4

#: The score of a clip is clamped to this range, so that one outlier does not decide.
SCORE_RANGE = (-1.0, 2.0)

#: Confidence of the intervals that are printed and logged.
PRINTED_CONFIDENCE = 0.9


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
    """A score of some scenes: 0 = like the real clips, 1 = like the CG clips; NaN if it cannot be computed.

    Attributes:
        mean: the mean over the scenes.
        error: standard error of the mean, NaN for a single scene.
        freedom: degrees of freedom of the error.
        count: number of scenes.
        accuracy: held-out accuracy of separating real from CG clips by this measure; NaN for the mean of several.
    """

    mean: float
    error: float
    freedom: float
    count: int
    accuracy: float = nan

    def interval(self, confidence: float = PRINTED_CONFIDENCE) -> tuple[float, float]:
        """Return the bounds of the t interval of the mean, NaN for a single scene."""
        half = float(stdtrit(self.freedom, (1 + confidence) / 2)) * self.error
        return self.mean - half, self.mean + half

    @property
    def low(self) -> float:
        return self.interval()[0]

    @property
    def high(self) -> float:
        return self.interval()[1]

    def __str__(self):
        if isfinite(self.mean) and not isfinite(self.error):
            return f"{self.mean:.2f} (one scene, so no interval)"
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
        informative: the measures whose accuracy is above MIN_ACCURACY and exceeds chance.
        uninformative: the others.

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
        self._scorers, self.accuracy = {}, {}
        # {measure: (files,)}: by how much the held-out scores of a file's clips differ from the mean of its domain
        self._real_deviations: dict[str, torch.Tensor] = {}
        self._cg_deviations: dict[str, torch.Tensor] = {}
        informative = []
        for measure in MEASURES:
            fit = fit_probe if measure == "dinov3" else fit_discriminant
            real, cg = tables["real"][measure], tables["cg"][measure]
            files = reference.files["real"], reference.files["cg"]
            held_out = cross_validate(fit, real, cg, *files)
            self.accuracy[measure] = held_out.accuracy
            self._scorers[measure] = held_out.rescale(fit(real, cg))
            for deviations, scores, names in zip(
                (self._real_deviations, self._cg_deviations), held_out.rescaled(), files
            ):
                means = file_means(scores, names)
                deviations[measure] = means - means.mean()
            # At level 1/80 each, so that of four measures that know nothing, at most 5 % count.
            if held_out.accuracy > MIN_ACCURACY and exceeds_chance(held_out.accuracy, fit, real, cg, *files):
                informative.append(measure)
        self.informative = tuple(informative)
        self.uninformative = tuple(m for m in MEASURES if m not in informative)

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
                Samples of one file are alike, so that they count as one scene, by their mean.
        """
        features = {measure: torch.stack([sample[measure] for sample in samples]) for measure in MEASURES}
        tables = self._tables(features, files or [None] * len(samples))
        scenes = [file or str(number) for number, file in enumerate(files or [None] * len(samples))]
        scores = {m: file_means(self._scorers[m](tables[m]).clamp(*SCORE_RANGE), scenes) for m in MEASURES}
        measures = {m: self._score({m: scores[m]}, self.accuracy[m]) for m in MEASURES}
        look = self._score({m: scores[m] for m in self.informative})
        return CGLook(look, measures, self.uninformative)

    # With the scores s = (raw - zero) / (one - zero) and their mean L, an error of zero or one moves L by
    #     dL = -((1 - L) * dzero + L * done) / (one - zero),
    # so that its variance is the sum of that of the scenes' mean and those of both domains' means over files.
    def _score(self, scores, accuracy=nan):
        """Return the mean over measures of {measure: (scenes,)} as a score, the reference's error included."""
        if not scores:
            return Score(nan, nan, nan, 0)
        looks = torch.stack([*scores.values()])  # (measures, scenes)
        means = looks.mean(1, keepdim=True)
        parts = [
            looks.mean(0),
            ((1 - means) * torch.stack([self._real_deviations[m] for m in scores])).mean(0),
            (means * torch.stack([self._cg_deviations[m] for m in scores])).mean(0),
        ]
        # Source of the degrees of freedom: Welch 1947, Satterthwaite 1946.
        if looks.shape[1] == 1:
            return Score(looks.mean().item(), nan, nan, 1, accuracy)
        variances = [(part.double().var().item() / len(part), len(part) - 1) for part in parts]
        variance = sum(v for v, _ in variances)
        freedom = variance**2 / sum(v**2 / f for v, f in variances) if variance > 0 else inf
        return Score(looks.mean().item(), variance**0.5, freedom, looks.shape[1], accuracy)
