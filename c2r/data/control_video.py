"""Control videos in the forms that users have them in: files, tensors, arrays and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from c2r import InputError
from c2r.data.drop_reasons import DropRow
from c2r.data.sequences import find_sequence, is_pattern, split_rate
from c2r.data.video import probe, read_window

#: Values of a control video in [0, 1] may lie a little outside after resizing, and are clamped; more is another range.
TOLERATED = 0.25


def name_control(path: str | Path, fps: float) -> str:
    """Return the name by which a control video is read: an image sequence's pattern and rate, or the path of a file.

    Args:
        path: a video or picture, or the folder or pattern (`a_####.png`) of an image sequence.
        fps: frames per second of an image sequence.

    Raises:
        InputError: it is missing or incomplete.
    """
    path = str(path)
    if Path(path).is_file() or split_rate(path) is not None:
        return path
    if not Path(path).is_dir() and not is_pattern(path):
        raise InputError(f"{path}: no such file; give a video, or a folder or pattern of pictures")
    try:
        sequence = find_sequence(path)
    except DropRow as drop:
        raise InputError(f"{drop.detail}; give a complete sequence") from None
    return f"{sequence.folder}/{sequence.pattern}@{fps:.10g}"


def read_control(path: str, num_frames: int, fps: float, height: int, width: int) -> torch.Tensor:
    """Read the start of a control video, resized and cropped as in training.

    Args:
        path: from `name_control`.
        num_frames: F.
        fps: frames per second of the window.
        height, width: H and W in pixels.

    Returns:
        (F, 3, H, W) floats in [0, 1].

    Raises:
        InputError: it cannot be decoded, or is too short.
    """
    info = probe(path)
    available = 1 if info.is_image else info.frames_at(fps)
    if available < num_frames:
        raise InputError(
            f"{path}: gives {available} frames at {fps:g} fps, but num_frames is {num_frames}; give a longer video, "
            "or lower num_frames or fps"
        )
    return read_window(path, 0.0, num_frames, fps, height, width).float() / 255


def as_control_frames(control_video: Any, num_frames: int, fps: float, height: int, width: int) -> torch.Tensor:
    """Return control videos of any form as one tensor.

    Args:
        control_video: a video, a list of videos, or a batch of them as one tensor or array. A video is a path; a
            tensor (F, 3, H, W); an array (F, H, W, 3); or a list of F pictures of Pillow, tensors (3, H, W) or arrays
            (H, W, 3). Numbers are uint8 in [0, 255] or floats in [0, 1].
        num_frames, fps, height, width: format in which paths are read, see `read_control`; others keep their format.

    Returns:
        (B, F, 3, H, W) floats in [0, 1], B = 1 for a single video.

    Raises:
        ValueError: for another type, shape, dtype or range, or if the videos differ in shape.
        InputError: a path cannot be read.
    """
    videos: Any
    if isinstance(control_video, torch.Tensor | np.ndarray):
        videos = control_video if control_video.ndim == 5 else [control_video]
    elif isinstance(control_video, list | tuple) and control_video and _is_video(control_video[0]):
        videos = control_video
    else:
        videos = [control_video]
    frames = []
    for video in videos:
        if isinstance(video, str | Path):
            frames.append(read_control(name_control(video, fps), num_frames, fps, height, width))
        else:
            frames.append(_as_frames(video))
    shapes = {tuple(video.shape) for video in frames}
    if len(shapes) > 1:
        raise ValueError(f"the control videos have different shapes: {', '.join(map(str, sorted(shapes)))}")
    return torch.stack(frames)


def _is_video(item):
    """Return True if an item of a list is a video of its own, not a frame of one."""
    return isinstance(item, str | Path | list | tuple) or getattr(item, "ndim", 0) == 4


def _as_frames(video):
    """Return a video in memory as floats (F, 3, H, W) in [0, 1]."""
    if isinstance(video, list | tuple) and video:
        frames = [np.asarray(frame.convert("RGB")) if isinstance(frame, Image.Image) else frame for frame in video]
        kind = torch.Tensor if isinstance(frames[0], torch.Tensor) else np.ndarray
        shapes = {frame.shape if isinstance(frame, kind) else type(frame) for frame in frames}
        if len(shapes) > 1:
            raise ValueError(f"the frames of control_video differ in type or shape: {', '.join(map(str, shapes))}")
        if isinstance(frames[0], kind):
            video = torch.stack(frames) if kind is torch.Tensor else np.stack(frames)
    if isinstance(video, np.ndarray) and video.ndim == 4:
        video = torch.from_numpy(np.ascontiguousarray(video.transpose(0, 3, 1, 2)))
    if not isinstance(video, torch.Tensor):
        found = f"array of shape {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise ValueError(f"control_video is a {found}: expected a path, frames, (F, 3, H, W) or an array (F, H, W, 3)")
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(
            f"control_video has shape {tuple(video.shape)}: expected (F, 3, H, W) or an array (F, H, W, 3)"
        )
    if video.dtype == torch.uint8:
        return video.float() / 255
    if not video.is_floating_point():
        raise ValueError(f"control_video is of {video.dtype}: expected uint8, or floats in [0, 1]")
    low, high = (float(value) for value in video.aminmax())
    if not -TOLERATED <= low <= high <= 1 + TOLERATED:
        raise ValueError(f"control_video has values from {low:.3g} to {high:.3g}: expected uint8, or floats in [0, 1]")
    return video.float().clamp(0, 1)
