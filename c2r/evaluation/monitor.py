"""The CG monitor: do the samples of a phase 2 run look like its real clips or like its CG clips?

    0 = the mean of the real clips, 1 = the mean of the CG clips

on each of four measures: texture, lighting and geometry of the pixels (`c2r.cg_measures`), and a linear probe on
frozen DINOv3 features. A measure that cannot tell the dataset's own real clips from its CG clips says nothing of
samples either: its held-out accuracy says so, and the CG look leaves it out.

What is compared must have gone the same way: the samples come out of the VAE, so the reference's clips are the decoded
latents of the cache, not the videos.
"""

from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path

import torch
from torch.nn import functional as F

from c2r import InputError
from c2r.evaluation.cg_measures import geometry, lighting, texture
from c2r.files import load_tensors, save_tensors

MEASURES = ("texture", "lighting", "geometry", "dinov3")

#: A measure counts for the CG look from this held-out accuracy on; chance is 0.5.
MIN_ACCURACY = 0.75

FOLDS = 5

#: Of each domain in a reference: fewer do not show what sets the domains apart.
MIN_FILES = 3

#: Of the probe, in units of the mean squared length of a standardised feature vector.
RIDGE = 0.03

#: A difference of means counts as far as it exceeds this many of its standard errors.
SHRINKAGE = 1.0

#: The sets count as at most this many of their standard deviations apart.
MAX_DEVIATIONS = 3.0

#: A clip's score is cut to this: further out it is no longer the CG look that is measured.
SCORE_RANGE = (-1.0, 2.0)

RESAMPLES, CONFIDENCE = 1000, 0.9


@torch.no_grad()
def clip_features(frames, features):
    """What the monitor keeps of one clip.

    Args:
        frames: (F, 3, H, W) floats in [0, 1], as the VAE decodes them; H and W as in the reference.
        features: (F, h, w, Dd), DINOv3's patch features of the same frames.

    Returns:
        dict of 1-D fp32 tensors on CPU: "texture", "lighting" and "geometry", see `c2r.cg_measures`; "dinov3", (Dd,),
        the mean over patches and frames.
    """
    frames = frames.float().clamp(0, 1)
    values = {"texture": texture(frames), "lighting": lighting(frames), "geometry": geometry(frames)}
    values["dinov3"] = features.float().mean((0, 1, 2))
    return {name: value.cpu() for name, value in values.items()}


@dataclass
class Reference:
    """The clips that samples are placed between.

    Attributes:
        features: {"real", "cg": {measure: (n, k) fp32}, "coarse": {"dinov3": (n, Dd)}}; `coarse` holds the coarse
            renderings of the CG clips.
        files: {"real", "cg", "coarse": n names}. Clips of one file are never on both sides of a cross-validation, and
            the coarse rendering goes by the name of its CG clip.
    """

    features: dict
    files: dict

    @classmethod
    def from_clips(cls, **domains):
        """From real=, cg= and coarse=, each a list of (file, dict as from `clip_features`)."""
        features, files = {}, {}
        for domain, clips in domains.items():
            measures = ("dinov3",) if domain == "coarse" else MEASURES
            features[domain] = {m: torch.stack([values[m] for _, values in clips]) for m in measures}
            files[domain] = tuple(file for file, _ in clips)
        return cls(features, files)

    def save(self, path):
        """Write it as one safetensors file, atomically."""
        tensors = {f"{domain}.{m}": x for domain, group in self.features.items() for m, x in group.items()}
        save_tensors(Path(path), tensors, {"files": self.files})

    @classmethod
    def load(cls, path):
        """Raises InputError if the file is missing or damaged."""
        tensors, metadata = load_tensors(Path(path))
        features = {}
        for name, tensor in tensors.items():
            domain, measure = name.split(".")
            features.setdefault(domain, {})[measure] = tensor
        return cls(features, {domain: tuple(names) for domain, names in metadata["files"].items()})


