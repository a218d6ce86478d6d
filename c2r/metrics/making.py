"""Make measures by their names."""

from collections.abc import Mapping, Sequence

import torch

from c2r.metrics.metric import Metric, SetMetric, Skipped


def make_metrics(
    names: Sequence[str], models: Mapping[str, str], device: torch.device | str
) -> tuple[list[Metric], list[SetMetric], list[Skipped]]:
    """Make measures.

    Args:
        names: of `c2r.metrics.catalogue.MEASURES`.
        models: {role: folder or hub name} of the networks, by the roles of `c2r.metrics.catalogue.ROLES`. A measure
            whose network is not named is skipped.
        device: on which the networks run.

    Returns:
        measures of a clip, measures of a set, and those that are skipped, each in the order of `names`.

    Raises:
        InputError: a network that is named cannot be loaded.
        ValueError: an unknown name or role.
    """
    raise NotImplementedError
