"""Checks before any weight is read, within seconds: access, models, batches, disk, memory.

Options are checked when they are parsed (`c2r.options`), and datasets when they are read.
"""

import logging
import math
import shutil
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin

from c2r import InputError
from c2r.bars import slow_work
from c2r.data.buckets import Bucket
from c2r.data.mixture import Mixture
from c2r.estimation.configs import ModelConfigs
from c2r.estimation.report import estimate_run
from c2r.files import complete_folder, existing_parent
from c2r.models.backbone import fingerprint_transformer
from c2r.models.contract import CONTRACT, read_contract
from c2r.models.hub import resolve_model_folder
from c2r.training.checkpoint import checkpoint_bytes
from c2r.training.engine import sharding
from c2r.training.failing_together import failing_together
from c2r.training.resume import list_checkpoints
from c2r.training.run import Run
from c2r.training.trackers import require_logins
from c2r.units import GIB, size_text

logger = logging.getLogger(__name__)

# The estimate counts tensors alone, so a device needs more than it says. A step that changes between the estimate and
# the run, such as by an engine's new default, must not stop a run that would fit: hence the margin.
ESTIMATE_MARGIN = 1.05


def require_access(*names: str):
    """Check that model folders exist, or that the hub gives access to the models, which may be gated.

    Only configs are downloaded. Missing access is thus reported before the datasets are read and before 20 GB of other
    models are downloaded.

    Raises:
        InputError: see `resolve_model_folder`.
    """
    for name in names:
        resolve_model_folder(name, [])


def fingerprint_backbone(accelerator: Accelerator, option: str, name_or_path: str, base_model: str) -> str:
    """Return the fingerprint of a frozen backbone, computed by the main process alone: at 14B it reads 57 GB.

    Args:
        accelerator: of the run.
        option: name of the option that gave the backbone, without dashes, for messages.
        name_or_path, base_model: see `fingerprint_transformer`.

    Raises:
        InputError: the folder was written by phase 2, or its weights are not those that phase 1 saved there.
    """
    sha256 = None
    with failing_together(accelerator, name_or_path):
        if accelerator.is_main_process:
            contract = None
            if Path(name_or_path).is_dir() and (complete_folder(name_or_path) / CONTRACT).is_file():
                contract = read_contract(name_or_path)
            if contract is not None and contract.phase != 1:
                raise InputError(
                    f"--{option} {name_or_path}: a model of phase {contract.phase}; give best/ or final/ of phase 1"
                )
            with slow_work("reading the backbone's weights for their fingerprint", shown=True):
                sha256 = fingerprint_transformer(name_or_path, base_model)
            # `fingerprint_transformer` has compared a LoRA and the backbone below it.
            whole = contract is not None and contract.lora_rank is None
            if whole and contract.weights_sha256 != sha256:
                raise InputError(
                    f"--{option} {name_or_path}: its weights are not those that its {CONTRACT} names; "
                    "copy the folder again"
                )
    return broadcast_object_list([sha256])[0]


