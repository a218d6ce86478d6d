"""Write small video datasets."""

import csv
from functools import partial

import numpy as np

from c2r.data.video_writer import write_video
from c2r.evaluation.monitor import MIN_FILES, MIN_SCENES
from tests.helpers.commands import SIZE


def noise_video(seed, num_frames=10):
    """Return (F, H, W, 3) uint8 frames: coloured blocks that move."""
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (4, 6, 3)).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(frame, 2 * i, axis=1) for i in range(num_frames)]).astype(np.uint8)


def flat_video(seed, num_frames=10):
    """Return (F, H, W, 3) uint8 frames: two bright colours and their moving edge, easy to tell from `noise_video`."""
    colours = np.random.default_rng(seed).integers(200, 256, (2, 3))
    frames = np.broadcast_to(colours[0], (num_frames, 32, 48, 3)).copy()
    for i, frame in enumerate(frames):
        frame[:, : 8 + 2 * i] = colours[1]
    return frames.astype(np.uint8)


def write_dataset(folder, names, texts, controls=None, video=noise_video):
    """Write random videos and their metadata.csv; return the folder."""
    folder.mkdir(parents=True)
    columns = ["file_name", "text"] + (["control_name"] if controls else [])
    rows = zip(names, texts, *([controls] if controls else []))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    for i, name in enumerate([*names, *(controls or [])]):
        write_video(folder / name, video(i), SIZE["fps"])
    return folder


def write_monitored_datasets(folder):
    """Write real/ and cg/ with as many files as the CG monitor needs, one clip each; return the folder.

    CG videos look unlike the real ones, so that the CG monitor can tell them apart.
    """
    words = ["a street", "the city at night", "red brick", "rain", "two people on a street"]
    for part, num_real, num_cg, seed in (("train", MIN_FILES, MIN_FILES, 0), ("validation", 2, MIN_SCENES, 100)):
        real, fine, coarse = (
            [f"{kind}{i}.mp4" for i in range(count)] for kind, count in (("r", num_real), ("f", num_cg), ("c", num_cg))
        )
        texts = [words[i % len(words)] for i in range(MIN_FILES)]
        write_dataset(folder / "real" / part, real, texts, video=partial(_short, noise_video, seed))
        write_dataset(folder / "cg" / part, fine, texts, coarse, video=partial(_short, flat_video, seed))
    return folder


def _short(video, first_seed, number):
    return video(first_seed + number, SIZE["num_frames"])
