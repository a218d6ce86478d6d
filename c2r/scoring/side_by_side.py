"""Videos that show a scene's control, generated videos and truth side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange

from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.scoring.measuring import Source
from c2r.scoring.scenes import ClipFormat, Scene


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
    with_control = any(scene.control is not None for scene in scenes)
    with_truth = any(scene.truth is not None for scene in scenes)
    names = ["control"] * with_control + [source.name for source in sources] + ["truth"] * with_truth
    written = {}
    for scene in scenes:
        files: list[tuple[str | Path | None, float]] = [(source.videos[scene.name][0], 0.0) for source in sources]
        if with_control:
            files.insert(0, (scene.control and scene.control.path, scene.start))
        if with_truth:
            files.append((scene.truth and scene.truth.path, scene.start))
        # As bytes and in one array: ten columns of 81 frames of 480x832 are 1 GB, as floats they would be 4.
        frames = np.zeros((form.num_frames, form.height, len(files) * form.width, 3), np.uint8)
        for column, (path, start) in enumerate(files):
            if path is not None:  # else it stays black
                window = read_window(path, start, form.num_frames, form.fps, form.height, form.width)
                shown = frames[:, :, column * form.width : (column + 1) * form.width]
                shown[:] = rearrange(window.numpy(), "f c h w -> f h w c")
        written[scene.name] = folder / f"{scene.name}.mp4"
        write_video(written[scene.name], frames, form.fps)
    return names, written