def require_splittable(degree: int, num_heads: int, patch_size: Sequence[int], buckets: Iterable[Bucket]):
    """Check that context parallelism can split a backbone's heads and the tokens of all clips into equal parts.

    Args:
        degree: processes that share a clip.
        num_heads, patch_size: of the backbone's config.
        buckets: shapes of the clips.

    Raises:
        InputError: they cannot be split; the message names a degree or a shape that can.
    """
    if num_heads % degree:
        divisors = [str(number) for number in range(2, num_heads + 1) if num_heads % number == 0]
        raise InputError(
            f"--context_parallel_degree {degree}: the backbone's {num_heads} attention heads are split too; give "
            f"one of {', '.join(divisors)}"
        )
    for bucket in buckets:
        frames, rows, columns = (size // patch for size, patch in zip(bucket.latent_grid, patch_size))
        if frames * rows * columns % degree:
            step = degree // math.gcd(frames * rows, degree)  # columns that go into equal parts
            width = max(columns // step, 1) * step * patch_size[2] * 8
            raise InputError(
                f"--context_parallel_degree {degree}: the {frames * rows * columns} tokens of clips of {bucket} do "
                f"not divide into {degree} equal parts; give clips of {bucket._replace(width=width)}, say"
            )


def preflight(run: Run, mixtures: list[Mixture], configs: ModelConfigs, trainable: int, frozen: int):
    """Check and print batches, memory and disk. Call it on every process.

    Args:
        run: the script's run.
        mixtures: the mixtures that are trained on.
        configs: of the models.
        trainable: number of parameters that train, which checkpoints hold.
        frozen: number of parameters that stay on the device beside them.

    Raises:
        InputError: a tracker has no login, the checkpoints do not fit on the disk, or the estimate exceeds the memory
            of the device by more than ESTIMATE_MARGIN.
    """
    accelerator, args = run.accelerator, run.planned
    lines = [
        _batches_line(args, run, mixtures),
        f"{trainable:,} parameters train, {frozen:,} are frozen",
        _memory_line(run, configs),
    ]
    if args.lr_warmup_steps >= args.max_train_steps:
        lines.append(
            f"--lr_warmup_steps {args.lr_warmup_steps}: the learning rate is never reached in this run; lower it"
        )
    with failing_together(accelerator, args.output_dir):
        if accelerator.is_main_process:
            require_logins(args)
            lines.append(_disk_line(args, trainable))
    for line in lines:
        logger.info("preflight: %s", line)


def count_parameters(model_class: type[ModelMixin], config: dict[str, Any]) -> int:
    """Return the number of parameters of a diffusers model with this config, without creating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class.from_config(config).parameters())


def _batches_line(args, run, mixtures):
    samples, cg_ratio = args.max_train_steps * run.samples_per_step, getattr(args, "cg_ratio", 0)  # phase 1 has no CG
    degree, groups = args.context_parallel_degree, f"{run.num_groups} processes"
    if degree > 1:
        groups = f"{run.num_groups} groups of {degree} processes"
    epochs = []
    for mixture in mixtures:
        share, count = cg_ratio if mixture.domain == "cg" else 1 - cg_ratio, len(mixture.train)
        if count:
            epochs.append(f"{samples * share / count:.2f} epochs of {count:,} {mixture.domain}")
    return (
        f"{args.train_batch_size} clips x {args.gradient_accumulation_steps} micro-steps x "
        f"{groups} = {run.samples_per_step} clips a step; {args.max_train_steps:,} steps are "
        f"{' and '.join(epochs)} clips"
    )


def run_bytes(args: Namespace, trainable: int) -> int | None:
    """Return the largest size of a run's output folder at any time; None if it has no bound.

    It holds the kept checkpoints and one being written, best/, final/ and one of these being written.
    """
    count = math.ceil(args.max_train_steps / args.checkpointing_steps)
    unplanned = args.save_every_minutes is not None  # more checkpoints than those at the planned steps
    if args.checkpoints_total_limit is not None:
        count = (args.checkpoints_total_limit if unplanned else min(count, args.checkpoints_total_limit)) + 1
    elif unplanned:
        return None
    return count * checkpoint_bytes(trainable, args) + 3 * 4 * trainable


def _disk_line(args, trainable):
    out = Path(args.output_dir)
    one, needed = checkpoint_bytes(trainable, args), run_bytes(args, trainable)
    free = shutil.disk_usage(existing_parent(out)).free
    about = f"a checkpoint has {size_text(one)}"
    if needed is None:
        return f"{about}; without --checkpoints_total_limit all are kept; {size_text(free)} free in {out}"
    kept = [path for _, path in list_checkpoints(out)] + [out / "best", out / "final"]
    kept += out.glob(".checkpoint-*")  # of a run that was killed: the next save removes them
    used = sum(file.stat().st_size for path in kept for file in path.rglob("*") if file.is_file())
    if free < needed - used:
        raise InputError(
            f"--output_dir {out}: {size_text(needed - used)} needed for checkpoints, best/ and final/, "
            f"{size_text(free)} free; make room, or keep fewer with --checkpoints_total_limit"
        )
    return f"{about}, the run up to {size_text(needed)}; {size_text(free)} free in {out}"


def _memory_line(run, configs):
    accelerator = run.accelerator
    needed = None
    with failing_together(accelerator, run.args.output_dir):
        if accelerator.is_main_process:
            estimate = estimate_run(
                run.planned,
                configs,
                max(run.settings.buckets, key=lambda bucket: math.prod(bucket.latent_grid)),
                device_type="cuda" if accelerator.device.type == "cuda" else "cpu",
                engine=_engine(accelerator),
                num_processes=accelerator.num_processes,
                step_only=True,
            )
            needed = estimate.total(estimate.largest)
    needed = broadcast_object_list([needed])[0]
    about, degree = f"{needed / GIB:.1f} GiB at the peak of a step, computed", run.planned.context_parallel_degree
    if degree > 1:
        about += f" for whole clips: the {degree} processes of a group need less"
    if accelerator.device.type != "cuda":
        return about
    total = torch.cuda.get_device_properties(accelerator.device).total_memory
    offloads_in_part = _offloads(accelerator, "optimizer") and _engine(accelerator) != "deepspeed_zero3_offload"
    # The estimate models neither optimizer offload alone nor shared clips.
    if needed > ESTIMATE_MARGIN * total and not offloads_in_part and degree == 1:
        raise InputError(
            f"{about}, but the device has {total / GIB:.1f} GiB; shard the model "
            "(accelerate_configs/deepspeed_zero3.yaml), lower --train_batch_size or the size of the clips, split them "
            "(--context_parallel_degree), or see `python -m c2r.estimate --fit`"
        )
    remark = "; it may not fit: try --dry_run" if needed + 3 * GIB > total else ""
    return f"{about}, of {total / GIB:.1f} GiB on the device{remark}"


def _engine(accelerator):
    """Return the run's engine by its configuration in accelerate_configs/."""
    engine, whole = sharding(accelerator), "single_gpu" if accelerator.num_processes == 1 else "multi_gpu"
    if engine == "zero3" and _offloads(accelerator, "optimizer") and _offloads(accelerator, "param"):
        return "deepspeed_zero3_offload"
    return {None: whole, "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3", "fsdp2": "fsdp2"}[engine]


def _offloads(accelerator, what):
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and getattr(plugin, f"offload_{what}_device") == "cpu"
