"""Plot time and memory of a phase 2 step against tokens, batch, control layers and processes.

    python -m benchmarks.cost [--rounds 3] [--output docs/cost.png]

Computed, by `c2r.estimate`'s code: FLOPs and peak memory of Wan 2.1 1.3B on a GPU. Measured, on the CPU: the time of
steps of a small model (6 blocks of width 384, 3 control blocks, fp32), beside that model's computed FLOPs, both
relative to their first point. All its variants run in one process, one step of each after the other, so that a change
of the machine's speed meets all of them; the times are medians of the CPU time on one core. Two processes train by DDP
over gloo, one clip each; their time is the CPU time of one of them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from diffusers import WanTransformer3DModel
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.step import FEATURE_DIM, PROMPT_LENGTH, WAN, our_variant
from c2r import cli
from c2r.data.buckets import Bucket
from c2r.estimation.configs import DINOV3_VITB, WAN_SIZES, ModelConfigs
from c2r.estimation.report import Estimate, estimate_run
from c2r.estimation.stages import STEP
from c2r.estimation.tracker import FROZEN, GRADIENTS, OPTIMIZER, TRAINABLE
from c2r.models.attention import use_lean_attention
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.options import PHASE2
from c2r.units import GIB

#: The small model; the real one's prompt and features.
SMALL = WAN_SIZES["1.3b"] | WAN | {"num_layers": 6}
CONFIGS = {
    name: ModelConfigs(transformer, dinov3=DINOV3_VITB)
    for name, transformer in {"1.3b": WAN_SIZES["1.3b"], "small": SMALL}.items()
}
#: Clips by their number of tokens, (T, h, w) with F = 4 (T − 1) + 1 frames of 16h x 16w pixels.
GRIDS = {
    **{480: (3, 10, 16), 960: (6, 10, 16), 1920: (6, 16, 20)},
    **{3456: (6, 24, 24), 6912: (12, 24, 24), 13824: (24, 24, 24)},
}
TOKENS = 480
STATE = (FROZEN, TRAINABLE, GRADIENTS, OPTIMIZER)
#: Up to here the small model is measured.
MOST_MEASURED = 3456
#: {field of `Point`: values of 1.3B, of the small model}. The same shares of their blocks, 30 and 6, have a control.
VARIED = {
    "tokens": (list(GRIDS), list(GRIDS)),
    "batch": ([1, 2, 4], [1, 2, 4]),
    "layers": ([5, 10, 15, 30], [1, 2, 3, 6]),
    "processes": ([1, 2], [1, 2]),
}
TITLES = {"tokens": "tokens", "batch": "clips in a batch", "layers": "control layers of 30", "processes": "processes"}
#: {engine: its name in the picture}
ENGINES = {"multi_gpu": "DDP", "deepspeed_zero3": "ZeRO-3", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class Point:
    """The settings of one step."""

    tokens: int = TOKENS
    batch: int = 1
    layers: int = 3
    processes: int = 1

    @property
    def bucket(self) -> Bucket:
        frames, height, width = GRIDS[self.tokens]
        return Bucket(4 * (frames - 1) + 1, 16 * height, 16 * width)


def estimate_of(model: str, point: Point, engine: str = "single_gpu") -> Estimate:
    """Compute a step of a model on a GPU."""
    required = ("resume_backbone_from", "real_dataset", "cg_dataset", "output_dir")
    options = [f"--{name}=-" for name in required]
    options += [f"--train_batch_size={point.batch}", "--gradient_accumulation_steps=1"]
    options += [f"--control_layers={point.layers}", "--control_stride=1"]
    args: Namespace = cli.parse(PHASE2, options)
    return estimate_run(
        args, CONFIGS[model], point.bucket, engine=engine, num_processes=point.processes, step_only=True
    )


def flops(estimate: Estimate) -> float:
    return float(sum(estimate.flops.values()))


# ---------------------------------------------------------------------------------------------------------- measured


def stepper(point: Point) -> Callable[[], None]:
    """Return a function that takes one training step of the small model."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**SMALL)
    controlnet = C2RControlNet.from_transformer(transformer, point.layers, 1, feature_dim=FEATURE_DIM)
    model: torch.nn.Module = C2RTransformer(transformer, controlnet)
    use_lean_attention(model)
    t, h, w = GRIDS[point.tokens]
    latents, target = torch.randn(2, point.batch, 16, t, 2 * h, 2 * w)
    prompt_embeds = torch.randn(point.batch, PROMPT_LENGTH, SMALL["text_dim"])
    features = torch.randn(point.batch, 4 * (t - 1) + 1, h, w, FEATURE_DIM)
    inputs = [latents, torch.full((point.batch,), 600.0), prompt_embeds, features]
    variant = our_variant("", model)
    if point.processes > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(variant.model)
        variant.forward = lambda *values: wrapped(*values).sample
    return lambda: variant.step(inputs, target)


def cpu_seconds(points: Iterable[Point], rounds: int) -> dict[Point, float]:
    """Return the median CPU time of a step of each point."""
    steps = {point: stepper(point) for point in dict.fromkeys(points)}
    times: dict[Point, list[float]] = {point: [] for point in steps}
    for number in range(rounds + 1):
        for point, step in steps.items():
            started = time.process_time()
            step()
            if number:  # the first round warms up
                times[point].append(time.process_time() - started)
    return {point: median(values) for point, values in times.items()}


