"""Make measures by their names."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from c2r.metrics.catalogue import MEASURES, PACKAGES, ROLES
from c2r.metrics.consistency import WarpError
from c2r.metrics.depth import DepthModel, DepthRMSE
from c2r.metrics.distances import FrechetDistance, KernelDistance
from c2r.metrics.features import FrameSimilarity, ImageFeatures, VideoFeatures
from c2r.metrics.metric import Metric, SetMetric, Skipped
from c2r.metrics.networks import Remembering
from c2r.metrics.perceptual import LPIPS
from c2r.metrics.prompt import ClipSimilarity
from c2r.metrics.quality import Quality
from c2r.metrics.segmentation import MaskMIoU, SegmentationModel, TrajectoryError
from c2r.metrics.structure import BlurSSIM, EdgeF1


def make_metrics(
    names: Sequence[str], models: Mapping[str, str], device: torch.device | str
) -> tuple[list[Metric], list[SetMetric], list[Skipped]]:
    """Make measures.

    Args:
        names: of `c2r.metrics.catalogue.MEASURES`.
        models: {role: folder or hub name} of the networks, by the roles of `c2r.metrics.catalogue.ROLES`. A measure
            whose network is not named is skipped, and so is one whose package is not installed.
        device: on which the networks run; "meta": they are checked by configs and headers of files and cannot measure.

    Returns:
        measures of a clip, measures of a set, and those that are skipped, each in the order of `names`.

    Raises:
        InputError: a network that is named cannot be loaded.
        ValueError: an unknown name or role.
    """
    known = {measure.name: measure for measure in MEASURES}
    for kind, given, allowed in (("measure", names, known), ("role", models, ROLES)):
        for name in given:
            if name not in allowed:
                raise ValueError(f"{name}: no such {kind}; choose from {', '.join(allowed)}")
    makers = _makers(models, device)
    metrics: list[Metric] = []
    set_metrics: list[SetMetric] = []
    skipped: list[Skipped] = []
    for name in dict.fromkeys(names):
        measure = known[name]
        missing = [package for package in measure.packages if find_spec(package) is None]
        if measure.role is not None and not models.get(measure.role):
            skipped.append(Skipped(name, f"needs {ROLES[measure.role]}; none is named"))
        elif missing:
            skipped.append(Skipped(name, f"needs the package {missing[0]}; {PACKAGES[missing[0]]}"))
        else:
            (set_metrics if measure.of_set else metrics).append(makers[name]())
    return metrics, set_metrics, skipped


def _makers(models: Mapping[str, str], device: torch.device | str) -> dict[str, Callable[[], Any]]:
    """Return a function for each measure that makes it; measures with the same network share it and its results."""

    @cache
    def depth():
        return Remembering(DepthModel(models["depth"], device))

    @cache
    def segments():
        return Remembering(SegmentationModel(models["segmentation"], device))

    @cache
    def image():
        network = ImageFeatures(models["image_features"], device)
        return Remembering(network), network.kind

    def of_video():
        network = VideoFeatures(models["video_features"], device)
        return KernelDistance(Remembering(network), f"kd_{network.kind}")

    return {
        "edge_f1": lambda: EdgeF1("truth"),
        "edge_f1_control": lambda: EdgeF1("control"),
        "blur_ssim": lambda: BlurSSIM("truth"),
        "blur_ssim_control": lambda: BlurSSIM("control"),
        "lpips": lambda: LPIPS(models["lpips"], device),
        "depth_rmse": lambda: DepthRMSE(depth(), "truth"),
        "depth_rmse_control": lambda: DepthRMSE(depth(), "control"),
        "depth_rmse_passes": lambda: DepthRMSE(depth(), "passes"),
        "mask_miou": lambda: MaskMIoU(segments(), "truth"),
        "mask_miou_control": lambda: MaskMIoU(segments(), "control"),
        "mask_miou_passes": lambda: MaskMIoU(segments(), "passes"),
        "trajectory_error_passes": lambda: TrajectoryError(segments()),
        "warp_error": WarpError,
        "frame_similarity": lambda: FrameSimilarity(image()[0]),
        "clip_similarity": lambda: ClipSimilarity(models["clip"], device),
        "quality": lambda: Quality(models["quality"], device),
        "fd": lambda: FrechetDistance(image()[0], f"fd_{image()[1]}"),
        "kd": lambda: KernelDistance(image()[0], f"kd_{image()[1]}"),
        "kd_video": of_video,
    }
