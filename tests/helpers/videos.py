"""Video files for tests, encoded by PyAV. The brightness of a frame tells its number."""

from fractions import Fraction

import av
import numpy as np
import torch

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (230, 230, 230)


def level(index):
    """Return the brightness of a frame, in [20, 236): steps of 8 survive lossy codecs, and repeat after 27 frames."""
    return 20 + 8 * (index % 27)


def counter_frames(count, height=48, width=64):
    """Return grey frames (F, H, W, 3) uint8; frame n has the brightness `level(n)`."""
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    frames[:] = np.array([level(n) for n in range(count)], dtype=np.uint8)[:, None, None, None]
    return frames


def read_counter(window):
    """Return the number (modulo 27) of each frame of a (F, 3, H, W) uint8 window."""
    return [round((float(brightness) - 20) / 8) % 27 for brightness in window.float().mean(dim=(1, 2, 3))]


def corner_frames(count, height, width):
    """Return frames (F, H, W, 3) uint8 with red, green, blue and white quarters, from the top left by rows."""
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    top, left = height // 2, width // 2
    frames[:, :top, :left], frames[:, :top, left:] = RED, GREEN
    frames[:, top:, :left], frames[:, top:, left:] = BLUE, WHITE
    return frames


def corners(window):
    """Return the mean colours (4, 3) of the quarters of a window's frame 0, without their edges, by rows."""
    _, _, height, width = window.shape
    h, w = height // 2, width // 2
    quarters = [window[0, :, y : y + h, x : x + w] for y in (0, h) for x in (0, w)]
    return torch.stack([q[:, h // 4 : -h // 4, w // 4 : -w // 4].float().mean(dim=(1, 2)) for q in quarters])


def assert_corners(window, colours, tolerance=8):
    torch.testing.assert_close(corners(window), torch.tensor(colours).float(), atol=tolerance, rtol=0)


def encode_video(
    path,
    frames,
    fps=16,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    times=None,
    rotation=None,
    hflip=False,
    sample_aspect_ratio=None,
    sound_seconds=0,
    key_frame_interval=12,
):
    """Encode (F, H, W, 3) uint8 RGB frames and return the path.

    Args:
        times: seconds of each frame, for a variable frame rate; None: n / fps.
        rotation, hflip: display matrix (degrees counter-clockwise) for players; the frames are stored as given.
        sound_seconds: length of an audio stream; 0: none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = key_frame_interval
        if sample_aspect_ratio is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=hflip)
        clock = Fraction(1, 1000) if times is not None else 1 / Fraction(fps).limit_denominator(1001)
        if times is not None:
            stream.codec_context.time_base = clock
        sound = (
            container.add_stream("aac" if path.suffix in (".mp4", ".mov", ".ts") else "libopus", rate=48000)
            if sound_seconds
            else None
        )
        for n, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.time_base = clock
            frame.pts = n if times is None else round(times[n] * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for start in range(0, int(48000 * sound_seconds), 960):
                samples = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), "fltp", "stereo")
                samples.sample_rate, samples.pts, samples.time_base = 48000, start, Fraction(1, 48000)
                container.mux(sound.encode(samples))
            container.mux(sound.encode())
    return path
