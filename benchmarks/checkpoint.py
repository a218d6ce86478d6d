"""Measure how long training stands still to save a checkpoint, and when the checkpoint is complete.

    python -m benchmarks.checkpoint --output_dir outputs

A transformer of about 84 million parameters on the CPU: a checkpoint of 1 GB with AdamW's moments. The process does
nothing else while the checkpoint is written.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from c2r.training.checkpoint import checkpoint_bytes, save_checkpoint
from c2r.training.optimizer import OptimizerSettings, build_lr_scheduler, build_optimizer
from c2r.training.run import TrainState
from tests.helpers.runs import build_run

SIZES = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 20, "text_dim": 64}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=".", help="the checkpoints are written to this disk, and removed")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        built = build_run(Path(folder), "--checkpoints_total_limit=1")
        run, state = built.run, _large_state(built.run)
        count = sum(parameter.numel() for parameter in state.trainable.parameters())
        stopped, complete = [], []
        for step in range(args.repeats):
            run.progress.global_step = step
            started = time.perf_counter()
            save_checkpoint(run, state, built.sampler)
            stopped.append(time.perf_counter() - started)
            run.finish_saving()
            complete.append(time.perf_counter() - started)
    size = checkpoint_bytes(count, run.args) / 1e9
    still, whole = statistics.median(stopped), statistics.median(complete)
    shares = [a / b for a, b in zip(stopped, complete)]
    print(f"{size:.2f} GB: training stands still for {still:.2f} s, complete after {whole:.2f} s (medians)")
    print(f"share: {statistics.median(shares):.2f}, {min(shares):.2f} to {max(shares):.2f} in {args.repeats} saves")


def _large_state(run):
    """Return a state whose optimizer has taken a step."""
    model = WanTransformer3DModel(**SIZES)
    optimizer = build_optimizer(model, OptimizerSettings.of(run.args), run.device)
    lr_scheduler = build_lr_scheduler(optimizer, run.args)
    model, optimizer = run.accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(model, model, optimizer, lr_scheduler, None)


if __name__ == "__main__":
    main()
