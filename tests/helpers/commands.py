"""Build and run training commands on tiny models, and read their results."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SIZE = {"height": 32, "width": 48, "num_frames": 5, "fps": 8}
#: Seconds after which a command counts as hung: many times what it takes, since a machine may be busy.
HANGS_AFTER = 600
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # The progress bar prints every step, so that a test can wait for one.
    "TQDM_MININTERVAL": "0",
    "TQDM_MINITERS": "1",
}


def launch(config, num_processes):
    """Return Python's arguments for `accelerate launch` with a file of accelerate_configs/."""
    return [
        "-m",
        "accelerate.commands.launch",
        f"--config_file={CONFIGS / config}",
        f"--num_processes={num_processes}",
        "--main_process_port=0",  # any free port: another run may use the default
    ]


LAUNCH = launch("cpu.yaml", 1)
# accelerate's own multi-CPU launcher needs mpirun; torchrun is what its multi-GPU launcher runs.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
#: Launchers of two processes.
ENGINES = {
    "ddp": TORCHRUN,
    "zero2": launch("deepspeed_zero2.yaml", 2),
    "zero3": launch("deepspeed_zero3.yaml", 2),
    "zero3_offload": launch("deepspeed_zero3_offload.yaml", 2),
    "fsdp2": launch("fsdp2.yaml", 2),
}


def start(*command, python=sys.executable, **environment):
    """Run one Python command to its end; return its exit status, output and errors."""
    return subprocess.run(
        [python, *map(str, command)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        cwd=ROOT,
        timeout=HANGS_AFTER,
    )


def succeed(*command, by=start, **environment):
    """Run a command by `start` or `tests.helpers.forks.fork`, and fail the test unless it exits with status 0."""
    done = by(*command, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def shared(tiny_models, small_datasets):
    """Return the options of both phases for a short run."""
    options = {
        "pretrained_model_name_or_path": tiny_models / "pipeline",
        "real_dataset": small_datasets / "real",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
        "mixed_precision": "no",
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "validation_steps": 2,
        "num_validation_clips": 2,
        "checkpointing_steps": 2,
        **SIZE,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def phase1(tiny_models, small_datasets, out, *extra, launcher=LAUNCH):
    """Return Python's arguments for a run of phase 1."""
    return [*launcher, "train_phase1.py", *shared(tiny_models, small_datasets), f"--output_dir={out}", *extra]


def phase2(tiny_models, small_datasets, backbone, out, *extra, launcher=LAUNCH):
    """Return Python's arguments for a run of phase 2."""
    options = [
        *shared(tiny_models, small_datasets),
        f"--resume_backbone_from={backbone}",
        f"--cg_dataset={small_datasets / 'cg'}",
        f"--dinov3={tiny_models / 'dinov3'}",
        "--control_layers=2",
        "--control_stride=2",
        "--cg_ratio=0.25",
        "--num_samples=2",
        "--num_inference_steps=2",
        f"--output_dir={out}",
    ]
    return [*launcher, "train_phase2.py", *options, *extra]


def weights(folder):
    """Return the tensors of a saved model."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    """Return True if two dicts have the same keys and equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scalars(out):
    """Return {tag: its values in the order of steps} of a run's TensorBoard logs."""
    events = EventAccumulator(str(out / "logs")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def images(out):
    """Return {tag: number of logged images}."""
    events = EventAccumulator(str(out / "logs"), size_guidance={"images": 0}).Reload()
    return {tag: len(events.Images(tag)) for tag in events.Tags()["images"]}
