"""Checkpoints of a run: save, find, prune, resume.

    outputs/phase2/checkpoint-2000/
        model/                                the trainable weights in fp32, a folder that from_pretrained loads
        domain_classifier/                    with --adversarial_weight, likewise
        optimizer-00000-of-00001.safetensors  moments; one file per process where the engine shards them
        ema-00000-of-00001.safetensors        with --ema_decay, likewise
        state.json                            step, schedule, sampler, scores; and the size of every other file

The frozen weights (backbone, VAE, UMT5, DINOv3) are not in them, nor is any state of a random generator: what is
drawn for a sample follows from seed, step and place alone. A checkpoint is complete or absent: it is written aside,
flushed and renamed, and `latest` passes over one that was damaged afterwards.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import weakref
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from c2r import InputError
from c2r.files import atomic_folder, read_json, sync_file, temporary_folder
from c2r.models.contract import save_weights
from c2r.training.engine import failing_together, gathered_state_dict, sharding, stepped_parameters
from c2r.training.logs import tensorboard_writer
from c2r.training.run import LoopState

STATE = "state.json"

_PATTERN = re.compile(r"checkpoint-(\d+)")

_locks = weakref.WeakSet()

# A data loader's workers live on for seconds when their process is killed: they must not hold its lock.
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _locks])


# -------------------------------------------------------------------------------------------------------------- find
def list_checkpoints(output_dir):
    """The checkpoints in a folder as (step, path), oldest first, damaged ones too."""
    found = [path for path in Path(output_dir).glob("*") if _is_checkpoint(path)]
    return sorted((int(_PATTERN.fullmatch(path.name)[1]), path) for path in found)


def _is_checkpoint(path):
    return path.is_dir() and _PATTERN.fullmatch(path.name) is not None


def damage(path):
    """Why a checkpoint cannot be resumed from: one short phrase, or None if all its files are there, of their size."""
    try:
        files = read_json(path / STATE)["files"]
    except InputError as error:
        return str(error)
    except (KeyError, TypeError):
        return f"{STATE} is of another version"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def find_checkpoint(output_dir, resume_from_checkpoint):
    """The checkpoint that `--resume_from_checkpoint` names.

    Args:
        output_dir: the run's folder.
        resume_from_checkpoint: None, "latest", a path, or the name of a folder in `output_dir`.

    Returns:
        path, skipped: the path is None to start from step 0, as "latest" does where there is no checkpoint yet;
        `skipped` has a line for each later checkpoint that "latest" passed over because it is damaged.

    Raises:
        InputError: if a named checkpoint is missing or damaged, or None would write over an earlier run.
    """
    if resume_from_checkpoint is None:
        _require_no_run(output_dir)
        return None, []
    if resume_from_checkpoint == "latest":
        skipped = []
        for _, path in reversed(list_checkpoints(output_dir)):
            reason = damage(path)
            if reason is None:
                return path, skipped
            skipped.append(f"{path}: incomplete ({reason}); skipped")
        return None, skipped
    for path in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if _is_checkpoint(path):
            if (reason := damage(path)) is not None:
                raise InputError(f"--resume_from_checkpoint {resume_from_checkpoint}: incomplete ({reason})")
            if path.parent.resolve() != Path(output_dir).resolve():
                _require_no_run(output_dir)
            newest = list_checkpoints(output_dir)[-1:]
            if newest and path.name != newest[0][1].name:
                raise InputError(
                    f"--resume_from_checkpoint {resume_from_checkpoint}: {newest[0][1].name} is later; "
                    "delete the later ones, or choose another --output_dir"
                )
            return path, []
    raise InputError(
        f"--resume_from_checkpoint {resume_from_checkpoint}: no such checkpoint; give a checkpoint-N folder or latest"
    )


def agree_on_checkpoint(accelerator, output_dir, resume_from_checkpoint):
    """`find_checkpoint` by the main process, for all: machines that see different folders must not drift apart.

    Raises:
        InputError: as `find_checkpoint`, or a process does not see the checkpoint.
    """
    found = None
    with failing_together(accelerator, output_dir):
        if accelerator.is_main_process:
            found = find_checkpoint(output_dir, resume_from_checkpoint)
    path, skipped = broadcast_object_list([found])[0]
    with failing_together(accelerator, output_dir):
        if path is not None and not (path / STATE).is_file():
            raise InputError(f"{path}: is not seen by every process; put --output_dir on a shared file system")
    return path, skipped


def _require_no_run(output_dir):
    earlier = [path for path in Path(output_dir).glob("*") if path.name in ("best", "final") or _is_checkpoint(path)]
    if earlier:
        raise InputError(
            f"--output_dir {output_dir}: holds {earlier[0].name} of an earlier run; "
            "go on with it by --resume_from_checkpoint latest, or choose another folder"
        )


def lock_output_dir(accelerator, output_dir):
    """Keep a second run from writing into the same folder. Call it on every process, and keep what it returns.

    The lock ends with the process, however that ends. A run whose launcher was killed may still be saving.
    """
    lock = None
    with failing_together(accelerator, output_dir):
        if accelerator.is_main_process:
            lock = open(Path(output_dir) / ".lock", "w")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--output_dir {output_dir}: another run is writing into it; wait for its end, or choose another"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
                print(f"{output_dir}: its file system has no locks; take care that no second run writes into it")
            _locks.add(lock)
    return lock


def require_resumable(path, accelerator, args, config, inputs):
    """Check that this run can go on from a checkpoint, before any weight is read.

    Args:
        path: of a complete checkpoint.
        accelerator, args: this run's.
        config: of the model that trains, {name: value}.
        inputs: {name: fingerprint} of what the run is trained on.

    Raises:
        InputError: another model, dataset, backbone, optimizer, or another way of splitting the optimizer's states.
    """
    state = read_json(path / STATE)
    if state["loop"].keys() != {entry.name for entry in fields(LoopState)}:
        raise InputError(f"{path}: was written by another version; go on with that one, or start anew")
    if state["sampler"]["seed"] != args.seed:
        raise InputError(f"--seed {args.seed}: {path} was written with {state['sampler']['seed']}; go on with it")
    saved_config = read_json(path / "model/config.json")
    for name, value in config.items():
        if not name.startswith("_") and saved_config.get(name) != value:
            raise InputError(
                f"{path}: was written with {name} {saved_config.get(name)}, but this run has {value}; "
                "resume with the same options, or choose another --output_dir"
            )
    for name, fingerprint in inputs.items():
        if state["loop"]["inputs"].get(name) != fingerprint:
            raise InputError(
                f"--resume_from_checkpoint: the {name} has changed since the checkpoint was written; "
                "bring it back, or start anew with another --output_dir"
            )
    if state["optimizer"] != args.optimizer:
        raise InputError(f"--optimizer {args.optimizer}: {path} was written with {state['optimizer']}; go on with it")
    if args.ema_decay is not None and state["ema"] is None:
        raise InputError(f"--ema_decay {args.ema_decay}: {path} was written without one; go on without")
    if args.ema_decay is None and state["ema"] is not None:
        raise InputError(f"--ema_decay: {path} holds an average, which would be lost; give it again")
    adversarial = (path / "domain_classifier").is_dir()
    if adversarial != (getattr(args, "adversarial_weight", 0) > 0):
        raise InputError(
            f"--adversarial_weight {args.adversarial_weight}: {path} has {'a' if adversarial else 'no'} "
            "domain classifier; go on so, or start anew with another --output_dir"
        )
    here, before = sharding(accelerator), state["sharding"]
    if here != before or (here is not None and accelerator.num_processes != state["num_processes"]):
        raise InputError(
            f"{path}: its optimizer states are split for {_engine(before, state['num_processes'])}, this run has "
            f"{_engine(here, accelerator.num_processes)}; resume with the same accelerate config, or start anew from "
            f"the weights in {path / 'model'}"
        )


def _engine(sharding, num_processes):
    return f"{sharding} on {num_processes} processes" if sharding else "one process or DDP"


# -------------------------------------------------------------------------------------------------------------- save
def save_checkpoint(accelerator, model, optimizer, lr_scheduler, sampler, loop, ema, args, domain_classifier=None):
    """Write checkpoint-`loop.global_step` aside, put it in place, then delete the oldest. Call it on every process.

    Args:
        accelerator: the run's.
        model: the part of the prepared model that trains, unwrapped: a diffusers `ModelMixin`.
        optimizer, lr_scheduler, sampler: the run's; the optimizer is the prepared one.
        loop: `LoopState`.
        ema: diffusers' `EMAModel`, or None.
        args: has output_dir, optimizer, ema_decay and checkpoints_total_limit.
        domain_classifier: the prepared model's, unwrapped, or None.

    Raises:
        InputError: no room or no right to write, on any process, or a weight is not finite. The last checkpoint is
            still there.
    """
    folder = Path(args.output_dir) / f"checkpoint-{loop.global_step}"
    engine = sharding(accelerator)
    with failing_together(accelerator, Path(args.output_dir) / "logs"):
        _flush(accelerator)
    with ExitStack() as stack:
        stack.enter_context(failing_together(accelerator, folder))
        temporary = temporary_folder(folder)
        with failing_together(accelerator, folder):
            if accelerator.is_main_process:
                _remove_leftovers(args.output_dir)
                _require_space(folder, model, args)
                stack.enter_context(atomic_folder(folder))
        parts = {"model": model} | ({"domain_classifier": domain_classifier} if domain_classifier else {})
        weights = {name: gathered_state_dict(accelerator, part, optimizer) for name, part in parts.items()}
        with failing_together(accelerator, folder):
            if accelerator.is_main_process:
                for name, part in parts.items():
                    _require_finite(weights[name], folder)
                    save_weights(temporary / name, part, weights[name])
            for kind, tensors, numbers in _states(optimizer, ema):
                if accelerator.is_main_process or _is_split(kind, engine):
                    file = temporary / _shard_name(kind, accelerator, engine)
                    save_file(tensors, file, metadata={"numbers": json.dumps(numbers)})
                    sync_file(file)
        if accelerator.is_main_process:
            state = {
                "loop": loop.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "sampler": sampler.state_dict(),
                "optimizer": args.optimizer,
                "ema": None if ema is None else {"optimization_step": ema.optimization_step},
                "sharding": engine,
                "num_processes": accelerator.num_processes,
                "files": {
                    str(file.relative_to(temporary)): file.stat().st_size
                    for file in sorted(temporary.rglob("*"))
                    if file.is_file()
                },
            }
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    with failing_together(accelerator, args.output_dir):
        if accelerator.is_main_process and args.checkpoints_total_limit is not None:
            _prune(args.output_dir, loop.global_step, args.checkpoints_total_limit)


def _require_finite(weights, folder):
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: not written, {name} is not finite; resume from the last checkpoint")


def _states(optimizer, ema):
    """(kind, {key: tensor}, {key: number}) of this process, for the files of the optimizer and the EMA."""
    base, parameters = stepped_parameters(optimizer)
    values = {
        f"{i}.{key}": value
        for i, parameter in enumerate(parameters)
        for key, value in base.state.get(parameter, {}).items()
    }
    tensors = {key: _stored(value) for key, value in values.items() if isinstance(value, torch.Tensor)}
    yield "optimizer", tensors, {key: value for key, value in values.items() if key not in tensors}
    if ema is not None:
        yield "ema", {str(i): _stored(shadow) for i, shadow in enumerate(ema.shadow_params)}, {}


def _stored(tensor):
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # Copied: bitsandbytes gives all states the same tables, and safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _is_split(kind, engine):
    """Whether each process has its own part: ZeRO-2 splits the optimizer's states, not the weights' average."""
    return engine in ("zero3", "fsdp2") or (kind == "optimizer" and engine == "zero2")


def _shard_name(kind, accelerator, engine):
    split = _is_split(kind, engine)
    index, count = (accelerator.process_index, accelerator.num_processes) if split else (0, 1)
    return f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def checkpoint_bytes(num_parameters, args):
    """Size of a checkpoint of so many trainable parameters, but for what is of constant size.

    The weights are fp32, and so are AdamW's two moments, which `--optimizer adamw8bit` keeps in a byte each, and the
    average of `--ema_decay`.
    """
    return num_parameters * (4 + (2 if args.optimizer == "adamw8bit" else 8) + (4 if args.ema_decay else 0))


def _require_space(folder, model, args):
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    needed, free = checkpoint_bytes(count, args), shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{free / 1e9:.3f} GB free, {needed / 1e9:.3f} GB needed")


def _flush(accelerator):
    """Put the logged numbers on disk before the checkpoint that is later than they are."""
    if (writer := tensorboard_writer(accelerator)) is not None:
        writer.flush()


def _prune(output_dir, newest, limit):
    """Delete all but the last `limit` complete checkpoints up to step `newest`, the one just written.

    Later ones are damaged, or the run would have gone on from them; they are replaced when it gets there.
    """
    found = [path for step, path in list_checkpoints(output_dir) if step <= newest]
    kept = [path for path in found if damage(path) is None][-limit:]
    for path in found:
        if path not in kept:
            _remove(path)


def _remove(folder):
    # Renamed first: killed within, it leaves nothing that looks like a checkpoint.
    aside = folder.with_name(f".{folder.name}.removed")
    folder.rename(aside)
    shutil.rmtree(aside)


def _remove_leftovers(output_dir):
    """What killed runs have left behind: half-written, half-removed and replaced (so: damaged) checkpoints."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.removed", ".checkpoint-*.old"):
        for path in Path(output_dir).glob(pattern):
            shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------------------ resume
