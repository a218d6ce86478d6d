"""Videos that show a scene's control, generated videos, truth and the renderer's passes side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from c2r.data.clips import DatasetFile
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.scoring.measuring import Source
from c2r.scoring.passes import read_pass
from c2r.scoring.scenes import ClipFormat, Scene

#: Gives a scene's frames (F, H, W, 3) uint8; None if it has none.
Column = Callable[[Scene], np.ndarray | None]


def write_side_by_side(
    sources: Sequence[Source], scenes: Sequence[Scene], form: ClipFormat, folder: Path
) -> tuple[list[str], dict[str, Path]]:
    """Write a video of each scene.

    Args:
        sources: the first video of each scene is shown.
        scenes: of the dataset.
        form: of all videos.
        folder: gets an mp4 of each scene.

    Returns:
        the names of the columns, and {scene: file}.
    """
    columns = _columns(sources, scenes, form)
    written = {}
    for scene in scenes:
        # As bytes and in one array: ten columns of 81 frames of 480x832 are 1 GB, as floats they would be 4.
        frames = np.zeros((form.num_frames, form.height, len(columns) * form.width, 3), np.uint8)
        for number, column in enumerate(columns.values()):
            shown = column(scene)
            if shown is not None:  # else it stays black
                frames[:, :, number * form.width : (number + 1) * form.width] = shown
        written[scene.name] = folder / f"{scene.name}.mp4"
        write_video(written[scene.name], frames, form.fps)
    return [*columns], written


def _columns(sources: Sequence[Source], scenes: Sequence[Scene], form: ClipFormat) -> dict[str, Column]:
    """Return {name: column}, without files that no scene has."""
    size = (form.num_frames, form.fps, form.height, form.width)

    def pixels(path, start):
        return read_window(path, start, *size).numpy().transpose(0, 2, 3, 1)

    def ids(path, start):
        return colours_of(read_pass(path, "ids", start, *size).numpy())

    def depth(path, start):
        return greys_of(read_pass(path, "depth", start, *size).numpy())

    def of_scene(kind, read):
        def column(scene):
            file: DatasetFile | None = getattr(scene, kind)
            return None if file is None else read(file.path, scene.start)

        return column

    def generated(source):
        return lambda scene: pixels(source.videos[scene.name][0], 0.0)

    columns = {
        "control": of_scene("control", pixels),
        **{source.name: generated(source) for source in sources},
        "truth": of_scene("truth", pixels),
        "ids": of_scene("ids", ids),
        "depth": of_scene("depth", depth),
    }
    absent = {kind for kind in ("control", "truth", "ids", "depth") if not any(getattr(s, kind) for s in scenes)}
    return {name: column for name, column in columns.items() if name not in absent}


def colours_of(ids: np.ndarray) -> np.ndarray:
    """Return ids (F, H, W) as colours (F, H, W, 3) uint8; 0, the background, is black."""
    # Multiples of odd numbers spread ids that follow each other over all colours.
    return np.stack([ids.astype(np.int64) * factor % 256 for factor in (97, 57, 159)], -1).astype(np.uint8)


def greys_of(depth: np.ndarray) -> np.ndarray:
    """Return depth (F, H, W) as greys (F, H, W, 3) uint8: near is bright, and what has no surface is black."""
    finite = np.isfinite(depth)
    near, far = np.percentile(depth[finite], (1, 99)) if finite.any() else (0.0, 1.0)
    nearness = 1 - (np.where(finite, depth, far) - near) / max(far - near, 1e-12)
    greys = np.where(finite, 55 + 200 * nearness.clip(0, 1), 0)
    return np.repeat(greys[..., None], 3, -1).astype(np.uint8)
