"""Coarse videos of c2r.generate: the frames that are read, and their shape."""

import numpy as np
import pytest
import torch

from c2r import InputError, cli
from c2r.data.video_writer import write_video
from c2r.generation.control import Length, check_controls, follow_control, read_padded
from c2r.options import GENERATE
from tests.helpers.trained import FPS, FRAMES, HEIGHT, WIDTH
from tests.helpers.videos import counter_frames, read_counter


def options(*words):
    size = [f"--height={HEIGHT}", f"--width={WIDTH}", f"--num_frames={FRAMES}", f"--fps={FPS}"]
    return cli.parse(GENERATE, ["--model=phase2/best", "--prompt=the street", "--output=out.mp4", *size, *words])


def test_the_control_is_the_start_of_the_video_at_the_given_rate(tmp_path):
    """Its last frame is repeated until there are 4k + 1."""
    path = tmp_path / "coarse.mp4"
    write_video(path, counter_frames(12, HEIGHT, WIDTH), FPS)
    for length, expected in (
        (Length(9, FPS), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (Length(5, FPS / 2), [0, 2, 4, 6, 8]),
        (Length(6, FPS / 2), [0, 2, 4, 6, 8, 10, 10, 10, 10]),
    ):
        control = read_padded(str(path), length, HEIGHT, WIDTH)
        assert control.shape == (length.generated, 3, HEIGHT, WIDTH)
        assert control.dtype == torch.float32
        assert 0 <= control.min() < control.max() <= 1
        assert read_counter(255 * control) == expected


def test_a_control_of_another_shape_is_named_or_followed(tmp_path, caplog):
    path = tmp_path / "tall.mp4"
    write_video(path, np.zeros((12, 64, 32, 3), np.uint8), FPS)
    args = options(f"--control_video={path}")
    with caplog.at_level("WARNING"):
        check_controls(args)
    assert f"67 % of its picture is cropped away at {HEIGHT}x{WIDTH}; to keep it, give --height" in caplog.text
    caplog.clear()
    follow_control(args)
    assert args.width / args.height < 1
    check_controls(args)
    assert caplog.text == ""
    with pytest.raises(InputError, match="--follow_control: needs the shape of a --control_video"):
        follow_control(options("--follow_control"))
