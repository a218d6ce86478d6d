"""The datasets of one domain, each with the weight of its samples: `--real_dataset data/a:2 data/b:1`."""

import hashlib
import os
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from accelerate.utils import gather_object

from c2r import InputError
from c2r.data.clips import Clips
from c2r.data.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Sources:
    """What is used of the datasets of one domain; their clips one after the other."""

    manifests: list[Manifest]
    weights: list[str]  # as they were written

    @property
    def domain(self) -> str:
        return self.manifests[0].domain

    @property
    def name(self) -> str:
        """Of the datasets, for messages."""
        return " ".join(manifest.folder for manifest in self.manifests)

    @property
    def cache_dir(self) -> Path:
        """Where is kept what belongs to all of them."""
        return self.manifests[0].cache_dir

    @cached_property
    def clips(self) -> Clips:
        return Clips.concatenated([manifest.clips for manifest in self.manifests])

    @cached_property
    def train(self) -> Clips:
        return Clips.concatenated([manifest.train for manifest in self.manifests])

    @cached_property
    def held_out(self) -> Clips:
        return Clips.concatenated([manifest.held_out for manifest in self.manifests])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 hex of all clips and weights."""
        if len(self.manifests) == 1:
            return self.manifests[0].fingerprint
        parts = [(manifest.fingerprint, weight) for manifest, weight in zip(self.manifests, self.weights)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def parts(self, clips) -> list[tuple[int, str]]:
        """(length, weight) of each dataset that has some of these clips, for `MixedCGRealSampler`.

        All of them have clips to train on, see `read_manifest`; the few of a dry run may all be of the first.
        """
        counts = [int((clips.index["table"] == number).sum()) for number in range(len(self.manifests))]
        return [(count, weight) for count, weight in zip(counts, self.weights) if count]

    def report(self):
        """`Manifest.report` of each."""
        for manifest in self.manifests:
            manifest.report()


def read_sources(addresses, domain, options) -> Sources:
    """`read_manifest` of each of `addresses`, which may end in ":" and a weight; 1 where there is none.

    Raises:
        InputError: as `read_manifest`; a weight that is not above 0; or a dataset that is named twice.
    """
    parsed = [_parse(str(address)) for address in addresses]
    folders = [folder for folder, _ in parsed]
    same = {folder.rstrip("/") if "://" in folder else os.path.realpath(folder) for folder in folders}
    if len(same) < len(folders):
        raise InputError(f"--{domain}_dataset {' '.join(addresses)}: names one twice; give it a larger weight")
    return Sources([read_manifest(folder, domain, options) for folder in folders], [weight for _, weight in parsed])


def read_on_all(read, accelerator, watchdog):
    """Read datasets on every process, and report them.

    The main process is first: the others find in the cache what it has looked into.

    Args:
        read: `() -> sequence` of `Manifest`, `Sources` or None.
        accelerator, watchdog: the run's.

    Returns:
        what `read` gives.

    Raises:
        InputError: the processes see other files: they would draw other batches.
    """
    with watchdog.main_process_first():
        datasets = read()
    there = [dataset for dataset in datasets if dataset is not None]
    if accelerator.is_main_process:
        for dataset in there:
            dataset.report()
    if accelerator.num_processes > 1:
        fingerprints = [dataset.fingerprint for dataset in there]
        watchdog.wait_for_everyone()  # some may be reading still
        for dataset, *seen in zip(there, *gather_object([fingerprints])):
            if len(set(seen)) > 1:
                raise InputError(
                    f"{dataset.name}: its files are not the same for all processes: some see others, or cannot read "
                    "them; check that all can, and start again"
                )
    return datasets


def _parse(address):
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