def load_checkpoint(path, accelerator, optimizer, lr_scheduler, sampler, loop, ema):
    """Put optimizer, schedule, sampler, loop state and EMA where the checkpoint left them. Call it on every process.

    The weights are not touched: the model has been loaded from the checkpoint's `model/` before it was prepared.

    Raises:
        InputError: a damaged file.
    """
    state = read_json(path / STATE)
    engine = sharding(accelerator)
    base, parameters = stepped_parameters(optimizer)
    tensors, numbers = _read(path / _shard_name("optimizer", accelerator, engine))
    base.state.clear()
    for key, value in (tensors | numbers).items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        base.state.setdefault(parameter, {})[name] = _placed(value, parameter)
    if ema is not None:
        shadows, _ = _read(path / _shard_name("ema", accelerator, engine))
        for i, shadow in enumerate(ema.shadow_params):
            (shadow.to_local() if isinstance(shadow, DTensor) else shadow).copy_(shadows[str(i)])
        ema.optimization_step = state["ema"]["optimization_step"]
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    for group, lr in zip(base.param_groups, lr_scheduler.get_last_lr()):
        group["lr"] = lr
    sampler.load_state_dict(state["sampler"])
    loop.load_state_dict(state["loop"])


def load_domain_classifier(path, domain_classifier):
    """Give a fresh classifier the checkpoint's weights, before it is prepared.

    They are copied: read in place they lie at odd addresses, for which a CPU's convolutions round otherwise, and the
    resumed run would not be the same bit for bit.
    """
    saved = type(domain_classifier).from_pretrained(path / "domain_classifier", use_safetensors=True)
    domain_classifier.load_state_dict(saved.state_dict())


def _read(file):
    try:
        with safe_open(file, framework="pt") as handle:
            keys, numbers = handle.keys(), json.loads(handle.metadata()["numbers"])
            return {key: handle.get_tensor(key) for key in keys}, numbers
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); resume from an earlier checkpoint") from None


def _placed(value, parameter):
    """A stored value as the optimizer keeps it: on the parameter's device, and split like it."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.ndim:
        return DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return value
