"""Save and load the checkpoints of a run.

    outputs/phase2/checkpoint-2000/
        model/                                the trainable weights in fp32, a folder that from_pretrained loads;
                                              with --lora_rank that load_lora_weights loads
        domain_classifier/                    with --adversarial_weight, likewise
        optimizer-00000-of-00001.safetensors  moments; one file per process where the engine splits them
        ema-00000-of-00001.safetensors        with --ema_decay, likewise
        state.json                            step, schedule, sampler, scores, and the size of every other file

A checkpoint holds no frozen weights (backbone, VAE, UMT5, DINOv3) and no state of a random generator: seed, step and
place alone decide what is drawn for a sample. It is complete or absent: it is written aside while training goes on,
flushed and renamed, and `--resume_from_checkpoint latest` passes over one that was damaged afterwards.
"""

import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file

from c2r import InputError, __version__
from c2r.files import remove_tree, replace_folder, start_folder, sync_file, sync_tree, temporary_folder
from c2r.models.adversary import DomainClassifier, DomainClassifierConfig
from c2r.models.contract import with_weights
from c2r.models.diffusers_layout import load_own_model
from c2r.sampler import MixedCGRealSampler
from c2r.training.background import BackgroundWrite
from c2r.training.engine import sharding
from c2r.training.failing_together import failing_together
from c2r.training.optimizer import set_schedule
from c2r.training.resume import find_damage, list_checkpoints, saved_options
from c2r.training.run import Run, TrainState
from c2r.training.shards import ema_shard, has_states, load_ema, load_optimizer, optimizer_shard, shard_files
from c2r.training.split_weights import gathered_state_dict
from c2r.training.state_file import STATE, read_state
from c2r.training.trackers import tensorboard_writer

# ---------------------------------------------------------------------------------------------------------------- save


def save_checkpoint(run: Run, state: TrainState, sampler: MixedCGRealSampler):
    """Save checkpoint-N at step N, then delete the oldest checkpoints. Call it on every process.

    The state is copied to the host's memory, and a thread writes it while training goes on. `Run.finish_saving` waits
    for the thread, as does the next call. With several processes the checkpoint is complete when they have agreed on
    it between two steps.

    Raises:
        InputError: a process has no room or no permission to write; the last checkpoint still exists. What goes wrong
            in the thread is raised by `Run.finish_saving`: no room, or a weight that is not finite.
    """
    accelerator, args, step = run.accelerator, run.args, run.progress.global_step
    run.finish_saving()
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    temporary = temporary_folder(folder)
    run.watchdog.beat(f"step {step}: checkpoint")

    def complete():
        with failing_together(accelerator, folder):
            if accelerator.is_main_process:
                _write_state(temporary, content)
                sync_tree(temporary)
                replace_folder(folder)
        with failing_together(accelerator, args.output_dir):
            if accelerator.is_main_process and args.checkpoints_total_limit is not None:
                _prune(args.output_dir, step, args.checkpoints_total_limit)

    def discard():
        if accelerator.is_main_process:
            remove_tree(temporary)

    with run.timings.measure("checkpoint"):
        with failing_together(accelerator, Path(args.output_dir) / "logs"):
            _flush_logs(accelerator)
        with failing_together(accelerator, folder):
            if accelerator.is_main_process:
                _remove_leftovers(args.output_dir)
                _require_space(folder, state.trainable, args)
                start_folder(folder)
        try:
            parts, content = _copy_parts(run, state), _state_content(run, state, sampler)
        except BaseException:
            discard()
            raise
        run.saving = BackgroundWrite(
            accelerator, folder, partial(_write_parts, temporary, folder, parts), complete, discard
        )
    if run.interruption is not None:
        run.interruption.saved()


@dataclass
class _Parts:
    """Parts of a checkpoint that this process writes, on the CPU and sharing no memory with the run."""

    models: dict[str, ModelMixin]  #: {folder: model with the weights}
    shards: dict[str, dict[str, torch.Tensor]]  #: {file: tensors}


def _copy_parts(run, state):
    """Copy the weights on the main process, and optimizer and average on every process that holds a part of them."""
    accelerator, engine = run.accelerator, sharding(run.accelerator)
    models = {"model": state.trainable}
    if state.domain_classifier is not None:
        models["domain_classifier"] = state.domain_classifier
    weights = {name: gathered_state_dict(accelerator, model, state.optimizer) for name, model in models.items()}
    parts = _Parts({}, {})
    if accelerator.is_main_process:
        for name, model in models.items():
            if engine in (None, "zero2"):  # otherwise they were copied as they were gathered
                own = {tensor.data_ptr() for tensor in model.state_dict().values()}
                # Weights that were merged with their low bits are copies already.
                weights[name] = {
                    key: tensor.to("cpu", copy=tensor.data_ptr() in own) for key, tensor in weights[name].items()
                }
            parts.models[name] = with_weights(model, weights[name])
    if accelerator.is_main_process or _is_split("optimizer", engine):
        shard = optimizer_shard(state.optimizer, _trained_parameters(state))
        parts.shards[_shard_name("optimizer", accelerator, engine)] = shard
    if state.ema is not None and (accelerator.is_main_process or _is_split("ema", engine)):
        shard = ema_shard(state.ema, dict(state.trainable.named_parameters()))
        parts.shards[_shard_name("ema", accelerator, engine)] = shard
    return parts


