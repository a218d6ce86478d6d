"""Renderings of the toy city, on which the base models are trained."""

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np

from c2r.toy import city

NUM_FRAMES, HEIGHT, WIDTH = 9, 96, 160


def _render_one(seed):
    clips = city.render(city.make_scene(seed), num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH)
    return np.stack([clips[look] for look in city.LOOKS]), clips["kinds"]


def render_scenes(
    work_dir: Path, num_scenes: int, first_seed: int = 10_000_000
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Render scenes once into memory-mapped files, whose names change with the renderer.

    Returns:
        clips (n, 3 looks, F, H, W, 3) uint8, kinds (n, F, H, W) uint8, and the seeds of the scenes.
    """
    seeds = range(first_seed, first_seed + num_scenes)
    key = f"{num_scenes}_{_hash(Path(city.__file__))}"
    clips_path, kinds_path = work_dir / f"clips_{key}.npy", work_dir / f"kinds_{key}.npy"
    if not kinds_path.exists():
        shape = (num_scenes, len(city.LOOKS), NUM_FRAMES, HEIGHT, WIDTH, 3)
        clips = np.lib.format.open_memmap(work_dir / "clips.part.npy", "w+", np.uint8, shape)
        kinds = np.empty((num_scenes, NUM_FRAMES, HEIGHT, WIDTH), np.uint8)
        with multiprocessing.Pool() as pool:
            for i, (clip, kind) in enumerate(pool.imap(_render_one, seeds, chunksize=8)):
                clips[i], kinds[i] = clip, kind
            pool.close()
            pool.join()
        clips.flush()
        (work_dir / "clips.part.npy").rename(clips_path)
        np.save(work_dir / "kinds.part.npy", kinds)
        (work_dir / "kinds.part.npy").rename(kinds_path)
    return np.load(clips_path, mmap_mode="r"), np.load(kinds_path), list(seeds)


def _hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
