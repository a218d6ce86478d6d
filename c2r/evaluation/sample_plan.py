"""The sample videos of a run, and the clips that the CG monitor compares them with."""

import logging
from dataclasses import dataclass

from c2r.data.clips import Clip, Clips
from c2r.data.mixture import Mixture
from c2r.evaluation.monitor import MIN_FILES, MIN_SCENES, CGMonitor
from c2r.evaluation.monitor_reference import can_monitor, choose_reference_clips, count_files
from c2r.evaluation.samples import Sample, choose_samples

logger = logging.getLogger(__name__)


@dataclass
class SamplePlan:
    """The samples of a run and the reference clips of its CG monitor."""

    samples: list[Sample]
    reference_clips: dict[str, list[Clip]]  #: {"real", "cg"}, see `choose_reference_clips`
    monitored: bool  #: the CG monitor judges the samples
    monitor: CGMonitor | None = None  #: built at the first sampling, and kept: its permutations take seconds

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
    """Choose the samples of a run and the reference of its CG monitor, and log if there are too few files for it.

    Args:
        real, cg: the run's mixtures. Held-out CG clips give the controls, and held-out real clips give the prompts,
            so that these describe real video. Without `cg`, held-out real clips give both.
        scenes: the mixture of `--sample_dataset`: if given, its clips give controls and prompts instead.
        train_real, train_cg: the clips to train on, from which the reference is chosen; in a dry run only a part of
            those of the mixtures.
        count: number of samples; 0 for none.
        quiet: do not log.
    """
    if scenes is not None:
        samples = choose_samples(scenes.clips, None, count)
    elif cg is not None:
        samples = choose_samples(cg.held_out, real.held_out, count)
    else:
        samples = choose_samples(real.held_out, None, count)
    bucket = samples[0].scene.bucket if samples else None
    reference_clips = choose_reference_clips(train_real, train_cg, bucket)
    if samples and cg is not None and not quiet:
        whole_reference = choose_reference_clips(real.train, cg.train, bucket)
        if (line := _too_few_files(samples, count, whole_reference)) is not None:
            logger.info(line)
    return SamplePlan(samples, reference_clips, monitored=bool(samples) and can_monitor(reference_clips))


def _too_few_files(samples, count, reference_clips):
    """Return what the CG monitor cannot do with so small datasets, and how to change that; None if all is well."""
    num_real, num_cg = (count_files(clips) for clips in reference_clips.values())
    if not can_monitor(reference_clips):
        return (
            "CG monitor: off, so this run measures no CG look and never lowers --cg_ratio; it compares with training "
            f"videos of the samples' size {samples[0].scene.bucket} and needs {MIN_FILES} real and {MIN_FILES} CG "
            f"ones, but there are {num_real} and {num_cg}; add videos"
        )
    num_scenes = count_files([sample.scene for sample in samples])
    if num_scenes < MIN_SCENES:
        if count < MIN_SCENES:
            remedy = f"give --num_samples {MIN_SCENES} or more"
        else:
            remedy = "hold out more CG videos (in a folder validation/) or give --sample_dataset"
        return (
            "CG monitor: only reports, so this run gives no advice and never lowers --cg_ratio; its samples are of "
            f"{num_scenes} of the {MIN_SCENES} videos that it needs; {remedy}"
        )
    return None
