"""Time and memory to start a run on a fully cached dataset of a million rows.

    python -m benchmarks.million_rows [--rows 1000000] [--folder /folder/with/room/for/two/files/a/row]

Writes empty video files, a Parquet manifest, their probes and sparse cache entries. Then starts `train_phase1.py` on
tiny models for one step: on ten rows, to measure libraries and models alone, and on all rows.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

from c2r.data.buckets import Bucket
from c2r.data.clips import DatasetFile
from c2r.data.folders import LocalFolder
from c2r.data.manifest import read_manifest
from c2r.data.probes import Probes
from c2r.data.settings import ClipSettings
from c2r.data.video_info import VideoInfo
from c2r.encoding.cache import CacheSettings, clip_path, current_encoders, prompt_path
from c2r.files import save_tensors
from tests.helpers.tiny import LATENT_CHANNELS, PROMPT_LENGTH, TEXT_DIM, save_tiny_pipeline

SIZE = {"height": 32, "width": 48, "num_frames": 5, "fps": 8}
FILES_PER_FOLDER = 1000


class FolderOfEqualVideos(LocalFolder):
    """A dataset folder that takes every file for a video of five frames, without opening it."""

    def probe(self, file: DatasetFile) -> VideoInfo:
        return VideoInfo(last=Fraction(4, 8), interval=Fraction(1, 8), aspect=1.5, is_image=False, height=480)


def write_dataset(folder: Path, rows: int, settings: ClipSettings):
    """Write a dataset of empty videos, with probes and cache entries as after `c2r.encode`."""
    names = [f"{i // FILES_PER_FOLDER:04d}/{i:07d}.mp4" for i in range(rows)]
    files = []
    for i, name in enumerate(tqdm(names, desc="videos")):
        path = folder / name
        if i % FILES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        path.touch()
        status = path.stat()
        files.append(DatasetFile(str(folder), name, 0, status.st_mtime_ns))
    texts = [f"a street, number {i}, with red brick houses and three people in the rain" for i in range(rows)]
    Dataset.from_dict({"file_name": names, "text": texts}).to_parquet(folder / "metadata.parquet")
    cache_dir = settings.cache_folder(folder)
    Probes(cache_dir).probe_missing(FolderOfEqualVideos(folder), files)
    del files, texts, names

    # All cache entries have the header of one example, and zeros that take no room on the disk.
    cache_settings, example = CacheSettings.of(settings), folder / "example.safetensors"
    tensors = {
        "latents_mean": torch.zeros(LATENT_CHANNELS, 2, 4, 6),
        "latents_logvar": torch.zeros(LATENT_CHANNELS, 2, 4, 6, dtype=torch.half),
        "prompt_embeds": torch.zeros(3, TEXT_DIM),
    }
    save_tensors(example, tensors, {"file": "example"})
    content = example.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    made = set()
    for clip in tqdm(read_manifest(folder, "real", settings, current_encoders(settings)).clips, desc="cache"):
        path = clip_path(cache_dir, clip, cache_settings)
        if path.parent not in made:
            path.parent.mkdir(parents=True)
            made.add(path.parent)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(content))
    empty = {"prompt_embeds": torch.zeros(1, TEXT_DIM)}
    save_tensors(prompt_path(cache_dir, "", cache_settings), empty, {"max_sequence_length": PROMPT_LENGTH})


def start_training(folder: Path, model: Path, out: Path) -> tuple[float, int]:
    """Run phase 1 for one step; return its seconds and peak bytes."""
    arguments = [f"--{name}={value}" for name, value in SIZE.items()]
    arguments += [f"--real_dataset={folder}", f"--pretrained_model_name_or_path={model}", f"--output_dir={out}"]
    arguments += ["--max_train_steps=1", "--train_batch_size=1", "--gradient_accumulation_steps=1"]
    arguments += ["--num_validation_clips=1", "--dataloader_num_workers=0", "--mixed_precision=no"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "train_phase1.py", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"train_phase1.py: ended with wait status {status}; its message is above")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large dataset")
    parser.add_argument("--folder", help="folder for everything that is written; default: the system's temporary one")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        scratch = Path(scratch)
        model = save_tiny_pipeline(scratch / "model")
        bucket = Bucket(SIZE["num_frames"], SIZE["height"], SIZE["width"])
        settings = ClipSettings(buckets=(bucket,), fps=SIZE["fps"], base_model=str(model))
        for rows in (10, args.rows):
            # In another process, because the peak memory of a run starts at that of the process that starts it.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(write_dataset, scratch / str(rows), rows, settings).result()
            # The first start reads the header of each cache entry, as `c2r.encode` does at its end; later starts
            # recognise the entries by size and time.
            for start in ("first start", "again"):
                seconds, memory = start_training(scratch / str(rows), model, scratch / f"{rows} {start}")
                print(
                    f"{rows:,} rows, {start}: {seconds:.1f} s to the end of step 1, {memory / 2**30:.2f} GiB at most"
                )


if __name__ == "__main__":
    main()
