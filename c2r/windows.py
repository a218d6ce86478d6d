"""Long videos: overlapping windows of latent frames that are denoised together.

In every step the model predicts a velocity for each window, the velocities are blended into one of the whole video,
and the whole video takes the step. So windows share noise and noisy latents where they overlap, and nothing is decoded
in between.

A window is to the model what a clip is in training: F = 4·(T − 1) + 1 control frames for T latent frames, of which the
first encodes one pixel frame and the others four each. In a window that starts at latent frame s > 0 of the video, the
first latent frame encodes the pixel frames 4s − 3 to 4s, but the model takes it for one of frame 4s alone. Therefore
the window's control starts at frame 4s, so that all other latent frames agree with their control as in training, and
the prediction for the first one is not used: its weight is zero, the window before covers it. The rotary position
embedding needs no offset, because attention depends only on differences of positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor


@dataclass(frozen=True)
class Window:
    """Latent frames `start` to `stop` − 1 of a video. The first `overlap` of them are also in the windows before."""

    start: int
    stop: int
    overlap: int = 0

    @property
    def latents(self) -> slice:
        """The window's latent frames."""
        return slice(self.start, self.stop)

    def frames(self, temporal_stride: int) -> slice:
        """Return the pixel frames whose control belongs to the window: the VAE's stride · (T − 1) + 1."""
        return slice(temporal_stride * self.start, temporal_stride * (self.stop - 1) + 1)

    def fade_in(self) -> torch.Tensor:
        """Return the weights (overlap,) fp32 of this window against those before, in ascending order: 0, 1/overlap, …

        The first is 0, see the module. The windows before have 1 minus these.
        """
        return torch.arange(self.overlap, dtype=torch.float32) / max(self.overlap, 1)


def default_overlap(length: int) -> int:
    """Return the default overlap of windows of `length` latent frames: about a quarter, at least one."""
    return max(1, length // 4)


def trained_window(num_frames: int) -> int | None:
    """Return the default window of a model trained on clips of `num_frames`: None for single pictures.

    Windows of one frame could not overlap.
    """
    return num_frames if num_frames > 1 else None


def plan_pixel_windows(
    num_frames: int, window_frames: int | None, window_overlap: int | None, temporal_stride: int
) -> list[Window]:
    """Cover a video with windows, see `plan_windows`, whose sizes are given in pixel frames.

    Args:
        num_frames: of the video, a multiple of the stride plus 1.
        window_frames, window_overlap: see `C2RPipeline.__call__`; windows of None are as long as the video.
        temporal_stride: the VAE's.

    Raises:
        ValueError: the sizes of the windows do not fit the stride or each other.
    """
    for name, size in (("window_frames", window_frames), ("window_overlap", window_overlap)):
        if size is not None and (size < 1 or size % temporal_stride != 1):
            raise ValueError(f"{name} is {size}: it must be a multiple of {temporal_stride} plus 1")
    if window_frames is None:
        window_frames = num_frames
    elif window_frames == 1 < num_frames:
        raise ValueError(f"window_frames is 1: windows of a longer video overlap; give at least {temporal_stride + 1}")
    elif window_overlap is not None and window_overlap >= window_frames:
        raise ValueError(f"window_overlap is {window_overlap}: it must be below window_frames, {window_frames}")
    length = (window_frames - 1) // temporal_stride + 1
    overlap = default_overlap(length) if window_overlap is None else (window_overlap - 1) // temporal_stride + 1
    return plan_windows((num_frames - 1) // temporal_stride + 1, length, overlap)


def plan_windows(num_latent_frames: int, length: int, overlap: int) -> list[Window]:
    """Cover a video with windows of one length.

    The starts do not depend on the length of the video, except for the last window, which ends with the video and so
    may overlap more.

    Args:
        num_latent_frames: of the video, at least 1.
        length: latent frames of a window; of a shorter video the only window is shorter.
        overlap: latent frames that neighbouring windows share, at least 1 and below `length`.

    Raises:
        ValueError: the overlap does not fit the length.
    """
    if num_latent_frames <= length:
        return [Window(0, num_latent_frames)]
    if not 1 <= overlap < length:
        raise ValueError(f"overlap is {overlap}: it must be at least 1 and below {length}, the length of a window")
    windows = [Window(0, length)]
    while windows[-1].stop < num_latent_frames:
        stop = min(windows[-1].stop + length - overlap, num_latent_frames)
        windows.append(Window(stop - length, stop, overlap=windows[-1].stop - (stop - length)))
    return windows


def blend_windows(windows: Sequence[Window], predict: Callable[[int], torch.Tensor], like: torch.Tensor):
    """Predict for each window, and blend the predictions with linear weights that sum to 1 at each latent frame.

    Args:
        windows: result of `plan_windows`.
        predict: given the number of a window, returns its prediction (B, C, T, h, w).
        like: (B, C, T of the video, h, w), for the shape and device of the result.

    Returns:
        like `like`, in the predictions' dtype. A single window's prediction is returned as it is.
    """
    if len(windows) == 1:
        return predict(0)
    blended: torch.Tensor | None = None
    for number, window in enumerate(windows):
        prediction = predict(number).to(like.device)
        if blended is None:
            blended = torch.empty_like(like, dtype=prediction.dtype)
        shared, new = prediction[:, :, : window.overlap], prediction[:, :, window.overlap :]
        end = window.start + window.overlap
        weights = window.fade_in().to(prediction).view(1, 1, -1, 1, 1)
        # Unlike a sum of products, lerp leaves equal predictions as they are.
        blended[:, :, window.start : end] = torch.lerp(blended[:, :, window.start : end], shared, weights)
        blended[:, :, end : window.stop] = new
    return blended


def extend_noise(
    noise: torch.Tensor, num_latent_frames: int, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Append noise to that of the first window, one latent frame after another.

    So the noise of a latent frame depends on the seed, not on the length of the video.

    Args:
        noise: (B, C, T, h, w), just drawn from the generator.
        num_latent_frames: of the video.
        generator: one for all, or a list of B.

    Returns:
        (B, C, num_latent_frames, h, w) like `noise`.
    """
    shape = (*noise.shape[:2], 1, *noise.shape[3:])
    further = [
        randn_tensor(shape, generator=generator, device=noise.device, dtype=noise.dtype)
        for _ in range(num_latent_frames - noise.shape[2])
    ]
    return torch.cat([noise, *further], dim=2)
