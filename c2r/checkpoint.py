"""Checkpoints of a run: save, find, prune, resume.

    outputs/phase2/checkpoint-2000/
        model/                       the trainable weights, a folder that from_pretrained loads
        optimizer.bin ...            Accelerate's own files: optimizer, RNG of every process
        custom_checkpoint_*.pkl      learning-rate schedule, sampler, loop state

The frozen weights (backbone, VAE, UMT5, DINOv3) are not in them.
"""

import re
import shutil
from pathlib import Path

from c2r import InputError

_PATTERN = re.compile(r"checkpoint-(\d+)")


def register_trainable_weights(accelerator, trainable):
    """Make `accelerator.save_state` and `load_state` handle the trainable weights only.

    Args:
        accelerator: an `Accelerator` with one prepared model.
        trainable: a diffusers `ModelMixin`, the part of that model that trains (unwrapped).
    """

    def save(models, weights, folder):
        if accelerator.is_main_process:
            trainable.save_pretrained(Path(folder) / "model")
        weights.clear()  # or Accelerate saves the whole model, frozen parts and all

    def load(models, folder):
        saved = type(trainable).from_pretrained(Path(folder) / "model", torch_dtype=trainable.dtype)
        for name, value in trainable.config.items():
            if not name.startswith("_") and saved.config.get(name) != value:
                raise InputError(
                    f"{folder}: was written with {name} {saved.config.get(name)}, but this run has {value}; "
                    "resume with the same options, or choose another --output_dir"
                )
        trainable.load_state_dict(saved.state_dict(), strict=True)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def list_checkpoints(output_dir):
    """The finished checkpoints in a folder as (step, path), oldest first."""
    found = [path for path in Path(output_dir).glob("*") if _is_checkpoint(path)]
    return sorted((int(_PATTERN.fullmatch(path.name)[1]), path) for path in found)


def _is_checkpoint(path):
    return path.is_dir() and _PATTERN.fullmatch(path.name) is not None


def save_checkpoint(accelerator, output_dir, step, total_limit=None):
    """Write checkpoint-`step` aside, rename it, then delete the oldest beyond `total_limit`.

    Call it on every process.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = Path(output_dir) / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():  # saved once before by the run that this one resumed from an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        if total_limit is not None:
            for _, old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir, resume_from_checkpoint):
    """The checkpoint that `--resume_from_checkpoint` names.

    Args:
        output_dir: the run's folder.
        resume_from_checkpoint: None, "latest", a path, or the name of a folder in `output_dir`.

    Returns:
        A path, or None: start from step 0. That is so for "latest" where there is no checkpoint yet.

    Raises:
        InputError: if a named checkpoint is missing, or None would write over an earlier run.
    """
    if resume_from_checkpoint is None:
        earlier = [
            path for path in Path(output_dir).glob("*") if path.name in ("best", "final") or _is_checkpoint(path)
        ]
        if earlier:
            raise InputError(
                f"--output_dir {output_dir}: holds {earlier[0].name} of an earlier run; "
                "go on with it by --resume_from_checkpoint latest, or choose another folder"
            )
        return None
    if resume_from_checkpoint == "latest":
        found = list_checkpoints(output_dir)
        return found[-1][1] if found else None
    for path in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if _is_checkpoint(path):
            newest = list_checkpoints(output_dir)[-1:]
            if newest and path.parent.resolve() == Path(output_dir).resolve() and path.name != newest[0][1].name:
                raise InputError(
                    f"--resume_from_checkpoint {resume_from_checkpoint}: {newest[0][1].name} is later; "
                    "delete the later ones, or choose another --output_dir"
                )
            return path
    raise InputError(
        f"--resume_from_checkpoint {resume_from_checkpoint}: no such checkpoint; give a checkpoint-N folder or latest"
    )
