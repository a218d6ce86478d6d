"""Find the checkpoint that a run resumes from, and check that it can."""

import errno
import fcntl
import inspect
import logging
import os
import re
import weakref
from argparse import Namespace
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin

from c2r import InputError
from c2r.files import read_json
from c2r.options import PHASE1, PHASE2
from c2r.options.option import MUST_NOT_CHANGE
from c2r.training.engine import ENGINE_NAMES, sharding
from c2r.training.failing_together import failing_together
from c2r.training.output_files import LOCK
from c2r.training.state_file import STATE, read_file_sizes, read_state

logger = logging.getLogger(__name__)

TRAINING_OPTIONS = PHASE1.options | PHASE2.options
#: Options that belong to one start and not to the run.
OF_ONE_START = ("config", "preset", "output_dir", "resume_from_checkpoint", "dry_run")

_PATTERN = re.compile(r"checkpoint-(\d+)")

_locks: weakref.WeakSet[TextIO] = weakref.WeakSet()
# A data loader worker lives for seconds after its process is killed: it must not hold the lock.
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _locks])


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder as (step, path), oldest first, damaged ones too."""
    found = [path for path in Path(output_dir).glob("*") if _is_checkpoint(path)]
    return sorted((int(path.name.rpartition("-")[2]), path) for path in found)


def _is_checkpoint(path):
    return path.is_dir() and not path.is_symlink() and _PATTERN.fullmatch(path.name) is not None


def find_damage(path: Path) -> str | None:
    """Return a short reason why a checkpoint cannot be resumed from; None if all its files are complete."""
    try:
        files = read_file_sizes(path)
    except InputError as error:
        return str(error)
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> tuple[Path | None, list[str]]:
    """Find the checkpoint that `--resume_from_checkpoint` names.

    Args:
        output_dir: the run's folder.
        resume_from_checkpoint: None, "latest", a path, or the name of a folder in `output_dir`.

    Returns:
        The checkpoint's path, or None to start at step 0: without the option, or where "latest" finds no checkpoint.
        And a line for each later checkpoint that "latest" has passed over because it is damaged.

    Raises:
        InputError: the named checkpoint is missing, all are damaged, or the run would overwrite an earlier one.
    """
    if resume_from_checkpoint is None:
        _require_no_run(output_dir)
        return None, []
    if resume_from_checkpoint == "latest":
        skipped: list[str] = []
        for _, path in reversed(list_checkpoints(output_dir)):
            damage = find_damage(path)
            if damage is None:
                return path, skipped
            skipped.append(f"{path}: incomplete ({damage}); skipped")
        if skipped:  # at step 0 the run would overwrite what is left of it
            raise InputError(
                f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is complete, the last one is "
                f"{skipped[0].removesuffix('; skipped')}; restore one, or delete them to start at step 0"
            )
        return None, []
    option = f"--resume_from_checkpoint {resume_from_checkpoint}"
    for path in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if _is_checkpoint(path):
            if (damage := find_damage(path)) is not None:
                raise InputError(f"{option}: incomplete ({damage}); resume from an earlier one, or latest")
            if path.parent.resolve() != Path(output_dir).resolve():
                _require_no_run(output_dir)
            newest = list_checkpoints(output_dir)[-1:]
            if newest and path.name != newest[0][1].name:
                raise InputError(
                    f"{option}: {newest[0][1].name} is later; delete the later ones, or choose another --output_dir"
                )
            return path, []
    raise InputError(f"{option}: no such checkpoint; give a checkpoint-N folder or latest")


def agree_on_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, resume_from_checkpoint: str | None
) -> Path | None:
    """Find the checkpoint on the main process and send it to all: every process must resume from the same one.

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
            raise InputError(f"{path}: not seen by every process; put --output_dir on a shared file system")
    for line in skipped:
        logger.info(line)
    return path


def _require_no_run(output_dir):
    earlier = [path for path in Path(output_dir).glob("*") if path.name in ("best", "final") or _is_checkpoint(path)]
    if earlier:
        raise InputError(
            f"--output_dir {output_dir}: holds {earlier[0].name} of an earlier run; "
            "continue it by --resume_from_checkpoint latest, or choose another folder"
        )


def lock_output_dir(accelerator: Accelerator, output_dir: str | Path) -> TextIO | None:
    """Keep a second run from writing into the same folder. Call it on every process, and keep the returned file.

    The lock ends when the process ends, in whatever way. It matters because a run whose launcher was killed may still
    be saving.

    Raises:
        InputError: another run holds the lock.
    """
    lock = None
    with failing_together(accelerator, output_dir):
        if accelerator.is_main_process:
            # Without following a link, which would empty the file that it leads to.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            lock = open(os.open(Path(output_dir) / LOCK, flags, 0o644), "w")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--output_dir {output_dir}: another run is writing into it; wait for its end, or choose another"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
                logger.warning("%s: its file system has no locks; start no second run into it", output_dir)
            _locks.add(lock)
    return lock


