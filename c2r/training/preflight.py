"""What can be refused before any weight is read: access, models, batches, disk, memory; within seconds.

Options are checked when they are parsed (`c2r.options`), the datasets when their manifests are read; what is left is
checked here, and told in a few lines.
"""

import math
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from c2r import InputError
from c2r.data.buckets import buckets_of
from c2r.files import complete_folder, existing_parent
from c2r.models.assembly import fingerprint_transformer
from c2r.models.contract import CONTRACT, read_contract
from c2r.models.hub import WeightIndex, resolve_model_folder
from c2r.training.checkpoint import checkpoint_bytes, list_checkpoints
from c2r.training.engine import failing_together, sharding
from c2r.training.memory import estimate_memory
from c2r.units import GIB, size_text

# The estimate is within 15 % of simulated steps: what is beyond the device by more than that is refused.
ESTIMATE_MARGIN = 1.15


def require_access(*names):
    """Check that models can be had: a folder is there, or the hub gives out the configs of a (gated) model.

    Only configs are downloaded: whoever lacks access learns it before the datasets are looked into and before 20 GB of
    other models have come.

    Raises:
        InputError: see `resolve_model_folder`.
    """
    for name in names:
        resolve_model_folder(name, [])


def require_encoders(name):
    """Check that VAE and text encoder are complete; a hub model's are downloaded. The weights are not read.

    Raises:
        InputError: a part is missing, or a file damaged.
    """
    folder = resolve_model_folder(name, ["vae", "text_encoder", "tokenizer"])
    for part in ("vae", "text_encoder"):
        WeightIndex(folder / part)


def fingerprint_backbone(accelerator, source, base):
    """`fingerprint_transformer` of phase 2's backbone, by the main process alone: at 14B it reads 57 GB.

    Raises:
        InputError: the folder is of phase 2, or its weights are not those that phase 1 has saved there.
    """
    sha256 = None
    with failing_together(accelerator, source):
        if accelerator.is_main_process:
            contract = None
            if Path(source).is_dir() and (complete_folder(source) / CONTRACT).is_file():
                contract = read_contract(source)
            if contract is not None and contract.phase != 1:
                raise InputError(
                    f"--resume_backbone_from {source}: is of phase {contract.phase}; give best/ or final/ of phase 1"
                )
            sha256 = fingerprint_transformer(source, base)
            if contract is not None and contract.weights_sha256 != sha256:
                raise InputError(
                    f"--resume_backbone_from {source}: its weights are not those that its {CONTRACT} names; "
                    "copy the folder anew"
                )
    return broadcast_object_list([sha256])[0]


def preflight(accelerator, args, *, manifests, config, trainable, frozen):
    """Check batches, disk and memory, and print them. Call it on every process.

    Args:
        accelerator: the run's.
        args: its options; in a dry run `planned` has those of the run that is planned.
        manifests: its `Manifest`s.
        config: the backbone's, a dict.
        trainable: number of parameters of the model that trains, which checkpoints hold.
        frozen: number of those that stay on the device beside it.

    Raises:
        InputError: the checkpoints do not fit the disk, or the model by far not the device.
    """
    args = args.planned if args.dry_run else args
    lines = [
        _batches(accelerator, args, manifests),
        f"{trainable:,} parameters train, {frozen:,} are frozen",
        _memory(accelerator, args, config, trainable, frozen),
    ]
    if args.lr_warmup_steps >= args.max_train_steps:
        lines.append(f"--lr_warmup_steps {args.lr_warmup_steps}: the learning rate is never reached in this run")
    with failing_together(accelerator, args.output_dir):
        if accelerator.is_main_process:
            lines.append(_disk(args, trainable))
    for line in lines:
        accelerator.print(f"preflight: {line}")


def count_parameters(model_class, config):
    """Number of parameters of a diffusers model of this config; none is made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class.from_config(config).parameters())


def samples_per_step(accelerator, args):
    """Clips in one optimizer step, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def _batches(accelerator, args, manifests):
    per_step = samples_per_step(accelerator, args)
    samples, cg_ratio = args.max_train_steps * per_step, getattr(args, "cg_ratio", 0)
    epochs = []
    for manifest in manifests:
        share, count = cg_ratio if manifest.domain == "cg" else 1 - cg_ratio, len(manifest.train)
        if count:
            epochs.append(f"{samples * share / count:.2f} epochs of {count:,} {manifest.domain}")
    return (
        f"{args.train_batch_size} clips x {args.gradient_accumulation_steps} micro-steps x "
        f"{accelerator.num_processes} processes = {per_step} clips a step; {args.max_train_steps:,} steps are "
        f"{' and '.join(epochs)} clips"
    )


def run_bytes(args, trainable):
    """Most that a run's output folder holds at any time: kept checkpoints, one aside, best/, final/ and one aside."""
    count = math.ceil(args.max_train_steps / args.checkpointing_steps)
    if args.save_every_minutes is not None and args.checkpoints_total_limit is None:
        return None  # as many as the run's time has
    if args.checkpoints_total_limit is not None:
        extra = args.save_every_minutes is not None  # then there are more than those at the planned steps
        count = (args.checkpoints_total_limit if extra else min(count, args.checkpoints_total_limit)) + 1
    return count * checkpoint_bytes(trainable, args) + 3 * 4 * trainable


def _disk(args, trainable):
    out = Path(args.output_dir)
    one, needed = checkpoint_bytes(trainable, args), run_bytes(args, trainable)
    free = shutil.disk_usage(existing_parent(out)).free
    about = f"a checkpoint has {size_text(one)}"
    if needed is None:
        return f"{about}; without --checkpoints_total_limit all are kept; {size_text(free)} free in {out}"
    kept = [path for _, path in list_checkpoints(out)] + [out / "best", out / "final"]
    there = sum(file.stat().st_size for path in kept for file in path.rglob("*") if file.is_file())
    if free < needed - there:
        raise InputError(
            f"--output_dir {out}: {size_text(needed - there)} needed for checkpoints, best/ and final/, "
            f"{size_text(free)} free; make room, or keep fewer with --checkpoints_total_limit"
        )
    return f"{about}, the run up to {size_text(needed)}; {size_text(free)} free in {out}"


def _memory(accelerator, args, config, trainable, frozen):
    estimate = estimate_memory(
        args,
        config,
        trainable=trainable,
        frozen=frozen,
        latent_grid=max((bucket.latent_grid for bucket in buckets_of(args)), key=math.prod),
        sharding=_memory_sharding(accelerator),
        num_processes=accelerator.num_processes,
    ).total
    about = f"about {estimate / GIB:.1f} GiB at the peak of a step, computed"
    if accelerator.device.type != "cuda":
        return about
    there = torch.cuda.get_device_properties(accelerator.device).total_memory
    if estimate > ESTIMATE_MARGIN * there:
        raise InputError(
            f"{about}, but the device has {there / GIB:.1f} GiB: shard it (accelerate_configs/deepspeed_zero3.yaml), "
            "or lower --train_batch_size or the size of the clips, or take --optimizer adamw8bit"
        )
    tight = "; it may not fit: try --dry_run" if estimate + 3 * GIB > there else ""
    return f"{about}, of {there / GIB:.1f} GiB on the device{tight}"


def _memory_sharding(accelerator):
    engine = sharding(accelerator)
    if engine == "zero3":
        plugin = accelerator.state.deepspeed_plugin
        if plugin.offload_optimizer_device == plugin.offload_param_device == "cpu":
            return "zero3_offload"
    return engine
