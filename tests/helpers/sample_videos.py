"""Read the sample videos of a run."""

import numpy as np

from c2r.data.video import read_window
from tests.helpers.commands import SIZE


def row_of(file, columns=4):
    """Return the columns of a sample's mp4, each (F, 3, H, W) uint8."""
    frames = read_window(file, 0.0, SIZE["num_frames"], SIZE["fps"], SIZE["height"], columns * SIZE["width"])
    return (
        np.asarray(frames)
        .reshape(SIZE["num_frames"], 3, SIZE["height"], columns, SIZE["width"])
        .transpose(3, 0, 1, 2, 4)
    )


def difference(a, b):
    """Return the mean absolute difference of two videos in uint8."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean()
