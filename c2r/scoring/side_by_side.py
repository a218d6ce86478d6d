"""Videos that show a scene's control, generated videos, truth and the renderer's passes side by side."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from c2r import InputError
from c2r.data.clips import DatasetFile
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.scoring.measuring import Source
from c2r.scoring.passes import read_pass
from c2r.scoring.scenes import ClipFormat, Scene

#: Folder of these videos in --output_dir.
FOLDER = "clips"

#: Gives a scene's frames (F, H, W, 3) uint8; None if it has none.
Column = Callable[[Scene], np.ndarray | None]


def require_own_files(output_dir: Path, scenes: Iterable[Scene], earlier: Collection[str]) -> None:
    """Check that the videos of the scenes replace no file but those of an earlier evaluation.

    Args:
        output_dir: of the command.
        scenes: of the dataset.
        earlier: names of the scenes of the evaluation that is in the folder.

    Raises:
        InputError: a file has the name of one of the videos.
    """
    for scene in scenes:
        path = _path(output_dir, scene.name)
        if scene.name not in earlier and path.exists():
            raise InputError(
                f"--output_dir {output_dir}: {path.relative_to(output_dir)} is there, but no results.json names it, "
                "so it may be yours; move it away, or give another folder"
            )


def remove_earlier_files(output_dir: Path, scenes: Iterable[Scene], earlier: Collection[str]) -> None:
    """Remove videos of an earlier evaluation that those of the scenes do not replace.

    Its arguments are those of `require_own_files`.
    """
    folder = (output_dir / FOLDER).resolve()
    for name in {*earlier}.difference(scene.name for scene in scenes):
        path = _path(output_dir, name)
        if path.is_file() and path.parent.resolve().is_relative_to(folder):  # else "..", or a link, leads out of it
            path.unlink()


def _path(output_dir, scene_name):
    return output_dir / FOLDER / f"{scene_name}.mp4"


def write_side_by_side(
    sources: Sequence[Source], scenes: Sequence[Scene], form: ClipFormat, output_dir: Path
) -> tuple[list[str], dict[str, Path]]:
    """Write a video of each scene.

    Args:
        sources: the first video of each scene is shown.
        scenes: of the dataset.
        form: of all videos.
        output_dir: gets a folder with an mp4 of each scene.

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
        written[scene.name] = _path(output_dir, scene.name)
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
    # The upper bytes of products depend on all bits of an id, which may be a colour, and differ for neighbouring ids.
    spread = ids.astype(np.int64)[..., None] * np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35]) >> 24 & 255
    return np.where(ids[..., None] == 0, 0, spread | 64).astype(np.uint8)


def greys_of(depth: np.ndarray) -> np.ndarray:
    """Return depth (F, H, W) as greys (F, H, W, 3) uint8: near is bright, and what has no surface is black."""
    finite = np.isfinite(depth)
    near, far = np.percentile(depth[finite], (1, 99)) if finite.any() else (0.0, 1.0)
    nearness = 1 - (np.where(finite, depth, far) - near) / max(far - near, 1e-12)
    greys = np.where(finite, 55 + 200 * nearness.clip(0, 1), 0)
    return np.repeat(greys[..., None], 3, -1).astype(np.uint8)
