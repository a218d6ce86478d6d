"""Train, save, resume and generate with Wan 2.1 1.3B's true widths on the CPU, beside `c2r.estimate`'s figures.

    OMP_NUM_THREADS=1 python -m benchmarks.real_width --work_dir FOLDER

The models have the sizes of the real ones and random weights; the text encoder has one layer of true width instead of
24. The clips are the toy city's, 9 frames of 96x160. The commands are those of the README, each in its own process:
encoding, phase 1 with 8-bit AdamW and phase 2 with 15 control layers, and generation from phase 2's best/. Both phases
validate, save best/, are stopped by a signal in step 2, save a checkpoint, and are resumed for one more step. What the
folder holds already is not made again.

Takes up to 60 GB of disk and 20 GiB of memory; half an hour on a shared CPU. docs/real_width.md has its record.

A process's memory is read from /proc 50 times a second: its anonymous memory, which allocators take, and pages of
mapped files, where safetensors leaves weights that keep their dtype. What a process has after its imports is
subtracted. The estimate is of the same settings on the device "cpu"; for what happens before the first step, and after
the last one, it is that of validation or of saving.
"""

import argparse
import csv
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import DINOv3ViTConfig, DINOv3ViTModel, UMT5Config, UMT5EncoderModel

from c2r import cli
from c2r.data.buckets import Bucket
from c2r.data.video_writer import write_video
from c2r.estimation.configs import DINOV3_VITB, UMT5_XXL, WAN_SIZES, ModelConfigs
from c2r.estimation.report import Estimate, estimate_run
from c2r.estimation.stages import GENERATION, SAVING, STEP, TEXT_ENCODING, VAE_ENCODING, VALIDATION
from c2r.options import PHASE1, PHASE2
from c2r.toy import city
from c2r.units import GIB
from tests.helpers.commands import scalars
from tests.helpers.tiny import tiny_tokenizer

BUCKET, FPS = Bucket(9, 96, 160), 8.0
MAX_PROMPT_TOKENS = 512
#: Steps of a run, of which the first STOPPED are made, and one more after resuming.
STEPS, STOPPED = 100, 2
#: Readings of a process's memory a second.
READINGS = 50
#: Matrices of the measured rate: rows as tokens of the clip, one feed-forward layer of the backbone.
TOKENS, DIM, FFN_DIM = 180, 1536, 8960


@dataclass
class Reading:
    """Memory and CPU time of a process at one moment."""

    time: float  #: as time.time()
    anonymous: int  #: bytes
    files: int  #: bytes of mapped files
    cpu: float  #: seconds


@dataclass
class Usage:
    """The readings of one process."""

    readings: list[Reading] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)  #: {pattern: time at which the process first wrote it}

    def peak(self, after: str | None = None, before: str | None = None) -> Reading:
        """Return the reading with the most memory, of the time after or before a mark."""
        start = self.marks[after] if after else 0.0
        end = self.marks[before] if before else math.inf
        readings = (reading for reading in self.readings if start <= reading.time <= end)
        return max(readings, key=lambda reading: reading.anonymous + reading.files)

    def cpu_seconds(self, start: float, end: float) -> float:
        """Return the CPU time between two times."""
        times, spent = zip(*((reading.time, reading.cpu) for reading in self.readings))
        return float(np.interp(end, times, spent) - np.interp(start, times, spent))


