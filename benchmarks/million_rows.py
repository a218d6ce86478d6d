"""How long a run takes to start on a manifest of a million rows that is fully cached, and how much memory.

    python -m benchmarks.million_rows [--rows 1000000] [--folder /somewhere/with/room/for/two/files/a/row]

Writes empty video files, a Parquet manifest, what `probe` would know of them and sparse cache entries, then starts
`train_phase1.py` on tiny models for one step: on ten rows, for what libraries and models take, and on all of them.
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
from types import SimpleNamespace

from datasets import Dataset
from tqdm import tqdm

from c2r.data.clips import Source
from c2r.data.manifest import read_manifest
from c2r.data.probes import Probes
from c2r.data.video import VideoInfo
from c2r.encoding.cache import CacheSettings, clip_path, prompt_path
from c2r.files import save_tensors
from tests.helpers.tiny import LATENT_CHANNELS, PROMPT_LENGTH, TEXT_DIM, save_tiny_pipeline

SIZE = {"height": 32, "width": 48, "num_frames": 5, "fps": 8}
FILES_PER_FOLDER = 1000


class KnownFolder:
    """Says of every file what `probe` would say of a video of five frames."""

    def probe(self, source):
        return VideoInfo(Fraction(4, 8), Fraction(1, 8), 1.5, False, 480)


def write_dataset(folder, rows, options):
    """A dataset of empty videos with everything cached."""
    import torch

    names = [f"{i // FILES_PER_FOLDER:04d}/{i:07d}.mp4" for i in range(rows)]
    sources = []
    for i, name in enumerate(tqdm(names, desc="videos")):
        path = folder / name
        if i % FILES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        path.touch()
        status = path.stat()
        sources.append(Source(str(folder), name, 0, status.st_mtime_ns))
    texts = [f"a street, number {i}, with red brick houses and three people in the rain" for i in range(rows)]
    Dataset.from_dict({"file_name": names, "text": texts}).to_parquet(folder / "metadata.parquet")
    cache_dir = folder / ".c2r_cache"
    Probes(cache_dir).look_into(KnownFolder(), sources)
    del sources, texts, names

    settings, example = CacheSettings.from_options(options), folder / "example.safetensors"
    tensors = {
        "latents_mean": torch.zeros(LATENT_CHANNELS, 2, 4, 6),
        "latents_logvar": torch.zeros(LATENT_CHANNELS, 2, 4, 6, dtype=torch.half),
        "prompt_embeds": torch.zeros(3, TEXT_DIM),
    }
    save_tensors(example, tensors, {"file": "example"})
    content = example.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    made = set()
    for clip in tqdm(read_manifest(folder, "real", options).clips, desc="cache"):
        path = clip_path(cache_dir, clip, settings)
        if path.parent not in made:
            path.parent.mkdir(parents=True)
            made.add(path.parent)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(content))
    empty = {"prompt_embeds": torch.zeros(1, TEXT_DIM)}
    save_tensors(prompt_path(cache_dir, "", settings), empty, {"max_sequence_length": PROMPT_LENGTH})


def start_training(folder, model, out):
    """Seconds and peak bytes of a run of one step."""
    arguments = [f"--{name}={value}" for name, value in SIZE.items()]
    arguments += [f"--real_dataset={folder}", f"--pretrained_model_name_or_path={model}", f"--output_dir={out}"]
    arguments += ["--max_train_steps=1", "--train_batch_size=1", "--gradient_accumulation_steps=1"]
    arguments += ["--num_validation_clips=1", "--dataloader_num_workers=0", "--mixed_precision=no"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "train_phase1.py", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("the run has failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the manifest")
    parser.add_argument("--folder", help="where to write, default: the system's temporary folder")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        scratch = Path(scratch)
        model = save_tiny_pipeline(scratch / "model")
        options = SimpleNamespace(**SIZE, pretrained_model_name_or_path=str(model), cache_dir=None)
        for rows in (10, args.rows):
            # In a process of its own: a run's peak begins with that of this process, which starts it.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(write_dataset, scratch / str(rows), rows, options).result()
            # The first start opens each cached file's header, as the end of `c2r.encode` does; later ones know them by
            # size and time.
            for start in ("first start", "again"):
                seconds, memory = start_training(scratch / str(rows), model, scratch / f"{rows} {start}")
                print(
                    f"{rows:,} rows, {start}: {seconds:.1f} s to the end of step 1, {memory / 2**30:.2f} GiB at most"
                )


if __name__ == "__main__":
    main()
