"""Measure how much of a phase 2 model each process of an engine holds. Used by engine_runs.py."""

import gc
import json
import re
from pathlib import Path

import torch
from accelerate import Accelerator

from c2r.models.assembly import load_transformer
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.training.engine import local_shard, prepare, reads_weights
from c2r.training.optimizer import OptimizerSettings, build_optimizer
from c2r.training.shards import stepped_ranges
from tests.helpers.options import options


def peak_bytes():
    """Return the largest memory that this process has held so far."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(accelerator: Accelerator, backbone_folder: str, output: str):
    """Prepare a model on the engine and write report-RANK.json: numbers of parameters, and bytes of memory."""
    before = peak_bytes()
    empty = not reads_weights(accelerator)
    backbone = load_transformer(backbone_folder, torch_dtype=torch.float32, empty=empty)
    controlnet = C2RControlNet.from_transformer(backbone, 1, 1, feature_dim=8, empty=empty)
    optimizer = build_optimizer(controlnet, OptimizerSettings.of(options()), accelerator.device)
    model = C2RTransformer(backbone, controlnet)
    model, optimizer = prepare(accelerator, model, optimizer)
    gc.collect()
    report = {
        "grown": peak_bytes() - before,
        "frozen_here": sum(local_shard(p).numel() for p in backbone.parameters()),
        "trained_here": sum(local_shard(p).numel() for p in controlnet.parameters()),
        "stepped_here": sum(part.length for part in stepped_ranges(optimizer, dict(controlnet.named_parameters()))),
    }
    (Path(output) / f"report-{accelerator.process_index}.json").write_text(json.dumps(report))
    del backbone, controlnet, optimizer, model
    accelerator.free_memory()
    gc.collect()