def watch(command: list[str], marks: Sequence[str] = (), stop_at: str | None = None) -> Usage:
    """Run Python with these arguments to its end and read its memory.

    Args:
        command: Python's arguments.
        marks: patterns whose first appearance in the process's errors is recorded.
        stop_at: one of the marks, at which the process gets SIGTERM, as from a cluster.

    Raises:
        SystemExit: it fails; its last lines are printed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, stdout=sys.stderr, env=environment)
    usage, written = Usage(), bytearray()

    def listen():
        while part := os.read(process.stderr.fileno(), 4096):
            written.extend(part)
            for pattern in marks:
                if pattern not in usage.marks and re.search(pattern.encode(), written):
                    usage.marks[pattern] = time.time()
                    if pattern == stop_at:
                        time.sleep(1)  # the bar moves within the step's end, where the run would stop at once
                        process.send_signal(signal.SIGTERM)

    listener = threading.Thread(target=listen)
    listener.start()
    while process.poll() is None:
        read_usage(process.pid, usage)
        time.sleep(1 / READINGS)
    listener.join()
    if process.returncode != (cli.EXIT_STOPPED if stop_at else 0):
        sys.exit(f"{' '.join(command)}\nexit status {process.returncode}\n{written[-3000:].decode(errors='replace')}")
    return usage


def read_usage(pid: int, usage: Usage) -> None:
    """Add a reading of a running process."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (FileNotFoundError, ProcessLookupError):
        return
    if "RssAnon" in status:  # not in the moment between its end and our wait for it
        anonymous, files = (1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssFile"))
        cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        usage.readings.append(Reading(time.time(), anonymous, files, cpu))


# ------------------------------------------------------------------------------------------------- models and datasets


def write_models(folder: Path) -> None:
    """Write a Wan 2.1 1.3B pipeline in fp32, its text encoder cut to one layer, and a DINOv3 ViT-B."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = MAX_PROMPT_TOKENS
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**UMT5_XXL | {"num_layers": 1})),
        vae=AutoencoderKLWan(),  # Wan's own sizes are the defaults
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(**WAN_SIZES["1.3b"]),
    )
    pipeline.save_pretrained(folder / "model")
    dinov3 = folder / "dinov3"
    DINOv3ViTModel(DINOv3ViTConfig(**DINOV3_VITB)).save_pretrained(dinov3)
    (dinov3 / "preprocessor_config.json").write_text(
        '{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    )


def write_dataset(folder: Path) -> None:
    """Write two training videos and two held-out ones, of one clip each, and a coarse video beside each."""
    for side, seeds in (("train", (1, 2)), ("validation", (3, 4))):
        (folder / side).mkdir(parents=True)
        rows = [("file_name", "text")]
        for seed in seeds:
            scene = city.make_scene(seed)
            for look, name in (("real", f"{seed}.mp4"), ("coarse", f"{seed}_coarse.mp4")):
                frames = city.render(scene, (look,), BUCKET.num_frames, FPS, BUCKET.height, BUCKET.width)[look]
                write_video(folder / side / name, frames, FPS)
            rows.append((f"{seed}.mp4", city.caption(scene)))
        with open(folder / side / "metadata.csv", "w", newline="") as table:
            csv.writer(table).writerows(rows)


# -------------------------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Commands:
    """The commands of the benchmark, each without the interpreter."""

    folder: Path

    @property
    def _clips(self) -> list[str]:
        names = ("num_frames", "height", "width")
        return [
            *(f"--{name}={value}" for name, value in zip(names, BUCKET)),
            f"--fps={FPS:g}",
            f"--pretrained_model_name_or_path={self.folder / 'model'}",
            f"--cache_dir={self.folder / 'cache'}",
            "--dataloader_num_workers=0",
        ]

    def encode(self) -> list[str]:
        return ["-m", "c2r.encode", f"--dataset={self.folder / 'data'}", *self._clips]

    def out(self, phase: int) -> Path:
        return self.folder / f"phase{phase}"

    def options(self, phase: int) -> list[str]:
        """Return the options of a phase's training script."""
        own = ["--optimizer=adamw8bit"]
        if phase == 2:
            own = [
                f"--resume_backbone_from={self.out(1) / 'best'}",
                f"--dinov3={self.folder / 'dinov3'}",
                "--cg_ratio=0",
                "--control_layers=15",
                "--control_stride=1",
                "--num_samples=0",
            ]
        return [
            f"--real_dataset={self.folder / 'data'}",
            f"--output_dir={self.out(phase)}",
            *self._clips,
            *own,
            "--train_batch_size=1",
            "--gradient_accumulation_steps=1",
            f"--max_train_steps={STEPS}",
            "--checkpoints_total_limit=1",
            "--num_validation_clips=1",
            "--resume_from_checkpoint=latest",
        ]

    def train(self, phase: int) -> list[str]:
        return [f"train_phase{phase}.py", *self.options(phase)]

    def generate(self) -> list[str]:
        """Return a generation of one denoising step; its memory does not depend on their number."""
        return [
            *("-m", "c2r.generate", f"--model={self.out(2) / 'best'}", f"--output={self.folder / 'out.mp4'}"),
            f"--control_video={self.folder / 'data/validation/3_coarse.mp4'}",
            *("--prompt=a street at dusk", "--num_inference_steps=1"),
        ]


# ---------------------------------------------------------------------------------------------------------- the record


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the FLOPs a second of CPU time of a feed-forward layer's matrix product on one core."""
    rows, matrix = torch.randn(TOKENS, DIM, dtype=dtype), torch.randn(DIM, FFN_DIM, dtype=dtype)
    times = []
    for _ in range(20):
        started = time.process_time()
        rows @ matrix
        times.append(time.process_time() - started)
    return 2 * TOKENS * DIM * FFN_DIM / median(times)


@cache
def estimate_of(command: Commands, phase: int) -> Estimate:
    """Return what `c2r.estimate` computes for a phase's options on the CPU."""
    args = cli.parse(PHASE1 if phase == 1 else PHASE2, command.options(phase))
    configs = ModelConfigs(WAN_SIZES["1.3b"], {}, UMT5_XXL | {"num_layers": 1}, DINOV3_VITB)
    return estimate_run(args, configs, BUCKET, device_type="cpu")


def print_memory(what: str, measured: Reading, baseline: Reading, estimated: float) -> None:
    """Print one row: what was measured above the imports, what of it is in files, the estimate and the ratio."""
    anonymous, files = measured.anonymous - baseline.anonymous, measured.files - baseline.files
    above = anonymous + files
    print(
        f"{what:<36}{above / GIB:9.2f}{files / GIB:14.2f}{estimated / GIB:11.2f}{above / estimated:7.2f}", flush=True
    )


def bar(title: str, step: int) -> str:
    """Return a pattern of a progress bar that has reached a step."""
    return rf"{title}:[^\r\n]*\| {step}/{STEPS} \["


def encode(command: Commands, baseline: Reading) -> None:
    """Encode the clips and print the memory of both encoders."""
    estimate = estimate_of(command, 1)
    usage = watch(command.encode(), ["latents: "])
    print_memory("encoding prompts", usage.peak(before="latents: "), baseline, estimate.total(TEXT_ENCODING))
    print_memory("encoding clips", usage.peak("latents: "), baseline, estimate.total(VAE_ENCODING))


def train(command: Commands, phase: int, baseline: Reading) -> None:
    """Train a phase, stop it in step 2, resume it, and print its record."""
    estimate = estimate_of(command, phase)
    bars = [bar(f"phase {phase}", step) for step in range(STOPPED + 2)]
    first = watch(command.train(phase), bars[: STOPPED + 1], stop_at=bars[STOPPED - 1])
    second = watch(command.train(phase), bars[STOPPED:], stop_at=bars[STOPPED])
    rows = (
        ("load, validate, save best/", first.peak(before=bars[0]), VALIDATION),
        ("steps 1 and 2", first.peak(bars[0], bars[STOPPED]), STEP),
        ("save", first.peak(bars[STOPPED]), SAVING),
        ("resume", second.peak(before=bars[STOPPED]), SAVING),
        ("step 3", second.peak(bars[STOPPED], bars[STOPPED + 1]), STEP),
    )
    for what, measured, stage in rows:
        print_memory(f"phase {phase}: {what}", measured, baseline, estimate.total(stage))
    print_time(command, phase, first.cpu_seconds(first.marks[bars[STOPPED - 1]], first.marks[bars[STOPPED]]), estimate)


def print_time(command: Commands, phase: int, seconds: float, estimate: Estimate) -> None:
    """Print a step's CPU time beside its FLOPs over the rate of matrix products, and the losses."""
    flops, rate = sum(estimate.flops.values()), matrix_rate(torch.bfloat16)
    losses = ", ".join(f"{loss:.4f}" for loss in scalars(command.out(phase))["train/loss"])
    print(
        f"phase {phase}: step 2 took {seconds:.1f} s of CPU time; {flops / 1e12:.2f} TFLOP take {flops / rate:.1f} s "
        f"at the {rate / 1e9:.0f} GFLOP/s of a bf16 matrix product; losses {losses}",
        flush=True,
    )


def generate(command: Commands, baseline: Reading) -> None:
    """Generate a video and print the memory."""
    usage = watch(command.generate())
    print_memory("generate", usage.peak(), baseline, estimate_of(command, 2).total(GENERATION))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for models, data and results")
    command = Commands(parser.parse_args().work_dir.absolute())
    folder = command.folder
    if not (folder / "dinov3").exists():
        write_models(folder)
    if not (folder / "data").exists():
        write_dataset(folder / "data")
    baseline = watch(["-c", "import train_phase2, c2r.training.preflight, bitsandbytes"]).peak()
    both = (baseline.anonymous + baseline.files) / GIB
    print(f"GiB above the {both:.2f} that a process has after its imports")
    print(f"{'':<36}{'measured':>9}{'in files':>14}{'estimated':>11}{'ratio':>7}", flush=True)
    if not (folder / "cache/clips").exists():
        encode(command, baseline)
    for phase in (1, 2):
        if not (command.out(phase) / f"checkpoint-{STOPPED + 1}").exists():
            train(command, phase, baseline)
    generate(command, baseline)


if __name__ == "__main__":
    cli.run(main)
