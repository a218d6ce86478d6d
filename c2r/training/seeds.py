"""Random generators that depend on named values alone."""

import hashlib

import torch


def seeded_generator(*parts):
    """A CPU generator seeded by what is named alone, such as (seed, "sample", micro_step, place).

    Whatever else the process has drawn, and on whichever machine, the numbers are the same: a resumed run draws what
    the uninterrupted one would have drawn. Samples differ because each names its place.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
