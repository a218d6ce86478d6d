"""The scenes of a dataset that videos are measured on: prompt, coarse control, true video and passes of a renderer."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from c2r import InputError
from c2r.data.buckets import MUCH_CROPPED, check_pixels, cropped_share
from c2r.data.clips import DatasetFile
from c2r.data.drop_reasons import DropRow
from c2r.data.folders import LocalFolder
from c2r.data.metadata import Row, find_metadata, rows_of
from c2r.data.remote import is_remote
from c2r.data.rows import locate, part_of
from c2r.data.video import probe, read_window
from c2r.scoring.passes import check_pass

logger = logging.getLogger(__name__)

#: Endings of videos that were made elsewhere.
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")

#: Rates that differ by more than this share are different.
RATE_TOLERANCE = 0.005

#: Shapes that differ by more than this share show another part of the scene.
ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True)
class ClipFormat:
    """Length, size and rate of all videos of an evaluation."""

    num_frames: int
    height: int
    width: int
    fps: float

    def __str__(self):
        return f"{self.num_frames} frames of {self.height}x{self.width} at {self.fps:g} fps"


@dataclass(frozen=True)
class Scene:
    """One row of the dataset.

    Attributes:
        name: its file's name without the ending; that of the control if there is no true video.
        prompt: what to generate; "" if the row has none.
        start: seconds from the start of its files.
        control, truth: the coarse and the true video; None if there is none.
        ids, depth: passes of the renderer; None if there are none.
    """

    name: str
    prompt: str
    start: float
    control: DatasetFile | None
    truth: DatasetFile | None
    ids: DatasetFile | None
    depth: DatasetFile | None

    def read(self, file: DatasetFile | None, form: ClipFormat) -> torch.Tensor | None:
        """Return the frames of one of its videos, (F, 3, H, W) float32 in [0, 1]; None for None."""
        if file is None:
            return None
        frames = read_window(file.path, self.start, form.num_frames, form.fps, form.height, form.width)
        return frames.float() / 255


def read_scenes(address: str, cache_dir: str | Path, sequence_fps: float | None, max_clips: int | None) -> list[Scene]:
    """Read the rows of a dataset: those of its validation/ if it has one, else all.

    Args:
        address: the dataset's folder.
        cache_dir: its metadata is kept there in the form that `datasets` reads.
        sequence_fps: rate of image sequences whose row has none.
        max_clips: number of rows to take; None: all.

    Raises:
        InputError: a row names a file that is not there, or has the name of another one.
    """
    if is_remote(address):
        raise InputError(f"--dataset {address}: is not on this machine; copy it, and give the folder")
    folder = LocalFolder(address)
    metadata_folder, table = find_metadata(folder, "real", cache_dir)[-1]
    bases = [base for base in dict.fromkeys((metadata_folder, "", "train")) if folder.has_folder(base)]
    scenes: dict[str, Scene] = {}
    for number, row in enumerate(rows_of(table, f"{folder.address}/{metadata_folder}".rstrip("/")), start=1):
        if max_clips is not None and number > max_clips:
            break
        where = f"--dataset {address}: row {number} of its metadata"
        try:
            scene = _scene(folder, bases, row, sequence_fps)
        except DropRow as drop:
            detail = f" ({drop.detail})" if drop.detail else ""
            raise InputError(f"{where}: {drop.reason}{detail}; correct or remove the row") from None
        if scene.name in scenes:
            raise InputError(
                f"{where}: {scene.name} is the name of an earlier row too; give each scene a file of its own"
            )
        scenes[scene.name] = scene
    return [*scenes.values()]


def _scene(folder: LocalFolder, bases: list[str], row: Row, sequence_fps: float | None) -> Scene:
    fps, part = row.fps or sequence_fps, part_of(row.start, row.end)
    names = {"truth": row.file_name, "control": row.control_name, "ids": row.id_name, "depth": row.depth_name}
    files = {kind: locate(folder, bases, name, fps) if name else None for kind, name in names.items()}
    named = files["truth"] or files["control"] or locate(folder, bases, row.file_name, fps)  # which raises
    return Scene(_stem(named), row.text, part[0] if part else 0.0, **files)


def _stem(file: DatasetFile) -> str:
    """Return a file's path in its folder without the ending; a sequence's without its pattern and rate."""
    path = PurePosixPath(file.name)
    if "%" in path.name:  # shot/frame_%04d.png@24
        parent, prefix = path.parent, path.name.partition("%")[0].rstrip("_-. ")
        path = parent if parent.name else parent / (prefix or "video")
    return str(path.with_suffix("")) if path.suffix else str(path)


def check_scenes(scenes: Sequence[Scene], form: ClipFormat) -> None:
    """Check that every file of the scenes is a video that is long enough, reading headers and first frames only.

    A warning names the scene whose picture is cropped most, if that is much.

    Raises:
        InputError: one is not, or a pass shows another shape than the scene's video.
    """
    cropped = {}
    for scene in scenes:
        aspect = None
        for file in filter(None, (scene.control, scene.truth)):
            info = probe(file.path)
            aspect = aspect or info.aspect
            cropped[scene.name] = cropped_share(aspect, form.width / form.height)
            _require_length(file.path, info, scene.start, form)
        for kind, file in (("id_name", scene.ids), ("depth_name", scene.depth)):
            if file is None:
                continue
            info = probe(file.path)
            _require_length(file.path, info, scene.start, form)
            if abs(info.aspect / aspect - 1) > ASPECT_TOLERANCE:
                raise InputError(
                    f"{file.path}: has the shape {info.aspect:.3g}:1, but the video of its row {aspect:.3g}:1; render "
                    f"the {kind} pass with the video's camera"
                )
            check_pass(file.path, "ids" if kind == "id_name" else "depth")

    worst = max(cropped, key=cropped.__getitem__)
    if cropped[worst] > MUCH_CROPPED:
        logger.warning(
            "%s: %.0f %% of its picture is cropped away at %dx%d, the most of all scenes",
            *(worst, 100 * cropped[worst], form.height, form.width),
        )


def _require_length(path, info, start, form):
    if info.is_image:
        raise InputError(f"{path}: one picture; give a video, or the folder of an image sequence")
    available = (
        0 if info.is_frozen_at(form.fps) else int((float(info.last + info.interval / 2) - start) * form.fps) + 1
    )
    if available < form.num_frames:
        raise InputError(
            f"{path}: gives {max(available, 0)} frames at {form.fps:g} fps, but clips have {form.num_frames}; give a "
            "longer video, or lower --num_frames"
        )


def other_controls(scenes: Sequence[Scene]) -> list[Scene]:
    """Return for each scene the next one that has another control.

    Raises:
        InputError: all have the same control.
    """
    chosen = []
    for position, scene in enumerate(scenes):
        others = (*scenes[position + 1 :], *scenes[:position])
        other = next((other for other in others if other.control != scene.control), None)
        if other is None:
            raise InputError("--control shuffled: all scenes have the same control; give at least two scenes")
        chosen.append(other)
    return chosen


def find_videos(folder: str, scenes: Iterable[Scene]) -> dict[str, Path]:
    """Return the video of each scene in a folder of videos that were made elsewhere.

    A video has the name of the scene, or that of its control, and one of VIDEO_SUFFIXES.

    Raises:
        InputError: there is no such folder, or a scene has no video in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"--videos {folder}: no such folder; give one with a video for each scene")
    found = {}
    for scene in scenes:
        names = [scene.name, *([_stem(scene.control)] if scene.control else [])]
        paths = [Path(folder) / f"{name}{suffix}" for name in names for suffix in VIDEO_SUFFIXES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise InputError(f"--videos {folder}: has no {paths[0].name}; add the scene's video under this name")
        found[scene.name] = path
    return found


def check_video(path: Path, form: ClipFormat) -> None:
    """Check the length, size and rate of a video that was made elsewhere.

    Raises:
        InputError: they are not those of the evaluation.
    """
    found = format_of(path)
    if found.num_frames < form.num_frames:
        raise InputError(
            f"{path}: has {found.num_frames} frames, but clips have {form.num_frames}; lower --num_frames"
        )
    if (found.height, found.width) != (form.height, form.width):
        raise InputError(
            f"{path}: is {found.height}x{found.width}, but the clips are {form.height}x{form.width}; resize it, or "
            "give --height and --width"
        )
    if abs(found.fps / form.fps - 1) > RATE_TOLERANCE:
        raise InputError(f"{path}: has {found.fps:g} fps, but the clips {form.fps:g}; convert it, or give --fps")


def format_of(path: Path) -> ClipFormat:
    """Return the format of a video file.

    Raises:
        InputError: it cannot be decoded, or is a picture.
    """
    info = probe(path)
    if info.is_image:
        raise InputError(f"{path}: one picture; give a video")
    return ClipFormat(info.native_frames, info.height, round(info.aspect * info.height), info.rate)


def common_format(
    of_models: Mapping[str, ClipFormat], videos: Sequence[Path], asked: Mapping[str, Any], encoded: bool
) -> ClipFormat:
    """Return the format of all videos: that of the models, or else of videos that were made elsewhere.

    Args:
        of_models: {model: format that it makes}.
        videos: made elsewhere; the first one counts.
        asked: {field of the format: value that is asked of these videos; None: their own}.
        encoded: clips of datasets are encoded in this format, to compare with, which needs 4k + 1 frames.

    Raises:
        InputError: two models make different formats, or clips of datasets cannot be encoded in this one.
    """
    for model, form in of_models.items():
        first, wanted = next(iter(of_models.items()))
        if form != wanted:
            raise InputError(
                f"--model {model}: makes {form}, but {first} makes {wanted}; give --num_frames, --height, --width and "
                "--fps for both"
            )
    if of_models:
        return next(iter(of_models.values()))
    form = ClipFormat(
        **vars(format_of(videos[0])) | {name: value for name, value in asked.items() if value is not None}
    )
    if not encoded:
        return form
    for side in ("height", "width"):
        try:
            check_pixels(getattr(form, side))
        except ValueError:
            raise InputError(
                f"--videos {videos[0]}: {side} {getattr(form, side)} is not divisible by 16, as clips of "
                "--real_dataset and --cg_dataset must be; leave these out, or resize the videos"
            ) from None
    whole = (form.num_frames - 1) // 4 * 4 + 1
    if whole != form.num_frames:
        logger.warning(
            "--num_frames: %d of %d frames are measured, as clips of --real_dataset and --cg_dataset have 4k + 1",
            *(whole, form.num_frames),
        )
    return replace(form, num_frames=whole)
