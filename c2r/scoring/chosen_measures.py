"""The measures that the options of `c2r.evaluate` name, and whether the scenes have what they need."""

import logging
from argparse import Namespace
from collections.abc import Sequence

from c2r import InputError
from c2r.metrics.catalogue import MEASURES
from c2r.metrics.metric import Metric, SetMetric
from c2r.metrics.registry import make_metrics
from c2r.scoring.measuring import WITHOUT
from c2r.scoring.scenes import Scene

logger = logging.getLogger(__name__)


def make_measures(args: Namespace, device: str) -> tuple[list[Metric], list[SetMetric], dict[str, str]]:
    """Make the measures that the options name.

    Args:
        args: options of c2r.evaluate.
        device: see `c2r.metrics.registry.make_metrics`.

    Returns:
        measures of clips, of sets, and {names: why they are missing}.

    Raises:
        InputError: a network cannot be loaded.
    """
    networks = dict(args.networks or [])
    names, skipped = args.metrics, {}
    if names is None:
        names = [measure.name for measure in MEASURES if measure.role is None or measure.role in networks]
        without = [measure.name for measure in MEASURES if measure.name not in names]
        if without:
            skipped[", ".join(without)] = "not computed, as --networks names none for them"
    metrics, set_metrics, missing = make_metrics(names, networks, device)
    return metrics, set_metrics, skipped | {entry.name: entry.reason for entry in missing}


def require_measurable(args: Namespace, scenes: Sequence[Scene]) -> None:
    """Find out which measures will have no value, before a video is made and without reading weights.

    Raises:
        InputError: a network is missing, damaged or of another kind, or none of --metrics can be computed.
    """
    metrics, set_metrics, skipped = make_measures(args, "meta")
    if args.metrics is None:
        return
    there = {
        "truth": any(scene.truth is not None for scene in scenes),
        "control": any(scene.control is not None for scene in scenes),
        "passes": any(scene.ids is not None or scene.depth is not None for scene in scenes),
        "prompt": any(scene.prompt.strip() for scene in scenes),
    }
    reasons = {name: f": {reason}" for name, reason in skipped.items()}
    for metric in metrics:
        if not there.get(metric.against, True):
            reasons[metric.name] = WITHOUT[metric.against]
        elif metric.against == "control" and not (args.real_dataset and args.cg_dataset):
            reasons[metric.name] = ": the CG look must be known too; give --real_dataset and --cg_dataset"
    if len(reasons) == len(metrics) + len(set_metrics) + len(skipped):
        raise InputError(
            f"--metrics {' '.join(args.metrics)}: nothing can be measured: "
            + "; ".join(name + reason for name, reason in reasons.items())
        )
    for name, reason in reasons.items():
        logger.warning("%s will be missing%s", name, reason)