@dataclass
class Score:
    """A measure of some clips: 0 = like the real ones, 1 = like the CG ones; NaN where it cannot be said.

    Attributes:
        mean: over the clips.
        low, high: bootstrap interval of the mean over the clips, CONFIDENCE wide.
        accuracy: held out, of telling real from CG clips by this alone; NaN for the mean of several measures.
    """

    mean: float
    low: float
    high: float
    accuracy: float = nan

    def __str__(self):
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class CGLook:
    """What `CGMonitor.judge` says of some samples.

    Attributes:
        look: the mean of the informative measures; NaN if there is none.
        measures: {measure: Score}, of all measures.
        uninformative: the measures that `look` leaves out.
    """

    look: Score
    measures: dict
    uninformative: tuple

    def scalars(self):
        """Flat numbers for the logs; what is NaN is left out."""
        scores = {"cg_look": self.look} | {f"cg_{name}": score for name, score in self.measures.items()}
        named = {
            f"{name}{ending}": getattr(score, attribute)
            for name, score in scores.items()
            for attribute, ending in (("mean", ""), ("low", "_low"), ("high", "_high"), ("accuracy", "_accuracy"))
        }
        return {name: value for name, value in named.items() if isfinite(value)}

    def __str__(self):
        parts = [
            f"{n} {s.mean:.2f}" + " (uninformative)" * (n in self.uninformative) for n, s in self.measures.items()
        ]
        return f"CG look {self.look}: {', '.join(parts)}"


def fit_discriminant(real, cg):
    """Diagonal linear discriminant of which every feature is known to rise with the CG look.

    w = max(0, Δ − s·e) / v, with Δ the difference of the means, e its standard error, v the variance within the sets:
    a feature that falls, or rises by chance, has no say.

    Args:
        real, cg: (n, k) and (m, k).

    Returns:
        function from (l, k) to (l,): on average 0 for `real` and 1 for `cg`; NaN if no feature rises.

    Source: Tibshirani et al. 2002, Diagnosis of multiple cancer types by shrunken centroids, for the shrinkage.
    """
    variance = (real.var(0) * (len(real) - 1) + cg.var(0) * (len(cg) - 1)) / (len(real) + len(cg) - 2)
    difference = cg.mean(0) - real.mean(0)
    error = (variance * (1 / len(real) + 1 / len(cg))).sqrt()
    weights = (difference - SHRINKAGE * error).clamp(min=0)
    # A feature that hardly varies within the sets, as digital black may, would silence the others.
    weights = weights / torch.maximum(variance, (difference / MAX_DEVIATIONS) ** 2).clamp(min=1e-12)
    zero, one = real.mean(0) @ weights, cg.mean(0) @ weights
    return lambda clips: (clips @ weights - zero) / (one - zero)  # no weight: 0 / 0


def fit_probe(real, cg):
    """Ridge regression of standardised features on 0 for `real` and 1 for `cg`, both sets weighing alike.

    Args, Returns: as `fit_discriminant`, but the values are shrunken, and on clips it was fitted on, too good.
    """
    clips = torch.cat([real, cg]).double()
    labels = torch.cat([-torch.ones(len(real)), torch.ones(len(cg))]).double()
    centre = (real.mean(0) + cg.mean(0)).double() / 2
    scale = (clips - centre).square().mean(0).sqrt() + 1e-6
    root = torch.cat([torch.full((len(x),), len(x) ** -0.5) for x in (real, cg)]).double()
    rows = (clips - centre) / scale * root[:, None]
    # Solved among the clips, of which there are fewer than features: w = Xᵀ (X Xᵀ + λ)⁻¹ y.
    products = rows @ rows.T
    penalty = RIDGE * products.trace() * torch.eye(len(rows), dtype=torch.float64)
    weights = rows.T @ torch.linalg.solve(products + penalty / len(rows), labels * root)
    return lambda x: (((x.double() - centre) / scale) @ weights / 2 + 0.5).float()


def folds_of(files):
    """(n,) fold of each clip, FOLDS in number or as many as there are files: a file's clips are in one fold."""
    names = sorted(set(files))
    return torch.tensor([names.index(file) % min(FOLDS, len(names)) for file in files])


