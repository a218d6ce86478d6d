"""Coarse videos by the options of `c2r.generate`: their names, shape and length, and their frames."""

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from c2r import InputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def name_controls(args: Namespace):
    """Check that the coarse videos exist; name image sequences by pattern and rate. Changes `args` in place.

    Raises:
        InputError: one is missing or incomplete.
    """
    from c2r.data.control_video import name_control

    for i, path in enumerate(args.control_video or []):
        rate = args.sequence_fps or args.fps
        if rate == "control" and not Path(path).is_file():
            raise InputError(f"--fps control: pictures have no rate of their own ({path}); give --sequence_fps too")
        try:
            args.control_video[i] = name_control(path, 1.0 if rate == "control" else rate)
        except InputError as error:
            raise InputError(f"--control_video {error}") from None


def follow_control(args: Namespace):
    """Set height and width to those that crop least from the first coarse video. Changes `args` in place.

    Raises:
        InputError: no coarse video is given, or its shape cannot be read.
    """
    from c2r.data.buckets import fitting_size
    from c2r.data.video import probe

    if not args.control_video:
        raise InputError("--follow_control: needs the shape of a --control_video; give one, or --height and --width")
    args.height, args.width = fitting_size(probe(args.control_video[0]).aspect, args.height * args.width)


@dataclass(frozen=True)
class Length:
    """Frames and rate of a video."""

    num_frames: int
    fps: float

    @property
    def generated(self) -> int:
        """Frames that are generated, 4k + 1; those beyond num_frames are not written."""
        return self.num_frames + -(self.num_frames - 1) % 4


def length_of(args: Namespace, control: str | None) -> Length:
    """Return the length of the video that a coarse video gives.

    Raises:
        InputError: --num_frames is all, and the coarse video hardly changes.
    """
    from c2r.data.video import probe

    if control is None:
        return Length(args.num_frames, args.fps)
    info = probe(control)
    fps = info.rate if args.fps == "control" else args.fps
    if args.num_frames != "all":
        return Length(args.num_frames, fps)
    if info.is_frozen_at(fps):
        raise InputError(f"{control}: hardly changes at --fps {fps:g}; lower it, or give --fps control")
    return Length(info.frames_at(fps), fps)


def check_controls(args: Namespace):
    """Check that the coarse videos are long enough, and warn of those whose picture is much cropped.

    Raises:
        InputError: one is too short, or cannot be read.
    """
    from c2r.data.buckets import MUCH_CROPPED, cropped_share, fitting_size
    from c2r.data.video import probe

    for path in args.control_video or []:
        info = probe(path)
        cropped = cropped_share(info.aspect, args.width / args.height)
        if cropped > MUCH_CROPPED:
            height, width = fitting_size(info.aspect, args.height * args.width)
            logger.warning(
                "--control_video %s: %.0f %% of its picture is cropped away at %dx%d; to keep it, give --height %d "
                "--width %d, or --follow_control",
                *(path, 100 * cropped, args.height, args.width, height, width),
            )
        length = length_of(args, path)
        if info.is_image and length.num_frames > 1:
            raise InputError(
                f"--control_video {path}: one picture, but --num_frames is {length.num_frames}; give a video, or the "
                "folder of an image sequence"
            )
        available = info.frames_at(length.fps)
        if available < length.num_frames:
            raise InputError(
                f"{path}: gives {available} frames at {length.fps:g} fps, but --num_frames is {length.num_frames}; "
                "give a longer video, or lower --num_frames; --num_frames all takes what there is"
            )


def read_padded(control: str, length: Length, height: int, width: int) -> "torch.Tensor":
    """Read a coarse video's start, (F, 3, H, W) in [0, 1]; its last frame is repeated where F = 4k + 1 needs more."""
    from c2r.data.control_video import read_control

    frames = read_control(control, length.num_frames, length.fps, height, width)
    missing = length.generated - length.num_frames
    return frames if missing == 0 else frames[[*range(length.num_frames), *[-1] * missing]]
