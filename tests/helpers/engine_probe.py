"""Measure how much of a phase 2 model each process of an engine holds. Used by engine_runs.py."""

import ctypes
import gc
import json
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from c2r.models.backbone import load_transformer
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.training.engine import prepare, reads_weights
from c2r.training.optimizer import OptimizerSettings, build_optimizer
from c2r.training.shards import stepped_ranges
from c2r.training.split_weights import local_shard
from tests.helpers.options import options
from tests.helpers.tiny import tiny_inputs


def peak_bytes():
    """Return the largest memory that this process has held so far."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def gradients_between_micro_steps(accelerator: Accelerator, model: torch.nn.Module, trained: torch.nn.Module) -> int:
    """Take a micro-step that is not the last of its step; return the size of the gradients of this process."""
    *inputs, control_features = tiny_inputs()
    accelerator.gradient_accumulation_steps = 2
    with accelerator.accumulate(model):
        accelerator.backward(model(*inputs, control_features[..., :8]).sample.square().mean())
    return sum(local_shard(p.grad).numel() for p in trained.parameters() if p.grad is not None)


def measure(accelerator: Accelerator, backbone_folder: str, output: str):
    """Prepare a model on the engine and write report-RANK.json: numbers of parameters, and bytes of memory."""
    m_mmap_threshold = -3
    # Else glibc keeps freed blocks of a few MB, which would count as memory here. Weights at 14B are larger.
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 100_000)
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
    if accelerator.distributed_type == DistributedType.FSDP:
        report["gradients_here"] = gradients_between_micro_steps(accelerator, model, controlnet)
    (Path(output) / f"report-{accelerator.process_index}.json").write_text(json.dumps(report))
    del backbone, controlnet, optimizer, model
    accelerator.free_memory()
    gc.collect()
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 32 * 2**20)  # the largest: the runs to come need no such care