def _write_parts(temporary, folder, parts):
    """Write the parts of the checkpoint `folder`, and free the memory of each when it is written."""
    for name in list(parts.models):
        model = parts.models.pop(name)
        _require_finite(model.state_dict(), folder)
        model.save_pretrained(temporary / name)
        sync_tree(temporary / name)
    for name in list(parts.shards):
        _write_shard(temporary / name, parts.shards.pop(name))


def _write_shard(file, tensors):
    save_file(tensors, file)
    sync_file(file)


def _trained_parameters(state):
    """Return {name: parameter} of all that the optimizer steps on."""
    models = {"model": state.trainable, "domain_classifier": state.domain_classifier}
    return {
        f"{folder}.{name}": parameter
        for folder, model in models.items()
        if model is not None
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _state_content(run, state, sampler):
    return {
        "version": __version__,
        "progress": run.progress.state_dict(),
        "sampler": sampler.state_dict(),
        "options": saved_options(run.args),
        "ema": None if state.ema is None else {"optimization_step": state.ema.optimization_step},
        "sharding": sharding(run.accelerator),
        "num_processes": run.accelerator.num_processes,
        "has_moments": has_states(state.optimizer),
    }


def _write_state(folder, content):
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
    }
    (folder / STATE).write_text(json.dumps(content | {"files": sizes}, indent=1) + "\n", encoding="utf-8")


def _require_finite(weights, folder):
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: not written, {name} is not finite; resume from the last checkpoint")


def _is_split(kind, engine):
    """Return True if each process holds its own part: ZeRO-2 splits the optimizer's states, not the average."""
    return engine in ("zero3", "fsdp2") or (kind == "optimizer" and engine == "zero2")


def _shard_name(kind, accelerator, engine):
    split = _is_split(kind, engine)
    index, count = (accelerator.process_index, accelerator.num_processes) if split else (0, 1)
    return f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def checkpoint_bytes(num_parameters: int, args: Namespace) -> int:
    """Return the size of a checkpoint with this number of trainable parameters, without the parts of constant size.

    The weights are fp32, as are AdamW's two moments and the average of `--ema_decay`; `--optimizer adamw8bit` stores
    each moment in one byte.
    """
    return num_parameters * (4 + (2 if args.optimizer == "adamw8bit" else 8) + (4 if args.ema_decay else 0))


def _require_space(folder, model, args):
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    needed, free = checkpoint_bytes(count, args), shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{free / 1e9:.3f} GB free, {needed / 1e9:.3f} GB needed")


def _flush_logs(accelerator):
    """Write the logged numbers to disk before the checkpoint that is later than they are."""
    if (writer := tensorboard_writer(accelerator)) is not None:
        writer.flush()


def _prune(output_dir, newest, limit):
    """Delete all but the last `limit` complete checkpoints up to step `newest`, the one just written.

    Later ones are damaged, or the run would have resumed from them; the run replaces them at their steps.
    """
    found = [path for step, path in list_checkpoints(output_dir) if step <= newest]
    kept = [path for path in found if find_damage(path) is None][-limit:]
    for path in found:
        if path not in kept:
            _remove(path)


def _remove(folder):
    # Renamed first: a process that is killed meanwhile leaves nothing that looks like a checkpoint.
    aside = folder.with_name(f".{folder.name}.removed")
    folder.rename(aside)
    remove_tree(aside)


def _remove_leftovers(output_dir):
    """Remove half-written, half-removed and replaced checkpoints that killed runs have left."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.removed", ".checkpoint-*.old"):
        for path in Path(output_dir).glob(pattern):
            remove_tree(path)


# ---------------------------------------------------------------------------------------------------------------- load


def load_checkpoint(run: Run, state: TrainState, sampler: MixedCGRealSampler):
    """Load moments, sampler, progress and average, and set the schedule to their step. Call it on every process.

    The weights are not touched: the model was loaded from the checkpoint's `model/` before it was prepared.

    Raises:
        InputError: a file is damaged.
    """
    path, content = run.checkpoint, read_state(run.checkpoint)
    # A process reads its own ranges alone, so damage may be seen by one of many.
    with failing_together(run.accelerator, path):
        if content["has_moments"]:
            files = shard_files(path, content["files"], "optimizer")
            load_optimizer(files, state.optimizer, _trained_parameters(state))
        if state.ema is not None:
            files = shard_files(path, content["files"], "ema")
            load_ema(files, state.ema, dict(state.trainable.named_parameters()))
            state.ema.optimization_step = content["ema"]["optimization_step"]
    sampler.load_state_dict(content["sampler"])
    run.progress.load_state_dict(content["progress"])
    set_schedule(state.lr_scheduler, run.progress.global_step)


def load_domain_classifier(path: Path, domain_classifier: DomainClassifier):
    """Load a checkpoint's weights into a new domain classifier, before the classifier is prepared.

    The weights are copied: tensors read in place lie at unaligned addresses, for which convolutions on a CPU round
    differently, and the resumed run would not be the same bit for bit.
    """
    saved = load_own_model(path / "domain_classifier", type(domain_classifier), DomainClassifierConfig)
    domain_classifier.load_state_dict(saved.state_dict())