class CGMonitor:
    """Places samples between the real and the CG clips of a reference.

    Args:
        reference: at least MIN_FILES files in each domain.

    Attributes:
        accuracy: {measure: held-out accuracy}, the mean of both domains' accuracies, cross-validated by file.
        informative, uninformative: names of the measures above and below MIN_ACCURACY.

    Raises:
        InputError: too few files.
    """

    def __init__(self, reference):
        for domain in ("real", "cg"):
            if len(set(reference.files[domain])) < MIN_FILES:
                raise InputError(
                    f"the CG monitor needs clips of at least {MIN_FILES} {domain} videos, to tell the domains apart: "
                    "add videos, or leave the monitor out"
                )
        # The look alone: what all clips have in common says nothing of likeness.
        real, cg = reference.features["real"]["dinov3"], reference.features["cg"]["dinov3"]
        self._centre = (real.mean(0) + cg.mean(0)) / 2
        coarse = reference.features.get("coarse")
        self._coarse = coarse and coarse["dinov3"] - self._centre
        self._coarse_files = reference.files.get("coarse", ())

        tables = {d: self._tables(reference.features[d], reference.files[d]) for d in ("real", "cg")}
        folds = {d: folds_of(reference.files[d]) for d in ("real", "cg")}
        self._scorers, self.accuracy = {}, {}
        for measure in MEASURES:
            real, cg = tables["real"][measure], tables["cg"][measure]
            fit = fit_probe if measure == "dinov3" else fit_discriminant
            held_out = [torch.empty(len(real)), torch.empty(len(cg))]
            for fold in range(FOLDS):
                fits = fit(real[folds["real"] != fold], cg[folds["cg"] != fold])
                for out, clips, domain in zip(held_out, (real, cg), ("real", "cg")):
                    out[folds[domain] == fold] = fits(clips[folds[domain] == fold])
            # NaN is on neither side: no better than chance.
            right = [(held_out[0] < 0.5) + 0.5 * held_out[0].isnan(), (held_out[1] > 0.5) + 0.5 * held_out[1].isnan()]
            self.accuracy[measure] = sum(x.float().mean().item() for x in right) / 2
            self._scorers[measure] = _placed(fit(real, cg), *held_out) if fit is fit_probe else fit(real, cg)
        self.informative = tuple(m for m in MEASURES if self.accuracy[m] > MIN_ACCURACY)
        self.uninformative = tuple(m for m in MEASURES if m not in self.informative)

    def _tables(self, features, files):
        """{measure: (n, k)}: the features, geometry's with the likeness to other scenes' coarse renderings.

        With its own scene's rendering a clip shares the layout; with others', only the look.
        """
        tables = {measure: features[measure] for measure in MEASURES}
        if self._coarse is not None:
            likeness = F.cosine_similarity(
                (features["dinov3"] - self._centre)[:, None], self._coarse[None], dim=-1
            )  # (n, coarse)
            others = torch.tensor([[file != own for file in self._coarse_files] for own in files])
            means = (likeness * others).sum(1) / others.sum(1).clamp(min=1)
            tables["geometry"] = torch.cat([tables["geometry"], means[:, None]], dim=1)
        return tables

    def judge(self, samples, files=None):
        """Place samples.

        Args:
            samples: dicts as from `clip_features`, one for each generated clip.
            files: for each, the name of the CG clip whose coarse rendering controlled it, where the reference has it.

        Returns:
            `CGLook`. The same samples give the same intervals.
        """
        features = {measure: torch.stack([sample[measure] for sample in samples]) for measure in MEASURES}
        tables = self._tables(features, files or [None] * len(samples))
        scores = {m: self._scorers[m](tables[m]).clamp(*SCORE_RANGE) for m in MEASURES}
        measures = {m: _score(scores[m], self.accuracy[m]) for m in MEASURES}
        informative = [scores[m] for m in self.informative]
        look = torch.stack(informative).mean(0) if informative else torch.full((len(samples),), nan)
        return CGLook(_score(look), measures, self.uninformative)


def _placed(scorer, held_out_real, held_out_cg):
    """A probe's scorer so that clips it has not seen are on average 0 if real and 1 if CG; NaN if it cannot tell."""
    zero, one = held_out_real.mean(), held_out_cg.mean()
    return lambda clips: (scorer(clips) - zero) / (one - zero if one > zero else nan)


def _score(values, accuracy=nan):
    """Mean and bootstrap interval of (n,)."""
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[draws].mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(tail).item(), means.quantile(1 - tail).item()
    return Score(values.mean().item(), low, high, accuracy)
