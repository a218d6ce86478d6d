"""Videos that show a scene's control, generated videos and truth side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch
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
        generated = [source.videos[scene.name][0] for source in sources]
        size = (form.num_frames, form.fps, form.height, form.width)
        columns = [read_window(path, 0.0, *size).float() / 255 for path in generated]
        black = torch.zeros_like(columns[0])
        if with_control:
            known = scene.read(scene.control, form)
            columns.insert(0, black if known is None else known)
        if with_truth:
            known = scene.read(scene.truth, form)
            columns.append(black if known is None else known)
        frames = rearrange(torch.cat(columns, dim=-1), "f c h w -> f h w c")
        written[scene.name] = folder / f"{scene.name}.mp4"
        write_video(written[scene.name], frames, form.fps)
    return names, written
