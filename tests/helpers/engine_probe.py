"""What each process of an engine holds of a phase 2 model; run by test_engines.py in two processes.

accelerate launch ... tests/helpers/engine_probe.py BACKBONE OUTPUT
"""

import gc
import json
import re
import sys
from pathlib import Path

import torch

from c2r.models.assembly import load_transformer
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.training.engine import build_accelerator, local_shard, prepare, reads_weights, stepped_parameters
from c2r.training.optimizer import OptimizerSettings, build_optimizer
from tests.helpers.options import options


def peak_bytes():
    """The most memory that this process has held; the kernel counts it."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def main():
    backbone_folder, output = sys.argv[1:]
    args = options([f"--output_dir={output}", "--mixed_precision=no", "--train_batch_size=1"])
    accelerator = build_accelerator(args)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(torch.ones(1))
    before = peak_bytes()
    empty = not reads_weights(accelerator)
    backbone = load_transformer(backbone_folder, torch_dtype=torch.float32, empty=empty)
    controlnet = C2RControlNet.from_transformer(backbone, 1, 1, feature_dim=8, empty=empty)
    optimizer = build_optimizer(controlnet, OptimizerSettings.of(args), accelerator.device)
    model = C2RTransformer(backbone, controlnet)
    model, optimizer = prepare(accelerator, model, optimizer)
    gc.collect()
    report = {
        "grown": peak_bytes() - before,
        "frozen_here": sum(local_shard(p).numel() for p in backbone.parameters()),
        "trained_here": sum(local_shard(p).numel() for p in controlnet.parameters()),
        "stepped_here": sum(local_shard(p).numel() for p in stepped_parameters(optimizer)[1]),
    }
    (Path(output) / f"report-{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main()