def two_processes(rounds: int) -> dict[Point, float]:
    """Return the CPU times of one process alone and of one of two, each with one clip."""
    own = [sys.executable, "-m"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    found: dict[Point, list[float]] = {}
    for _ in range(rounds):  # interleaved
        for processes, start in ((1, own), (2, [*own, *launcher])):
            command = [*start, "benchmarks.cost", f"--processes={processes}"]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
            found.setdefault(Point(processes=processes), []).append(json.loads(line))
    return {point: median(values) for point, values in found.items()}


def measure_in_process(processes: int) -> None:
    """Print the CPU time of a step as one of several processes."""
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    point = Point(processes=processes)
    seconds = cpu_seconds([point], 3)[point]
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(seconds))
    if processes > 1:
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- the picture


def point_of(name: str, value: int, base: Point) -> Point:
    return replace(base, **{name: value})


def draw(rounds: int, output: Path) -> None:
    """Compute, measure, print and draw."""
    figure = Figure(figsize=(12, 5.6), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(VARIED))
    for (name, (real, small)), (top, bottom) in zip(VARIED.items(), axes.T):
        computed = [estimate_of("1.3b", point_of(name, value, Point(layers=15))) for value in real]
        points = [point_of(name, value, Point()) for value in small]
        measured = (
            two_processes(rounds)
            if name == "processes"
            else cpu_seconds([point for point in points if point.tokens <= MOST_MEASURED], rounds)
        )
        small_flops = [flops(estimate_of("small", point)) for point in points]
        seconds = list(measured.values())
        print_column(name, real, computed, small_flops, seconds)
        draw_time(top, real, [flops(each) for each in computed], small_flops, seconds)
        if name == "processes":
            draw_engines(bottom, real)
        else:
            draw_memory(bottom, real, computed)
        for part in (top, bottom):
            part.grid(alpha=0.3)
            part.set_xticks(real, [f"{value:,}" for value in real])
        bottom.set_ylim(bottom=0)
        if name == "tokens":
            top.set(xscale="log", yscale="log")
            top.set_xticks(real, [f"{value:,}" for value in real], rotation=45)
            top.minorticks_off()
            bottom.set_xticks([480, *real[3:]], [f"{value:,}" for value in (480, *real[3:])])
        else:
            top.set_ylim(0, 1.1 * top.get_ylim()[1])
        bottom.set_xlabel(TITLES[name])
    axes[0, 0].set_ylabel("time of a step, relative")
    axes[1, 0].set_ylabel("GiB at the peak of a step of 1.3B")
    axes[0, 1].legend(fontsize="small")
    axes[1, 1].legend(fontsize="small", loc="lower right")
    axes[1, 3].legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(output), metadata={"Software": None})


def draw_time(axes, values: list[int], real: list[float], small: list[float], seconds: list[float]) -> None:
    """Draw FLOPs of both models and the small one's measured time, each relative to its first point."""
    axes.plot(values, [each / real[0] for each in real], "-", color="C0", label="1.3B, FLOPs")
    axes.plot(values, [each / small[0] for each in small], "--", color="C1", label="small model, FLOPs")
    relative = [each / seconds[0] for each in seconds]
    axes.plot(values[: len(seconds)], relative, "o", color="C1", label="small model, measured time")


def draw_memory(axes, values: list[int], computed: list[Estimate]) -> None:
    """Draw the memory of 1.3B: of weights, gradients and optimizer, and the rest."""
    state = [sum(each.peaks[STEP].get(kind, 0) for kind in STATE) / GIB for each in computed]
    total = [each.total(STEP) / GIB for each in computed]
    axes.stackplot(
        values, state, [b - a for a, b in zip(state, total)], labels=["weights, gradients, optimizer", "activations"]
    )


def draw_engines(axes, values: list[int]) -> None:
    """Draw the memory of 1.3B on each process, for several engines."""
    for engine, label in ENGINES.items():
        peaks = [estimate_of("1.3b", Point(layers=15, processes=value), engine).total(STEP) / GIB for value in values]
        axes.plot(values, peaks, "o-", label=label)
        print(f"{label}: {', '.join(f'{peak:.1f}' for peak in peaks)} GiB on each of {values} processes", flush=True)


def print_column(name, values, computed, small, seconds) -> None:
    print(f"{TITLES[name]}: TFLOP and GiB of 1.3B; the small model's FLOPs and measured time, relative")
    for i, (value, each) in enumerate(zip(values, computed)):
        measured = f"{seconds[i] / seconds[0]:.2f}" if i < len(seconds) else "-"
        row = f"{flops(each) / 1e12:10.2f}{each.total(STEP) / GIB:8.2f}{small[i] / small[0]:10.2f}{measured:>8}"
        print(f"{value:>8,}{row}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each point")
    parser.add_argument("--output", type=Path, default=Path("docs/cost.png"), help="PNG file to write")
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)  # for the benchmark's own processes
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.processes is None:
        draw(args.rounds, args.output)
    else:
        measure_in_process(args.processes)


if __name__ == "__main__":
    cli.run(main)
