"""Clips per second of each stage of reading data, for clips of 81 frames at 480x832, compared with imageio.

    python -m benchmarks.data_throughput [--step_seconds 5]

Needs imageio, which nothing else here does: `pip install imageio==2.38.1`. Writes two films of 1280x720 (H.264, 24
frames/s, 5 Mbit/s) with different intervals between key frames, and a cached clip for each window; reads the window
that begins halfway. Workers decode with one thread each, as in training, and so does imageio. Files are read from the
operating system's memory: a disk or file server adds its own time.
"""

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import torch
from av.video.reformatter import Colorspace
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from c2r.data.buckets import Bucket
from c2r.data.clips import Clip
from c2r.data.manifest import read_manifest
from c2r.data.settings import ClipSettings
from c2r.data.video import open_video, read_window, timed_frames, to_fraction
from c2r.encoding.cache import CacheSettings, clip_path, current_encoders, prompt_path
from c2r.encoding.dataset import ClipDataset
from c2r.files import save_tensors
from tests.helpers.tiny import save_tiny_pipeline

FRAMES, HEIGHT, WIDTH, FPS = 81, 480, 832, 16
FILM_HEIGHT, FILM_WIDTH, FILM_FPS, FILM_SECONDS = 720, 1280, 24, 21
#: Frames between two key frames: what streaming services use, and x264's default.
KEY_FRAME_INTERVALS = (48, 250)
LATENTS = (16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
TEXT_DIM, PROMPT_TOKENS, MAX_SEQUENCE_LENGTH = 4096, 100, 512
WORKERS = (1, 2)
SECONDS_PER_STAGE = 5


def film_frames() -> Iterator[np.ndarray]:
    """Yield the (H, W, 3) uint8 frames of a camera that pans over clouds of all sizes, with grain."""
    rng = np.random.default_rng(0)
    count = FILM_FPS * FILM_SECONDS
    size = FILM_HEIGHT, FILM_WIDTH + 3 * count
    scene = np.zeros((*size, 3), np.float32)
    for scale in (2, 8, 32, 128):
        patches = rng.integers(0, 256, (size[0] // scale + 1, size[1] // scale + 1, 3), np.uint8)
        scene += np.asarray(Image.fromarray(patches).resize(size[::-1], Image.Resampling.BICUBIC)) / 4
    grain = rng.normal(0, 3, (8, FILM_HEIGHT, FILM_WIDTH, 1)).astype(np.float32)
    for n in range(count):
        yield (scene[:, 3 * n : 3 * n + FILM_WIDTH] + grain[n % 8]).clip(0, 255).astype(np.uint8)


def write_film(path: Path, key_frame_interval: int):
    """Write a film with a key frame every `key_frame_interval` frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FILM_FPS, options={"b": "5M"})
        stream.height, stream.width, stream.pix_fmt = FILM_HEIGHT, FILM_WIDTH, "yuv420p"
        stream.codec_context.gop_size = key_frame_interval
        # Tag the matrix that swscale uses by default: `read_window` takes untagged HD for BT.709, imageio does not.
        stream.codec_context.colorspace = Colorspace.ITU601
        for frame in film_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_dataset(folder: Path, model: Path) -> tuple[ClipSettings, list[Clip]]:
    """Write the films and a cache entry for each of their windows.

    Args:
        folder: gets the dataset.
        model: folder of a Wan pipeline.

    Returns:
        the settings, and the clip halfway into each film, in the order of `KEY_FRAME_INTERVALS`.
    """
    names = [f"{interval}.mp4" for interval in KEY_FRAME_INTERVALS]
    folder.mkdir()
    for name, interval in zip(names, KEY_FRAME_INTERVALS):
        write_film(folder / name, interval)
    with open(folder / "metadata.csv", "w", newline="") as table:
        csv.writer(table).writerows([("file_name", "text"), *((name, "a street") for name in names)])
    settings = ClipSettings(buckets=(Bucket(FRAMES, HEIGHT, WIDTH),), fps=FPS, base_model=str(model))
    cache_settings, cache_dir = CacheSettings.of(settings), settings.cache_folder(folder)
    empty = {"prompt_embeds": torch.randn(1, TEXT_DIM).bfloat16()}
    save_tensors(prompt_path(cache_dir, "", cache_settings), empty, {"max_sequence_length": MAX_SEQUENCE_LENGTH})
    clips = read_manifest(folder, "real", settings, current_encoders(settings)).clips
    for clip in clips:
        tensors = {
            "latents_mean": torch.randn(LATENTS),
            "latents_logvar": torch.randn(LATENTS).half(),
            "prompt_embeds": torch.randn(PROMPT_TOKENS, TEXT_DIM).bfloat16(),
        }
        save_tensors(clip_path(cache_dir, clip, cache_settings), tensors, {})
    halfway = (FILM_SECONDS * FPS // FRAMES) // 2
    chosen = {clip.name: clip for clip in clips if clip.window == halfway}
    return settings, [chosen[name] for name in names]


class Repeated(Dataset):
    """A dataset whose items are results of `work()`, computed on access."""

    def __init__(self, work: Callable[[], object], count: int):
        self.work, self.count = work, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.work()


def clips_per_second(work: Callable[[], object], workers: int) -> float:
    """Return the rate at which data loader workers do `work`, without the time of their start."""
    started = time.perf_counter()
    work()
    count = max(4, math.ceil(SECONDS_PER_STAGE / (time.perf_counter() - started)))
    # The clock starts when each worker has done its first item, and stops when each has done its last.
    loader = DataLoader(Repeated(work, (count + 1) * workers), None, num_workers=workers, prefetch_factor=1)
    for number, _ in enumerate(loader, 1):
        if number == workers:
            started = time.perf_counter()
    return count * workers / (time.perf_counter() - started)


def decode(clip: Clip):
    """Decode a clip's frames at the film's rate and size, without resampling and resizing."""
    end = clip.start + (FRAMES - 1) / FPS
    with open_video(clip.target_file.path) as (container, stream):
        for seconds, _ in timed_frames(clip.target_file.path, container, stream, to_fraction(clip.start)):
            if seconds >= end:
                return


def read_clip(clip: Clip) -> torch.Tensor:
    """Read a clip's frames as training does: (F, 3, H, W) uint8 RGB."""
    return read_window(clip.target_file.path, clip.start, FRAMES, FPS, HEIGHT, WIDTH)


def read_cached(dataset: ClipDataset):
    """Read an item from the cache. Its file is mapped into memory, so only the copy reads it."""
    item = dataset[0]
    for name in ("latents_mean", "latents_logvar", "prompt_embeds"):
        item[name].clone()


def discard_result(work: Callable, *arguments):
    """Do the work but return nothing: the copy of a result to the training process counts for `collate` alone."""
    work(*arguments)


def read_clip_by_imageio(clip: Clip) -> torch.Tensor:
    """Read the same frames by imageio: decode all frames up to the clip's end, and resize those needed by PIL."""
    wanted = [math.ceil((clip.start + n / FPS) * FILM_FPS - 0.5) for n in range(FRAMES)]
    scale = max(HEIGHT / FILM_HEIGHT, WIDTH / FILM_WIDTH)
    width, height = round(FILM_WIDTH * scale), round(FILM_HEIGHT * scale)
    left, top = (width - WIDTH) // 2, (height - HEIGHT) // 2
    frames = []
    for number, frame in enumerate(imageio.imiter(clip.target_file.path, plugin="pyav", thread_count=1)):
        if number in wanted:
            resized = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
            cropped = np.asarray(resized.crop((left, top, left + WIDTH, top + HEIGHT)))
            frames += [cropped] * wanted.count(number)
        if number == wanted[-1]:
            break
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def compare_with_imageio(clip: Clip, rounds: int = 3) -> tuple[float, float, float]:
    """Read a clip by `read_window` and by imageio, in turns.

    Returns:
        median seconds of `read_window` and of imageio, and the PSNR between their frames in dB.
    """
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        ours = read_clip(clip)
        between = time.perf_counter()
        theirs = read_clip_by_imageio(clip)
        times.append((between - started, time.perf_counter() - between))
    error = (ours.float() - theirs.float()).square().mean().item()
    return (*np.median(times, axis=0).tolist(), 10 * math.log10(255**2 / max(error, 1e-9)))


def print_stages(settings: ClipSettings, clip: Clip, step_seconds: list[float]):
    """Print the clips per second of each stage, and its share of training steps of these lengths."""
    dataset = ClipDataset([clip], settings)
    with_control = ClipDataset([clip], settings, with_control=True)
    item = with_control[0]
    stages: dict[str, Callable[[], object]] = {
        "decode": partial(discard_result, decode, clip),
        "decode + resize": partial(discard_result, read_clip, clip),
        "cache read": partial(read_cached, dataset),
        "control frames": partial(discard_result, with_control.control_frames, 0),
        "collate + hand over": partial(with_control.collate, [item]),
        "all of phase 1": lambda: dataset.collate([dataset[0]]),
        "all of phase 2": lambda: with_control.collate([with_control[0]]),
    }
    print(f"{'clips/s':20s}" + "".join(f"{f'{n} worker' + 's' * (n > 1):>12s}" for n in WORKERS), end="")
    print("".join(f"{f'of {seconds:g} s':>12s}" for seconds in step_seconds))
    for name, work in stages.items():
        rates = [clips_per_second(work, workers) for workers in WORKERS]
        print(f"{name:20s}" + "".join(f"{rate:12.2f}" for rate in rates), end="")
        print("".join(f"{1 / rates[-1] / seconds:12.1%}" for seconds in step_seconds), flush=True)
    print(
        f"\nThe last columns: share of each stage in a training step of that length on one clip, with {WORKERS[-1]} "
        "workers.\nWorkers read ahead while the device computes: below 100 % no step waits for data."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--step_seconds",
        type=float,
        nargs="+",
        default=[1, 5, 10],
        help="seconds of a training step on one clip",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        settings, clips = write_dataset(scratch / "data", save_tiny_pipeline(scratch / "model"))
        first = clips[0]
        print(
            f"A film of {FILM_WIDTH}x{FILM_HEIGHT}, {FILM_SECONDS} s, {first.target_file.size / 1e6:.1f} MB, "
            f"a key frame every {KEY_FRAME_INTERVALS[0]} frames; {FRAMES} frames of {HEIGHT}x{WIDTH} from "
            f"{first.start:.2f} s on\n"
        )
        print_stages(settings, first, args.step_seconds)
        print()
        for interval, clip in zip(KEY_FRAME_INTERVALS, clips):
            loader = DataLoader(Repeated(partial(compare_with_imageio, clip), 1), None, num_workers=1)
            ours, theirs, psnr = next(iter(loader))
            print(
                f"A key frame every {interval} frames: read_window {ours:.2f} s, imageio frame by frame {theirs:.2f} "
                f"s, {theirs / ours:.1f} times as long; PSNR between the two {psnr:.1f} dB"
            )


if __name__ == "__main__":
    main()
