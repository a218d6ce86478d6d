"""Random generators that depend on named values alone."""

import hashlib

import torch


def seeded_generator(*parts) -> torch.Generator:
    """Return a CPU generator seeded by the given values alone, such as (seed, "sample", number).

    Its numbers do not depend on what else the process has drawn or on the machine: a resumed run draws what the
    uninterrupted one would have drawn. Samples differ because each names its number.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
