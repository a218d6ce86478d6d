"""Measure what a step of phase 2 spends outside forward, backward and optimizer, and its share of a step of 1.3B.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead [--tflops 360]

Trains the toy by the script's own loop, in this process. A step's overhead is its CPU time without that of the model,
DINOv3, backward, clipping and the optimizer: reading the batch, noise, logs, guards, the progress bar. It does not
depend on the model. Noise depends on the size of the clip, so it is also measured at 81x480x832, as a GPU's host draws
it. The share is that of a step of Wan 2.1 1.3B with one clip of this size on a GPU of that many TFLOP/s.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from accelerate import Accelerator

import train_phase2
from c2r import cli
from c2r.data.buckets import Bucket
from c2r.estimation.configs import DINOV3_VITB, WAN_SIZES, ModelConfigs
from c2r.estimation.report import estimate_run
from c2r.flow_matching import SigmaDensity
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.transformer import C2RTransformer
from c2r.options import PHASE2
from c2r.toy.folder import write_toy
from c2r.training.batches import Draw
from c2r.training.dry_run import launch
from c2r.training.logs import StepLog
from c2r.training.step import NoiseSettings, make_noisy_batch

STEPS = 30
CLIP = Bucket(81, 480, 832)
PROMPT_LENGTH, TEXT_DIM = 512, 4096
#: Functions whose time is not overhead. Backward includes what checkpointing computes again.
COMPUTATION = (
    *((C2RTransformer, "forward"), (DINOv3FeatureExtractor, "forward"), (Accelerator, "backward")),
    *((Accelerator, "clip_grad_norm_"), (torch.optim.AdamW, "step")),
)


def overhead_of_steps(folder: Path) -> list[float]:
    """Train the toy and return the seconds of overhead of each step."""
    write_toy(folder, num_real=4, num_cg=4)
    options = [f"--config={folder / 'phase2.yaml'}", f"--output_dir={folder / 'out'}", "--num_samples=0"]
    options += [f"--resume_backbone_from={folder / 'model/transformer'}", f"--max_train_steps={STEPS}"]
    options += ["--train_batch_size=1", "--num_validation_clips=1"]
    computed, started = 0.0, 0.0
    found: list[float] = []
    depth = 0

    def timed(function):
        @wraps(function)
        def run(*args, **kwargs):
            nonlocal computed, depth
            before, depth = time.process_time(), depth + 1
            result = function(*args, **kwargs)
            depth -= 1
            if depth == 0:  # gradient checkpointing calls the model within backward
                computed += time.process_time() - before
            return result

        return run

    def start(log):
        nonlocal computed, started
        computed, started = 0.0, time.process_time()
        return begin(log)

    def finish(*args, **kwargs):
        end(*args, **kwargs)
        found.append(time.process_time() - started - computed)

    begin, end = StepLog.start, train_phase2.finish_step
    with ExitStack() as patches:
        for owner, name in COMPUTATION:
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        patches.enter_context(patch.object(StepLog, "start", start))
        patches.enter_context(patch.object(train_phase2, "finish_step", finish))
        launch(train_phase2.train, cli.parse(PHASE2, options))
    return found


def noise_seconds(bucket: Bucket, channels: int, rounds: int = 25) -> float:
    """Return the seconds in which a micro-batch of one clip gets its noise."""
    mean, logvar = torch.randn(2, 1, channels, *bucket.latent_grid)
    embeds = torch.randn(1, PROMPT_LENGTH, TEXT_DIM)
    batch = {"latents_mean": mean, "latents_logvar": logvar, "prompt_embeds": embeds}
    settings = NoiseSettings(0, SigmaDensity("none", 0.0, 1.0, 1.29, 3.0), 0.1, 0.1)
    times = []
    for number in range(rounds):
        started = time.process_time()
        make_noisy_batch(batch, settings, Draw([number], number, 1), embeds[0], torch.device("cpu"))
        times.append(time.process_time() - started)
    return median(times)


def step_flops() -> float:
    """Return the FLOPs of a micro-step of 1.3B with 15 control layers and one clip."""
    options = [f"--{name}=-" for name in ("resume_backbone_from", "real_dataset", "cg_dataset", "output_dir")]
    args = cli.parse(PHASE2, [*options, "--train_batch_size=1", "--control_layers=15", "--control_stride=1"])
    configs = ModelConfigs(WAN_SIZES["1.3b"], dinov3=DINOV3_VITB)
    return float(sum(estimate_run(args, configs, CLIP, step_only=True).flops.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=360.0, help="rate of the GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        toy = median(overhead_of_steps(Path(folder))[2:])  # the first steps warm up
    noise = noise_seconds(CLIP, 16)
    seconds = step_flops() / (args.tflops * 1e12)
    print(f"overhead of a step of the toy: {1000 * toy:.1f} ms; noise of a clip of {CLIP}: {1000 * noise:.1f} ms")
    print(
        f"a step of 1.3B at {args.tflops:g} TFLOP/s takes {seconds:.2f} s: overhead {(toy + noise) / seconds:.2%}",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main)
