"""The videos that are measured: those that models are to generate, and those that were made elsewhere."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from c2r import InputError
from c2r.data.video_writer import write_video
from c2r.encoding.cache import encoder_fingerprint
from c2r.files import digest, read_json, write_atomic
from c2r.models.hub import resolve_model_folder
from c2r.options import EVALUATE
from c2r.scoring.measuring import Source
from c2r.scoring.scenes import ClipFormat, Scene, check_video, find_videos, other_controls


@dataclass(frozen=True)
class Task:
    """One video that a model is to generate.

    Attributes:
        path: the file.
        key: digest of all that the video depends on.
        scene: gives the prompt.
        control: the scene that gives the control; None: no control.
        seed: of the noise.
    """

    path: Path
    key: str
    scene: Scene
    control: Scene | None
    seed: int

    @property
    def note(self) -> Path:
        """The file that holds the key of the finished video."""
        return self.path.with_name(f".{self.path.stem}.json")

    def is_done(self) -> bool:
        """Return True if the video is there, complete and made from this key."""
        try:
            noted = read_json(self.note)
            return noted == {"key": self.key, "bytes": self.path.stat().st_size}
        except (InputError, OSError):  # none yet, or damaged: the video is made again
            return False

    def write(self, frames: np.ndarray, fps: float) -> None:
        """Write the video, then its note: whenever the process dies, a note belongs to its video."""
        self.note.unlink(missing_ok=True)
        write_video(self.path, frames, fps)
        write_atomic(self.note, json.dumps({"key": self.key, "bytes": self.path.stat().st_size}).encode())


def tasks_of(
    args: Namespace,
    dtype: torch.dtype,
    other_backbone: str | None,
    controls: Sequence[str],
    scenes: Sequence[Scene],
    form: ClipFormat,
    output_dir: Path,
) -> dict[str, list[Task]]:
    """Return the videos that a model is to generate, by kind of control.

    A video's file depends on the model's folder, the kind of control, the scene and the seed alone: a command with
    other models, more kinds of control or more seeds finds it again.

    Args:
        args: options of c2r.evaluate, completed from the model's contract.
        dtype: of the model's weights.
        other_backbone: fingerprint of a backbone that replaces the one of training; None if none does.
        controls: kinds of control.
        scenes: of the dataset.
        form: of the videos.
        output_dir: of the command.
    """
    parts = ["vae", "text_encoder", "tokenizer", "scheduler"]
    base = resolve_model_folder(args.pretrained_model_name_or_path, parts)
    # The contract is in the model's fingerprint, and names those of the weights and of the backbone.
    common: list[Any] = [encoder_fingerprint(Path(args.model)), other_backbone, str(dtype), asdict(form)]
    common += [encoder_fingerprint(base / part) for part in parts]
    common += [getattr(args, option.name) for option in EVALUATE.groups["sampling"]]
    common += [args.negative_prompt, args.window_frames, args.window_overlap, args.attention_backend, args.vae_tiling]
    folder = videos_folder(output_dir, args.model)
    tasks: dict[str, list[Task]] = {}
    for control in controls:
        followed: list[Scene | None] = [None] * len(scenes)
        dinov3 = None
        if control != "none":
            followed = [*(scenes if control == "own" else other_controls(scenes))]
            dinov3 = encoder_fingerprint(resolve_model_folder(args.dinov3))
        tasks[control] = []
        for scene, other in zip(scenes, followed):
            file = None
            if other is not None:
                assert other.control is not None  # `check_models` has refused scenes without control
                file = [*other.control[1:], other.start]
            for seed in range(args.seed, args.seed + args.num_seeds):
                path = folder / control / f"{scene.name}-seed{seed}.mp4"
                key = digest([*common, dinov3, scene.prompt, file, seed])
                tasks[control].append(Task(path, key, scene, other, seed))
    return tasks


def videos_folder(output_dir: Path, model: str) -> Path:
    """Return the folder for a model's videos: the end of the model's path, to read, and a digest of the whole path."""
    path = Path(model).resolve()
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(path.parts[-2:]))
    return output_dir / "videos" / f"{name}-{digest(str(path))[:8]}"


def sources_of(
    model: str, names: Mapping[str, str], tasks: Mapping[str, Sequence[Task]], scenes: Sequence[Scene]
) -> Iterator[Source]:
    """Yield a model's videos, those of each kind of control as a source.

    Args:
        model: its name.
        names: {kind of control: name of the source}.
        tasks: from `tasks_of`.
        scenes: of the dataset.
    """
    for control, of_control in tasks.items():
        paths: dict[str, list[Path]] = {scene.name: [] for scene in scenes}
        for task in of_control:
            paths[task.scene.name].append(task.path)
        seeds = tuple(task.seed for task in of_control if task.scene is of_control[0].scene)
        yield Source(names[control], paths, seeds, model, control)


def followed_scenes(tasks: Mapping[str, Sequence[Task]]) -> dict[str, dict[str, Scene]]:
    """Return {kind of control: {scene: the scene whose layout its video has}}: without control, its own."""
    return {
        control: {task.scene.name: task.control or task.scene for task in of_control}
        for control, of_control in tasks.items()
    }


def find_given_videos(folders: Mapping[str, str], scenes: Sequence[Scene]) -> list[Source]:
    """Return the videos that were made elsewhere.

    Args:
        folders: {folder: name of the source}.
        scenes: of the dataset.

    Raises:
        InputError: one is missing.
    """
    return [
        Source(name, {scene: [path] for scene, path in find_videos(folder, scenes).items()})
        for folder, name in folders.items()
    ]


def check_given_videos(given: Sequence[Source], form: ClipFormat) -> None:
    """Check the length, size and rate of videos that were made elsewhere.

    Raises:
        InputError: one has others.
    """
    for source in given:
        for (path,) in source.videos.values():
            check_video(path, form)
