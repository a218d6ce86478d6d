"""Cut the files of a dataset into windows: one file, a pair, or a part of them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from c2r.data.buckets import cut_into_windows, nearest_buckets
from c2r.data.clips import DatasetFile
from c2r.data.drop_reasons import DroppedRow, DropReason, DropRow
from c2r.data.failures import Window
from c2r.data.probes import Probes
from c2r.data.rows import Part
from c2r.data.settings import ClipSettings
from c2r.data.video_info import UnusableVideo, VideoInfo, to_fraction

# Largest relative difference of a pair's frame rates: 23.976 and 24 count as equal, clips last seconds only.
RATE_TOLERANCE = 0.005
# Largest relative difference of a pair's aspect ratios: encoders round sizes to even numbers. At a width of 832 pixels
# the edge moves by 4.
ASPECT_TOLERANCE = 0.01


class WindowCutter:
    """Cuts the files of one row after another, and leaves out what is known to be unusable.

    Args:
        domain: "real" or "cg".
        probes: has all files.
        failures: see `noted_failures`.
        settings: buckets and frame rate.
    """

    def __init__(
        self,
        domain: str,
        probes: Probes,
        failures: Mapping[tuple[str, int, int], Mapping[Window | None, tuple[DropReason, str]]],
        settings: ClipSettings,
    ):
        self.dropped: list[DroppedRow] = []  #: windows of rows with other, good windows
        self._domain, self._probes, self._failures, self._settings = domain, probes, failures, settings
        self._known: dict[tuple, list[tuple[int, int]]] = {}  # windows of files that are alike
        self._in_earlier_parts: Counter[str] = Counter()  # windows of a file in the rows so far

    def cut(self, files: list[DatasetFile], part: Part | None) -> dict[int, tuple[int, int]]:
        """Return the windows of a row's files by number within the file, see `cut_into_windows`.

        Raises:
            DropRow: there is no window.
        """
        infos = [self._probes.of(file) for file in files]
        key = (part, *map(id, infos))  # `Probes` keeps one object for all files that are alike
        if key not in self._known:
            self._known[key] = _cut(infos, self._settings, part)
        name = files[0].name
        windows = dict(enumerate(self._known[key], self._in_earlier_parts[name] if part else 0))
        if part:  # before a failure drops this part: the numbers of later ones must not depend on it
            self._in_earlier_parts[name] += len(windows)
        failed = []
        for file in files:
            notes = self._failures.get(file[1:], {})
            if None in notes:
                raise DropRow(*notes[None])
            # A damaged window of a real clip's coarse version costs that version alone.
            spares = self._domain == "real" and file != files[0]
            for number in [number for number in windows if self._window(windows[number]) in notes] if notes else []:
                note = notes[self._window(windows.pop(number))]
                if not windows or spares:
                    raise DropRow(*note)
                failed.append(DroppedRow(name, *note, number))
        self.dropped += failed
        return windows

    def _window(self, window):
        first, bucket = window
        frames, seconds = to_fraction(self._settings.fps).as_integer_ratio()
        return Window(first * seconds / frames, self._settings.buckets[bucket].num_frames, self._settings.fps)


def _cut(
    infos: Sequence[VideoInfo | UnusableVideo], settings: ClipSettings, part: Part | None
) -> list[tuple[int, int]]:
    """Cut a file or a pair of files, or a part of it, into windows, see `cut_into_windows`.

    Raises:
        DropRow: there is no window.
    """
    usable = []
    for info in infos:
        if isinstance(info, UnusableVideo):
            raise DropRow(info.reason, str(info))
        usable.append(info)
    if len(usable) == 2:
        _require_pair(*usable)
    fps, buckets, target = settings.fps, settings.buckets, usable[0]
    frames, first = min(info.frames_at(fps) for info in usable), 0
    if part is not None and not target.is_image:
        first, frames = _frames_of_part(part, frames, fps, max(info.interval for info in usable))
    windows = cut_into_windows(frames, target, buckets)
    if windows:
        return [(first + frame, bucket) for frame, bucket in windows]
    slow = [info for info in usable if info.is_frozen_at(fps)]
    if slow:
        raise DropRow(DropReason.FROZEN, f"{slow[0].rate:.3g} frames per second; a clip has {fps:g}")
    if target.is_image:
        raise DropRow(DropReason.IMAGE, "no bucket has one frame; name an image sequence by its folder")
    least = min(bucket.num_frames for bucket in nearest_buckets(target, buckets))
    detail = f"{frames} frames at {fps:g} fps, {target.duration:.2f} s; a clip takes {least}"
    native = min(info.native_frames for info in usable)
    if part is not None:
        native = min(native, round((min(part[1], target.duration) - part[0]) * target.rate))
    if native < least:
        raise DropRow(DropReason.TOO_SHORT, detail)
    raise DropRow(DropReason.TOO_FEW_RESAMPLED_FRAMES, detail)


def _frames_of_part(part: Part, frames: int, fps: float, interval: Fraction) -> tuple[int, int]:
    """Return the first frame of a part and the number of its frames, at the frame rate of the clips.

    Args:
        part: start and end in seconds: the times of the first frame in the part, and of the first frame after it.
        frames: the whole file's, at `fps`.
        fps: frame rate of the clips.
        interval: seconds between two frames of the file. From half of it before the end on, the nearest frame would be
            the one after the part.
    """
    start, end = part
    rate = to_fraction(fps)
    first = math.ceil(to_fraction(start) * rate)
    if end < math.inf:
        frames = min(frames, math.floor((to_fraction(end) - interval / 2) * rate) + 1)
    return first, max(0, frames - first)


def _require_pair(fine: VideoInfo, coarse: VideoInfo) -> None:
    """Raise DropRow unless two files can be cut into the same windows."""
    if fine.is_image or coarse.is_image:
        if fine.is_image != coarse.is_image:
            raise DropRow(DropReason.PAIR_OF_KINDS)
    else:
        if abs(fine.rate / coarse.rate - 1) > RATE_TOLERANCE:
            raise DropRow(DropReason.PAIR_RATE, f"{fine.rate:g} fps, its control {coarse.rate:g} fps")
        if abs(fine.duration - coarse.duration) > max(fine.interval, coarse.interval) * Fraction(3, 2):
            lengths = f"{fine.duration:.2f} s, its control {coarse.duration:.2f} s"
            raise DropRow(DropReason.PAIR_LENGTH, lengths)
    if abs(fine.aspect / coarse.aspect - 1) > ASPECT_TOLERANCE:
        raise DropRow(DropReason.PAIR_ASPECT, f"{fine.aspect:.3f}, its control {coarse.aspect:.3f}")
