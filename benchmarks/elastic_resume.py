"""Largest differences of runs that go on on another engine or number of processes.

    python -m benchmarks.elastic_resume [--work_dir FOLDER]

Each engine trains tiny models for 20 steps and saves at step 18. Then each engine goes on from the checkpoint of each
engine, and its losses, norms and weights at step 20 are compared with those of the uninterrupted run. All steps have
four samples: one process has them in two micro-batches of two, four processes one each. Takes 15 minutes on two cores.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

from c2r import cli
from tests.helpers.commands import (
    ENGINES,
    TORCHRUN,
    launch,
    phase1,
    phase2,
    scalars,
    succeed,
    weights,
)
from tests.helpers.datasets import write_dataset
from tests.helpers.tiny import save_tiny_dinov3, save_tiny_pipeline

STEPS, SAVED = 20, 18
#: {engine: (its launcher, clips per process and micro-step, micro-steps)}
LAUNCHES = {
    "one process": ([], 2, 2),
    **{name: (launcher, 1, 2) for name, launcher in ENGINES.items()},
    "ddp x4": ([*TORCHRUN[:-1], "--nproc_per_node=4"], 1, 1),
    "zero3 x4": (launch("deepspeed_zero3.yaml", 4), 1, 1),
    "fsdp2 x4": (launch("fsdp2.yaml", 4), 1, 1),
}


def command(work_dir: Path, phase: int, engine: str, out: Path, more: list[str]) -> list:
    """Return a script and its options, without the launcher."""
    _, batch_size, micro_steps = LAUNCHES[engine]
    options = [
        f"--train_batch_size={batch_size}",
        f"--gradient_accumulation_steps={micro_steps}",
        f"--max_train_steps={STEPS}",
        f"--checkpointing_steps={SAVED}",
        f"--validation_steps={STEPS}",
        "--num_validation_clips=1",
        "--ema_decay=0.9",
        *more,
    ]
    models = work_dir / "models"
    if phase == 1:
        return phase1(models, work_dir / "data", out, *options, launcher=())
    options += ["--num_samples=0", "--adversarial_weight=0.1", "--real_weight=2"]
    return phase2(models, work_dir / "data", models / "pipeline/transformer", out, *options, launcher=())


def train(work_dir: Path, engine: str, legs: list[tuple[int, Path, Path | None]]):
    """Run several trainings in the processes of one launch.

    Args:
        work_dir: has models/ and data/.
        engine: one of LAUNCHES.
        legs: (phase, output folder, checkpoint to go on from or None).
    """
    arguments = ["[]"]
    for phase, out, checkpoint in legs:
        more = [] if checkpoint is None else ["--resume_from_checkpoint=latest"]
        script, *options = command(work_dir, phase, engine, out, more)
        copied = [] if checkpoint is None else [str(checkpoint), str(out)]
        arguments.append(json.dumps([copied, script.removesuffix(".py"), *map(str, options)]))
    succeed(*LAUNCHES[engine][0], "-m", "tests.helpers.engine_runs", *arguments)


def differences(whole: Path, resumed: Path) -> tuple[float, float]:
    """Return the largest relative difference of a loss or norm, and the largest difference of a weight.

    Raises:
        ValueError: a number is not finite.
    """
    logged, expected = scalars(resumed), scalars(whole)
    pairs = [
        pair
        for name in ("train/loss", "train/grad_norm", "validation/loss")
        for pair in zip(logged[name], expected[name][-len(logged[name]) :], strict=True)
    ]
    if not all(math.isfinite(number) for pair in pairs for number in pair):
        raise ValueError(f"{resumed}: a loss or norm is not finite")
    relative = max(abs(a - b) / b for a, b in pairs)
    last = f"checkpoint-{STEPS}/model"
    found, wanted = weights(resumed / last), weights(whole / last)
    return relative, max((found[name] - tensor).abs().max().item() for name, tensor in wanted.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/elastic_resume"), help="emptied first")
    work_dir = parser.parse_args().work_dir.absolute()
    shutil.rmtree(work_dir, ignore_errors=True)
    save_tiny_pipeline(work_dir / "models/pipeline")
    save_tiny_dinov3(work_dir / "models/dinov3")
    texts = [f"street {i}" for i in range(8)]
    write_dataset(work_dir / "data/real", [f"r{i}.mp4" for i in range(8)], texts)
    write_dataset(work_dir / "data/cg", [f"f{i}.mp4" for i in range(8)], texts, [f"c{i}.mp4" for i in range(8)])

    def out(phase, engine, source=None):
        return work_dir / f"phase{phase} on {engine} from {source}"

    for engine in LAUNCHES:
        train(work_dir, engine, [(phase, out(phase, engine), None) for phase in (1, 2)])
        print(f"{engine}: trained", flush=True)
    largest = [0.0, 0.0]
    for engine in LAUNCHES:
        for phase in (1, 2):
            legs = [
                (phase, out(phase, engine, source), out(phase, source) / f"checkpoint-{SAVED}") for source in LAUNCHES
            ]
            train(work_dir, engine, legs)
            cells = []
            for source in LAUNCHES:
                found = differences(out(phase, source), out(phase, engine, source))
                largest = [max(pair) for pair in zip(largest, found)]
                cells.append(f"{source} {found[0]:.0e} {found[1]:.0e}")
            print(f"phase {phase} on {engine} from: " + ", ".join(cells), flush=True)
    print(f"largest difference: {largest[0]:.1e} of a loss or norm, {largest[1]:.1e} in a weight")


if __name__ == "__main__":
    cli.run(main)
