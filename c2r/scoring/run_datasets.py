"""The numbers that a training run logs, of a finished model: losses of held-out clips, and the CG look of videos.

Clips are chosen, encoded and measured by the same functions as in training, so that the same model gives the same
numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate import Accelerator
from einops import rearrange

from c2r import InputError
from c2r.data.clips import Clip
from c2r.data.folders import read_frames
from c2r.data.mixture import Mixture, read_mixture, read_on_all
from c2r.data.settings import ClipSettings
from c2r.encoding.cache import current_encoders, encoder_fingerprint
from c2r.encoding.encoding_pass import encode_missing
from c2r.evaluation.conditions import ControlConditions, PromptConditions, choose_validation_clips
from c2r.evaluation.monitor import MIN_FILES, CGLook, CGMonitor
from c2r.evaluation.monitor_reference import can_monitor, choose_reference_clips, measure_frames, reference_of
from c2r.evaluation.samples import sampling_pipeline
from c2r.evaluation.validation import GAINS, noise_levels, validation_metrics
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.hub import resolve_model_folder
from c2r.pipeline import C2RPipeline
from c2r.scoring.scenes import Scene
from c2r.scoring.statistics import Interval, bootstrap_interval
from c2r.training.watchdog import Watchdog

DOMAINS = ("real", "cg")

#: Largest number of real clips in the true set of distances of sets.
REAL_CLIPS = 256


@dataclass
class RunDatasets:
    """The datasets of a training run, whose clips are in the cache.

    Attributes:
        mixtures: real, CG, or both.
        num_clips: validation clips of each mixture.
        settings: with which clips are cut and encoded.
        accelerator: of one process.
    """

    mixtures: list[Mixture]
    num_clips: int
    settings: ClipSettings
    accelerator: Accelerator

    @classmethod
    def read(
        cls,
        real: Sequence[str] | None,
        cg: Sequence[str] | None,
        num_clips: int,
        settings: ClipSettings,
        accelerator: Accelerator,
    ) -> "RunDatasets":
        """Read datasets, and encode those of the clips that are needed and not cached.

        Raises:
            InputError: a dataset cannot be read, or holds out no clip.
        """
        watchdog = Watchdog(accelerator, 600)  # of one process: does nothing
        addresses = {"real": real, "cg": cg}

        def read():
            encoders = current_encoders(settings)
            return [read_mixture(named, domain, settings, encoders) for domain, named in addresses.items() if named]

        while True:
            datasets = cls(read_on_all(read, accelerator, watchdog), num_clips, settings, accelerator)
            conditions = [datasets.conditions(phase, 1.0, 1.0) for phase in datasets.phases]
            held_out = [clip for condition in conditions for clip in condition.to_encode]
            to_encode = chain(held_out, *datasets.reference_clips.values())
            if not encode_missing(to_encode, settings, accelerator, watchdog).failures:
                return datasets

    def of_domain(self, domain: str) -> Mixture | None:
        """Return the mixture of a domain, None if it is not among the datasets."""
        return next((mixture for mixture in self.mixtures if mixture.domain == domain), None)

    @property
    def phases(self) -> list[int]:
        """Phases whose validation these datasets allow; phase 1 validates on real clips alone."""
        return [1, 2] if self.of_domain("real") else [2]

    def not_validated(self, phase: int) -> str | None:
        """Return why models of a phase are not validated, or not on all that their training is; None if they are."""
        real, cg = (self.of_domain(domain) is not None for domain in DOMAINS)
        if phase == 1:
            return None if real else "left out, since phase 1 validates on real clips; give --real_dataset"
        if real and cg:
            return None
        known, missing = ("real", "cg") if real else ("cg", "real")
        return f"on {known} clips alone, as there is no --{missing}_dataset: not the numbers of the training"

    def conditions(
        self, phase: int, flow_shift: float, conditioning_scale: float
    ) -> PromptConditions | ControlConditions:
        """Return the validation of a phase, as its training script builds it."""
        mixtures = self.mixtures if phase == 2 else [self.of_domain("real")]
        clips = [clip for mixture in mixtures for clip in choose_validation_clips(mixture, self.num_clips)]
        spare = [mixture.clips for mixture in mixtures]
        if phase == 1:
            return PromptConditions(clips, spare, self.settings, flow_shift=flow_shift, batch_size=1)
        return ControlConditions(
            *(clips, spare, self.settings),
            flow_shift=flow_shift,
            batch_size=1,
            conditioning_scale=conditioning_scale,
        )

    @property
    def reference_clips(self) -> dict[str, list[Clip]]:
        """The clips that the CG look is measured by; none unless both domains have enough files."""
        real, cg = self.of_domain("real"), self.of_domain("cg")
        if real is None or cg is None:
            return {}
        clips = choose_reference_clips(real.train, cg.train, self.settings.buckets[0])
        return clips if can_monitor(clips) else {}

    def real_videos(self) -> Iterator[torch.Tensor]:
        """Yield real clips, (F, 3, H, W) uint8, from as many files as possible."""
        real = self.of_domain("real")
        if real is not None:
            for clip in real.clips.of_bucket(self.settings.buckets[0]).first_windows(REAL_CLIPS):
                yield read_frames(clip.target_file, clip, self.settings)

    @property
    def without_reference(self) -> str:
        """Reason why there is no CG look."""
        for domain in ("real", "cg"):
            if self.of_domain(domain) is None:
                return f"there is no --{domain}_dataset to compare with"
        return f"it needs clips of at least {MIN_FILES} real and {MIN_FILES} CG videos to train on"


@dataclass(frozen=True)
class ModelLosses:
    """The validation of a model.

    Attributes:
        numbers: of `validation_metrics`.
        intervals: {"loss_real", "control_gain_cg", …: interval over the clips of a domain}.
        clips: {domain: number of clips}.
    """

    numbers: dict[str, float]
    intervals: dict[str, Interval]
    clips: dict[str, int]


@torch.no_grad()
def model_losses(
    pipeline: C2RPipeline,
    phase: int,
    datasets: RunDatasets,
    flow_shift: float,
    conditioning_scale: float,
    dtype: torch.dtype,
) -> ModelLosses:
    """Validate a model on held-out clips, as its training does.

    Args:
        pipeline: with the model, and in phase 2 with DINOv3.
        phase: of the model.
        datasets: those of its training.
        flow_shift, conditioning_scale: those of its training.
        dtype: of its weights.

    Raises:
        InputError: a loss is not finite.
    """
    conditions = datasets.conditions(phase, flow_shift, conditioning_scale)
    accelerator, model = datasets.accelerator, pipeline.transformer.eval()
    with torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32):
        if isinstance(conditions, ControlConditions):
            losses = conditions.losses(model, pipeline.dinov3, accelerator)
        else:
            losses = conditions.losses(model, accelerator)
    assert losses is not None  # nothing ends it early
    numbers = validation_metrics(losses, conditions.domains, flow_shift)
    intervals, clips = {}, {}
    for domain in DOMAINS:
        rows = [i for i, own in enumerate(conditions.domains) if own == domain]
        if not rows:
            continue
        clips[domain] = len(rows)
        right = losses["right"][rows].double()
        intervals[f"loss_{domain}"] = bootstrap_interval(right.mean(1).tolist())
        for name, condition in GAINS.items():
            if condition in losses:
                gains = losses[condition][rows].double() - right  # (n, S)
                intervals[f"{name}_{domain}"] = bootstrap_interval(gains.mean(1).tolist())
                for level, column in zip(noise_levels(flow_shift).tolist(), gains.T):
                    intervals[f"{name}_{domain}_sigma_{level:.2f}"] = bootstrap_interval(column.tolist())
    return ModelLosses(numbers, intervals, clips)


class CGLooks:
    """Measures the CG look of videos by the clips of a run's datasets.

    Args:
        datasets: with reference clips.
        dinov3: folder or hub name.
        dtype: of its weights.
        followed: {source: {scene: the scene whose layout its video has}}.

    Raises:
        InputError: a model cannot be loaded, or the reference cannot be written.
    """

    def __init__(
        self, datasets: RunDatasets, dinov3: str, dtype: torch.dtype, followed: Mapping[str, Mapping[str, Scene]]
    ):
        accelerator = datasets.accelerator
        self.device, self.followed = accelerator.device, followed
        self.dinov3 = DINOv3FeatureExtractor.from_pretrained(dinov3, torch_dtype=dtype).to(self.device)
        with sampling_pipeline(datasets.settings.base_model, 1.0, None, self.dinov3, self.device) as pipeline:
            reference = reference_of(
                datasets.reference_clips,
                pipeline,
                encoder_fingerprint(resolve_model_folder(dinov3)),
                datasets.settings,
                accelerator,
                datasets.of_domain("cg").cache_dir,
                beat=lambda what: None,
            )
        self.monitor = CGMonitor(reference)
        self._measured: dict[str, dict[str, tuple[dict[str, torch.Tensor], str | None]]] = {}

    @classmethod
    def load(
        cls,
        datasets: RunDatasets | None,
        dinov3: str | None,
        dtype: torch.dtype,
        followed: Mapping[str, Mapping[str, Scene]],
    ) -> "tuple[CGLooks | None, str]":
        """Return what measures the CG look, or None and the reason.

        Raises:
            InputError: see the class; or no DINOv3 is named.
        """
        if datasets is None:
            return None, "there is no --real_dataset and no --cg_dataset to compare with"
        if not datasets.reference_clips:
            return None, datasets.without_reference
        if dinov3 is None:
            raise InputError("--dinov3: missing; the CG look needs it; give the DINOv3 of the training")
        looks = cls(datasets, dinov3, dtype, followed)
        if not looks.monitor.informative:
            return None, "no measure tells the real clips from the CG clips"
        return looks, ""

    def __call__(self, source: str, scene: Scene, frames: torch.Tensor) -> float:
        """Return the CG look of one video, (F, 3, H, W) uint8; `of_source` judges the first one of each scene."""
        features = measure_frames(rearrange(frames, "f c h w -> f h w c"), self.dinov3, self.device)
        # Its layout is that of the scene that it follows, whose clips the monitor must not compare it with.
        followed = self.followed[source][scene.name]
        file = followed.truth and followed.truth.path
        self._measured.setdefault(source, {}).setdefault(scene.name, (features, file))
        return self.monitor.judge([features], [file]).look.mean

    def of_source(self, source: str) -> CGLook:
        """Return the judgement of a source's videos, one for each scene: those of other seeds are not independent."""
        features, files = zip(*self._measured[source].values())
        return self.monitor.judge([*features], [*files])
