"""Find the cuts of a video with PySceneDetect's adaptive detector.

Frames are decoded and timed as everywhere in this package: cuts have the times of the frames, at any frame rate.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain

import numpy as np
from av.video.reformatter import Interpolation

from c2r import InputError
from c2r.data.video import open_frames
from c2r.data.video_info import to_fraction

#: Pixels of the longer side of the frames that are compared: PySceneDetect shrinks frames to about this size, too.
LONGER_SIDE = 256
#: Frames before and after each frame that it is compared with: PySceneDetect's default.
WINDOW = 2


def require_detector() -> None:
    """Raise InputError unless PySceneDetect is installed."""
    try:
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--scenes: needs PySceneDetect ({error}); pip install scenedetect-headless==0.7.2, or give --no-scenes"
        ) from None


def find_cuts(path: str, threshold: float, lost: list[Fraction]) -> list[tuple[float, float]]:
    """Find the cuts of a video.

    Args:
        path: a video, or the name of an image sequence, see `c2r.data.sequences`.
        threshold: number of times that a frame must differ more from the frame before than its neighbours do.
        lost: gets the times at which data is lost; cuts may be missed there, and found where there are none.

    Returns:
        (time of the last frame before the cut, time of the first frame after it) of each, in seconds from the first
        frame.

    Raises:
        UnusableVideo: it cannot be decoded.
    """
    from scenedetect.common import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    # A scene of one frame counts: a window across its cut would be wrong.
    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1, window_width=WINDOW)
    times: list[Fraction] = []
    cuts: list[int] = []  # positions of frames in `times`
    for number, picture in enumerate(_repeat_ends(_small_pictures(path, times, lost), WINDOW)):
        # The number passes through the detector, which would derive a wrong one from times at a variable frame rate.
        found = detector.process_frame(FrameTimecode(number, fps=1.0), picture)
        cuts += [cut.frame_num - WINDOW for cut in found]
    return [(float(times[cut - 1]), float(times[cut])) for cut in cuts]


def _small_pictures(path: str, times: list[Fraction], lost: list[Fraction]) -> Iterator[np.ndarray]:
    """Yield the frames of a video, (h, w, 3) uint8 BGR of at most LONGER_SIDE pixels; append their times."""
    size = None
    with open_frames(path, lost) as timed:
        for time, frame in timed:
            if size is None:  # kept: the frames of a file may change their size
                scale = min(1, LONGER_SIDE / max(frame.width, frame.height))
                size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
            times.append(time)
            yield frame.reformat(*size, format="bgr24", interpolation=Interpolation.AREA).to_ndarray()


def _repeat_ends(pictures: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield the first and last picture `count` times more: the detector judges no frame without neighbours."""
    last = next(pictures)
    yield from [last] * count
    for picture in chain([last], pictures):
        yield (last := picture)
    yield from [last] * count


def parts_between(cuts: Sequence[tuple[float, float]], interval: Fraction) -> list[tuple[str, str]]:
    """Return start and end of each scene as a metadata row gives them; "" at both ends of the file.

    Args:
        cuts: see `find_cuts`.
        interval: mean seconds between the frames of the file; of a pair, the longer one.
    """
    # Readers take it that the last frame of a part is shown until half an interval before its end. Where the frames
    # around a cut are further apart, the end is that much earlier: otherwise the frame after the cut would be nearest
    # to a time within the part.
    ends = [
        float(min(to_fraction(after), (to_fraction(before) + to_fraction(after) + interval) / 2))
        for before, after in cuts
    ]
    starts = ["", *(str(after) for _, after in cuts)]
    return list(zip(starts, [*map(str, ends), ""]))
