"""Mixtures: the datasets of one domain with sampling weights, such as `--real_dataset data/a:2 data/b:1`."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from c2r import InputError
from c2r.data.clips import Clips
from c2r.data.manifest import Manifest, read_manifest
from c2r.data.settings import ClipSettings
from c2r.data.workers import Heartbeat


@dataclass(frozen=True)
class Mixture:
    """The datasets of one domain with sampling weights. Clips are concatenated in the order of the datasets."""

    datasets: list[Manifest]
    weights: list[str]  # as the user wrote them

    @property
    def domain(self) -> str:
        """The domain of all datasets: "real" or "cg"."""
        return self.datasets[0].domain

    @property
    def name(self) -> str:
        """The mixture's name in messages."""
        return " ".join(dataset.folder for dataset in self.datasets)

    @property
    def cache_dir(self) -> Path:
        """The folder for cached values that belong to the whole mixture: the first dataset's."""
        return self.datasets[0].cache_dir

    @cached_property
    def clips(self) -> Clips:
        """The clips of all datasets."""
        return Clips.concatenated(dataset.clips for dataset in self.datasets)

    @cached_property
    def train(self) -> Clips:
        """The clips that are not held out."""
        return Clips.concatenated(dataset.train for dataset in self.datasets)

    @cached_property
    def held_out(self) -> Clips:
        """The clips that are kept out of training, for validation."""
        return Clips.concatenated(dataset.held_out for dataset in self.datasets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 hex of all clips and weights."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        parts = [(dataset.fingerprint, weight) for dataset, weight in zip(self.datasets, self.weights)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def parts(self, clips: Clips) -> list[tuple[int, str]]:
        """Return (number of clips, weight) for each dataset that some of the clips come from.

        Args:
            clips: some of the mixture's clips. A dry run's few clips may all come from one dataset.
        """
        counts = [int((clips.entries["table"] == number).sum()) for number in range(len(self.datasets))]
        return [(count, weight) for count, weight in zip(counts, self.weights) if count]

    def report(self) -> None:
        """Report each dataset, see `Manifest.report`."""
        for dataset in self.datasets:
            dataset.report()


DatasetSequence = TypeVar("DatasetSequence", bound=Sequence[Manifest | Mixture | None])


def read_mixture(
    addresses: Sequence[str],
    domain: str,
    settings: ClipSettings,
    current_encoders: Callable[[], dict[str, Any]] | None = None,
) -> Mixture:
    """Read the datasets of one domain.

    Args:
        addresses: folders or fsspec addresses, each optionally with ":" and a weight (1 by default).
        domain, settings, current_encoders: see `read_manifest`.

    Raises:
        InputError: see `read_manifest`; or a weight is not above 0, or a dataset is named twice.
    """
    parsed = [_split_weight(str(address)) for address in addresses]
    folders = [folder for folder, _ in parsed]
    distinct = {folder.rstrip("/") if "://" in folder else os.path.realpath(folder) for folder in folders}
    if len(distinct) < len(folders):
        raise InputError(
            f"--{domain}_dataset {' '.join(addresses)}: names one dataset twice; give it a larger weight instead"
        )
    datasets = [read_manifest(folder, domain, settings, current_encoders) for folder in folders]
    return Mixture(datasets, [weight for _, weight in parsed])


def read_on_all(read: Callable[[], DatasetSequence], accelerator: Accelerator, watchdog: Heartbeat) -> DatasetSequence:
    """Read datasets on every process, and report them.

    The main process reads first; the other processes find its probes in the cache.

    Args:
        read: reads the datasets; entries that are None are skipped here.
        accelerator, watchdog: the run's.

    Returns:
        the result of `read`.

    Raises:
        InputError: the processes see different files, and would train on different batches.
    """
    with watchdog.main_process_first():
        result = read()
    datasets = [dataset for dataset in result if dataset is not None]
    if accelerator.is_main_process:
        for dataset in datasets:
            dataset.report()
    if accelerator.num_processes > 1:
        fingerprints = [dataset.fingerprint for dataset in datasets]
        watchdog.wait_for_everyone()  # gather_object has a time limit, which a slow read could exceed
        for dataset, *seen in zip(datasets, *gather_object([fingerprints])):
            if len(set(seen)) > 1:
                raise InputError(
                    f"{dataset.name}: its files are not the same for all processes; check that every machine sees and "
                    "may read the same files, and start again"
                )
    return result


def _split_weight(address: str) -> tuple[str, str]:
    """Split an address into folder and weight."""
    folder, colon, weight = address.rpartition(":")
    if "/" not in folder.partition("://")[2] and "://" in folder:
        return address, "1"  # the number is the server's port
    try:
        value = Fraction(weight)
    except (ValueError, ZeroDivisionError):
        value = None
    if not colon or value is None or os.path.exists(address):
        return address, "1"
    if value <= 0:
        raise InputError(f"{address}: its weight must be above 0; leave the dataset out instead")
    return folder, weight