def config_defaults(model_class: type[ModelMixin]) -> dict[str, Any]:
    """Return the defaults of a model's config, as JSON holds them.

    A model saved before an entry existed was built without it, so with its default.
    """
    parameters = inspect.signature(model_class.__init__).parameters
    defaults = {name: given.default for name, given in parameters.items() if given.default is not given.empty}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in defaults.items()}


def require_resumable(
    path: Path,
    accelerator: Accelerator,
    args: Namespace,
    model_class: type[ModelMixin],
    config: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    """Check, before any weight is read, that a run can resume from a checkpoint.

    Args:
        path: a complete checkpoint.
        accelerator, args: the run's.
        model_class, config: class and config of the model that trains.
        inputs: {name: fingerprint} of datasets and frozen models.

    Raises:
        InputError: another version, model, dataset, backbone or optimizer, or 8-bit optimizer states of another engine
            or number of processes.
    """
    state = read_state(path)
    for name, now in saved_options(args).items():
        option = TRAINING_OPTIONS[name]
        before = state["options"].get(name, option.default)  # an option that did not exist yet
        if now != before and option.on_resume == MUST_NOT_CHANGE:
            if before is True:
                raise InputError(f"--{name}: {path} was written with it; give it again")
            written = "without it; leave it out" if before in (None, False) else f"with {before}; give that one"
            raise InputError(f"--{name} {now}: {path} was written {written}")
    saved_config = config_defaults(model_class) | read_json(path / "model/config.json")
    for name, value in config.items():
        if not name.startswith("_") and saved_config.get(name) != value:
            raise InputError(
                f"{path}: was written with {name} {saved_config.get(name)}, but this run has {value}; "
                "resume with the same options, or choose another --output_dir"
            )
    for name, fingerprint in inputs.items():
        if state["progress"]["inputs"].get(name) != fingerprint:
            raise InputError(
                f"--resume_from_checkpoint {path.name}: the {name} has changed since the checkpoint was written; "
                "restore it, or start a new run with another --output_dir"
            )
    if args.ema_decay is not None and state["ema"] is None:
        raise InputError(f"--ema_decay {args.ema_decay:g}: {path} was written without one; leave it out")
    if args.ema_decay is None and state["ema"] is not None:
        raise InputError(f"--ema_decay: {path} holds an average, which would be lost; give the option again")
    has_classifier = (path / "domain_classifier").is_dir()
    if has_classifier != (getattr(args, "adversarial_weight", 0) > 0):  # phase 1 has no such option
        raise InputError(
            f"--adversarial_weight {args.adversarial_weight:g}: {path} has {'a' if has_classifier else 'no'} domain "
            "classifier; resume with the same option, or start a new run with another --output_dir"
        )
    if args.optimizer == "adamw8bit":
        here, before = sharding(accelerator), state["sharding"]
        if here != before or (here is not None and accelerator.num_processes != state["num_processes"]):
            raise InputError(
                f"--optimizer adamw8bit: the states in {path} are quantised in blocks of "
                f"{_engine(before, state['num_processes'])}, but this run has {_engine_of(accelerator)}; resume with "
                f"the same accelerate config, or start a new run from the weights in {path / 'model'}"
            )


def saved_options(args: Namespace) -> dict[str, Any]:
    """Return the options of a run, without those that belong to one start, as JSON holds them."""
    options = {name: value for name, value in sorted(vars(args).items()) if name not in OF_ONE_START}
    if options["buckets"] is not None:
        options["buckets"] = [str(bucket) for bucket in options["buckets"]]
    return options


def changed_options(path: Path, args: Namespace) -> list[str]:
    """Return a line for each option of a resumed run that differs from the run so far.

    Args:
        path: the checkpoint.
        args: the options of the resumed run.
    """
    saved = read_state(path)["options"]
    changed = []
    for name, now in saved_options(args).items():
        option = TRAINING_OPTIONS[name]
        before = saved.get(name, option.default)  # an option that did not exist yet
        if now != before:
            changed.append(f"--{name} {now} (was {before}): {option.on_resume}")
    return changed


def changed_engine(path: Path, accelerator: Accelerator) -> str | None:
    """Return a line if a resumed run has another engine or number of processes than the run so far."""
    state = read_state(path)
    here, before = _engine_of(accelerator), _engine(state["sharding"], state["num_processes"])
    return None if here == before else f"{here} (was {before})"


def _engine_of(accelerator):
    return _engine(sharding(accelerator), accelerator.num_processes)


def _engine(sharding, num_processes):
    if num_processes == 1 and sharding is None:
        return "one process"
    return f"{ENGINE_NAMES[sharding]} on {num_processes} process{'es' if num_processes > 1 else ''}"
