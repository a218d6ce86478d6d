"""Write the toy's folder; `c2r.toy.__main__` lists its content."""

import csv
import functools
import hashlib
import json
import logging
import multiprocessing
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, NotRequired

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm
from typing_extensions import TypedDict

from c2r import InputError
from c2r.data.video_writer import write_video
from c2r.files import read_json
from c2r.toy import city

HEIGHT, WIDTH, NUM_FRAMES, FPS = 96, 160, 9, 8
VIDEO_FRAMES = 2 * NUM_FRAMES  # two windows a video
NUM_VALIDATION, NUM_TEST = 6, 8

SHARED_OPTIONS = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": NUM_FRAMES,
    "fps": FPS,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "none",
    "mixed_precision": "no",
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 10,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 50,
    "checkpoints_total_limit": 2,
    "validation_steps": 100,
    "num_validation_clips": 12,
}
PHASE1_OPTIONS = SHARED_OPTIONS | {"learning_rate": 5e-4, "max_train_steps": 100}
PHASE2_OPTIONS = SHARED_OPTIONS | {
    "learning_rate": 1e-3,
    "max_train_steps": 300,
    "validation_steps": 150,
    "num_validation_clips": 4,
    "control_layers": 4,
    "control_stride": 1,
    "cg_ratio": 0.2,
    "num_samples": 4,
    "sample_steps": 300,
    # Of the scales tried in the quickstart, those whose videos are about as sharp as the true ones. Higher ones make
    # gaudy colours, and the people correlation is the same.
    "guidance": "cfg",
    "guidance_scale": 2.0,
    "control_guidance_scale": 2.0,
}

logger = logging.getLogger(__name__)


class Scene(TypedDict):
    """A test scene of the toy; the videos are paths."""

    seed: NonNegativeInt
    prompt: str
    control_video: str
    truth: str


class Toy(TypedDict):
    """The content of toy.json."""

    version: NotRequired[str]  #: see `toy_version`; absent in old folders
    height: PositiveInt
    width: PositiveInt
    num_frames: PositiveInt
    fps: PositiveInt
    test: Annotated[list[Scene], Field(min_length=1)]


def read_toy(folder: str | Path) -> Toy:
    """Read toy.json of a complete toy folder.

    Raises:
        InputError: it is missing, damaged, or of another version of the toy.
    """
    path = Path(folder) / "toy.json"
    toy = read_json(path, Toy)
    if toy.get("version") != toy_version():
        raise InputError(f"{path}: is of another version of the toy; delete {folder}, or give another --output_dir")
    return toy


@functools.cache
def toy_version() -> str:
    """Return a hash of the base models and the renderer."""
    content = hashlib.sha256(Path(city.__file__).read_bytes())
    with resources.as_file(resources.files("c2r.toy") / "weights") as weights:
        for path in sorted(weights.rglob("*.safetensors")):
            content.update(path.read_bytes())
    return content.hexdigest()[:16]


def write_toy(folder: str | Path, num_real: int = 96, num_cg: int = 32):
    """Write the toy: base models, datasets, test scenes and a config for each phase.

    A complete folder is left as it is.

    Args:
        folder: gets everything; toy.json is written last.
        num_real: training videos of the real look.
        num_cg: training pairs of CG and coarse videos.
    """
    folder = Path(folder)
    if (folder / "toy.json").exists():
        read_toy(folder)
        logger.info("%s is complete already", folder)
        return
    with resources.as_file(resources.files("c2r.toy") / "weights") as weights:
        for part in ("model", "dinov3"):
            shutil.copytree(weights / part, folder / part, dirs_exist_ok=True)

    real, cg, test = folder / "data/real", folder / "data/cg", folder / "test"
    pair = {"cg": "_fine", "coarse": "_coarse"}
    _write_dataset(real / "train", _seeds(1_000_000, num_real), {"real": ""})
    _write_dataset(real / "validation", _seeds(1_500_000, NUM_VALIDATION), {"real": "", "coarse": "_coarse"})
    _write_dataset(cg / "train", _seeds(2_000_000, num_cg), pair, caption_look="cg")
    _write_dataset(cg / "validation", _seeds(2_500_000, NUM_VALIDATION), pair, caption_look="cg")
    test_seeds = _seeds(3_000_000, NUM_TEST)
    _write_dataset(test, test_seeds, {"real": "_truth", "coarse": "_coarse"}, num_frames=NUM_FRAMES)

    paths = {"pretrained_model_name_or_path": str(folder / "model"), "real_dataset": str(real)}
    _write_config(folder / "phase1.yaml", paths | PHASE1_OPTIONS)
    paths |= {"cg_dataset": str(cg), "sample_dataset": str(test), "dinov3": str(folder / "dinov3")}
    _write_config(folder / "phase2.yaml", paths | PHASE2_OPTIONS)
    scenes = [
        Scene(
            seed=seed,
            prompt=city.caption(city.make_scene(seed)),
            control_video=str(test / f"{seed}_coarse.mp4"),
            truth=str(test / f"{seed}_truth.mp4"),
        )
        for seed in test_seeds
    ]
    toy = Toy(version=toy_version(), height=HEIGHT, width=WIDTH, num_frames=NUM_FRAMES, fps=FPS, test=scenes)
    (folder / "toy.json").write_text(json.dumps(toy, indent=2) + "\n")


def _seeds(first: int, count: int) -> range:
    return range(first, first + count)


def _write_dataset(
    folder: Path,
    seeds: Sequence[int],
    suffixes: dict[str, str],
    num_frames: int = VIDEO_FRAMES,
    caption_look: str = "real",
):
    """Render scenes into a folder and list them in its metadata.csv.

    Args:
        folder: gets a video SEED + suffix + .mp4 for each scene and look.
        seeds: of the scenes.
        suffixes: {look: suffix}; the first look is the target, the second one its control.
        num_frames: of each video.
        caption_look: the look that the captions describe.
    """
    names = {seed: {look: f"{seed}{suffix}.mp4" for look, suffix in suffixes.items()} for seed in seeds}
    jobs = [(seed, num_frames, {look: folder / name for look, name in names[seed].items()}) for seed in seeds]
    with multiprocessing.Pool() as pool:
        for _ in tqdm(pool.imap_unordered(_render_videos, jobs), total=len(jobs), desc=str(folder)):
            pass
        pool.close()  # leaving the block first would end the workers by a signal, and each would print that
        pool.join()
    columns = ("file_name", "control_name")[: len(suffixes)]
    rows = [(*names[seed].values(), city.caption(city.make_scene(seed), caption_look)) for seed in seeds]
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([(*columns, "text"), *rows])


def _render_videos(job):
    seed, num_frames, paths = job
    clips = city.render(city.make_scene(seed), tuple(paths), num_frames, FPS, HEIGHT, WIDTH)
    for look, path in paths.items():
        write_video(path, clips[look], FPS)


def _write_config(path, options):
    path.write_text(yaml.safe_dump(options, sort_keys=False))
