"""The sample videos of a run, and the clips that the CG monitor compares them with."""

import logging
from dataclasses import dataclass

from c2r.data.clips import Clip, Clips
from c2r.data.mixture import Mixture
from c2r.evaluation.monitor import MIN_FILES
from c2r.evaluation.monitor_reference import can_monitor, choose_reference_clips
from c2r.evaluation.samples import Sample, choose_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplePlan:
    """The samples of a run and the reference clips of its CG monitor."""

    samples: list[Sample]
    reference_clips: dict[str, list[Clip]]  #: {"real", "cg"}, see `choose_reference_clips`
    monitored: bool  #: the CG monitor judges the samples

    @property
    def to_encode(self) -> list[Clip]:
        """The clips that must be in the cache for sampling; the reference clips are among the training clips."""
        return [clip for sample in self.samples for clip in (sample.scene, sample.caption)]


def plan_samples(
    real: Mixture,
    cg: Mixture | None,
    scenes: Mixture | None,
    train_real: Clips,
    train_cg: Clips,
    count: int,
    quiet: bool = False,
) -> SamplePlan:
    """Choose the samples of a run and the reference of its CG monitor.

    Args:
        real, cg: the run's mixtures. Held-out CG clips give the controls, and held-out real clips give the prompts,
            so that these describe real video. Without `cg`, held-out real clips give both.
        scenes: the mixture of `--sample_dataset`: if given, its clips give controls and prompts instead.
        train_real, train_cg: the clips to train on, from which the reference is chosen.
        count: number of samples; 0 for none.
        quiet: do not log that the CG monitor is off.
    """
    if scenes is not None:
        samples = choose_samples(scenes.clips, None, count)
    elif cg is not None:
        samples = choose_samples(cg.held_out, real.held_out, count)
    else:
        samples = choose_samples(real.held_out, None, count)
    bucket = samples[0].scene.bucket if samples else None
    reference_clips = choose_reference_clips(train_real, train_cg, bucket)
    monitored = bool(samples) and can_monitor(reference_clips)
    if samples and not monitored and not quiet:
        logger.info(
            f"CG monitor: off, it needs clips of at least {MIN_FILES} real and {MIN_FILES} CG videos to train on, of "
            f"the samples' bucket {bucket}"
        )
    return SamplePlan(samples, reference_clips, monitored)
