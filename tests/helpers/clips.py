"""Clips without videos, for tests that choose among clips."""

import numpy as np
import pyarrow as pa

from c2r.data.buckets import Bucket
from c2r.data.clips import ENTRY, Clip, Clips, FileTable

BUCKET = Bucket(5, 32, 48)


def clip(name, window=0, domain="real", text="a street", bucket=BUCKET, held_out=False):
    """Return a `Clip` whose file does not exist."""
    return Clip("data", name, text, domain, window, 0.0, bucket, 1, 1, held_out)


def clips_of(*clips, fps=16):
    """Return `Clips` of one table with a row for each of the given clips."""
    buckets = tuple(dict.fromkeys(clip.bucket for clip in clips))
    ones = np.ones(len(clips), np.int64)
    table = FileTable(
        folder="data",
        domain=clips[0].domain if clips else "real",
        fps=fps,
        buckets=buckets,
        names=pa.array([clip.name for clip in clips], pa.string()),
        texts=pa.array([clip.text for clip in clips], pa.string()),
        sizes=ones,
        mtimes=ones,
        control_names=pa.array([None] * len(clips), pa.string()),
        control_sizes=ones,
        control_mtimes=ones,
    )
    rows = [(0, row, c.window, 0, buckets.index(c.bucket), c.held_out) for row, c in enumerate(clips)]
    return Clips([table], np.array(rows, ENTRY))
