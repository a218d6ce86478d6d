"""Checks between the options of the training scripts: which exclude each other, and which need another."""

import os
from argparse import Namespace
from importlib.util import find_spec

from c2r import InputError
from c2r.options.shared import TORCH_ATTENTION, clip_settings

#: Trackers of --report_to, which are also the names of their packages.
TRACKERS = {"tensorboard": "tensorboard==2.21.0", "wandb": "wandb==0.31.0", "trackio": "trackio==0.43.0"}


def check_phase1_options(args: Namespace):
    """Raise InputError for options of train_phase1.py that do not fit each other."""
    require_frozen_backbone(args)
    _check_training(args)


def check_phase2_options(args: Namespace):
    """Raise InputError for options of train_phase2.py that do not fit each other."""
    _check_training(args)
    if args.cg_ratio > 0 and args.cg_dataset is None:
        raise InputError(f"--cg_ratio {args.cg_ratio:g}: needs CG pairs; give --cg_dataset, or --cg_ratio 0")
    if args.cg_ratio_min is not None and args.cg_ratio_min > args.cg_ratio:
        raise InputError(
            f"--cg_ratio_min {args.cg_ratio_min:g}: above --cg_ratio {args.cg_ratio:g}; give a share from 0 to "
            f"{args.cg_ratio:g}"
        )
    if args.control_projection == "fit" and args.cg_dataset is None:
        raise InputError("--control_projection fit: needs CG pairs; give --cg_dataset, or the file of another run")
    if args.control_projection is None:
        needing = {"control_directions": args.control_directions}
        if args.resume_controlnet_from is None and args.resume_from_checkpoint is None:  # both may bring a projection
            needing["control_tail_drop"] = args.control_tail_drop
        for option, value in needing.items():
            if value:
                raise InputError(f"--{option} {value:g}: needs --control_projection; give it too, or leave this out")
    if args.cache_control_features and args.control_augmentation > 0:
        raise InputError(
            f"--control_augmentation {args.control_augmentation:g}: alters the control in each step, which "
            "--cache_control_features cannot keep; leave one of them out"
        )
    if args.adversarial_weight > 0 and not 0 < args.cg_ratio < 1:
        raise InputError(
            f"--adversarial_weight {args.adversarial_weight:g}: needs samples of both domains, but --cg_ratio "
            f"{args.cg_ratio:g} draws only one; give a --cg_ratio between 0 and 1"
        )


def _check_training(args):
    clip_settings(args)
    check_modes(args)
    chosen_trackers(args.report_to)
    if args.save_before_timeout is not None and not os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
        raise InputError(
            f"--save_before_timeout {args.save_before_timeout:g}s: the end of this slot is unknown; outside Slurm set "
            "SLURM_JOB_END_TIME to its end in seconds since 1970"
        )


def chosen_trackers(report_to: list[str]) -> list[str]:
    """Return the trackers that --report_to names.

    Raises:
        InputError: none beside others, or a tracker whose package is not installed.
    """
    given = "--report_to " + " ".join(report_to)
    if "none" in report_to and len(report_to) > 1:
        raise InputError(f"{given}: none excludes the others; leave it out, or give it alone")
    # A folder wandb/, which wandb makes where it is started, is found too; but it has no file.
    specs = {name: find_spec(name) for name in TRACKERS}
    installed = [name for name, spec in specs.items() if spec is not None and spec.origin is not None]
    if "all" in report_to:
        return installed
    chosen = [name for name in TRACKERS if name in report_to]
    for name in chosen:
        if name not in installed:
            raise InputError(f"{given}: needs {name}; pip install {TRACKERS[name]}, or leave it out")
    return chosen


def check_modes(args: Namespace):
    """Raise InputError for options of a training script that trade time for memory and exclude each other."""
    if args.offload_activations and args.gradient_checkpointing == "none":
        raise InputError(
            "--offload_activations: moves the inputs of checkpointed blocks, but --gradient_checkpointing none keeps "
            "everything; give --gradient_checkpointing block"
        )
    if args.gradient_checkpointing == "selective" and args.attention_backend not in (None, *TORCH_ATTENTION):
        raise InputError(
            "--gradient_checkpointing selective: keeps the outputs of torch's own attention kernels, not of "
            f"--attention_backend {args.attention_backend}; give --gradient_checkpointing block, or no backend"
        )
    if args.compile:
        _require_compilable(args)
    if args.step_in_backward and args.gradient_accumulation_steps > 1:
        raise InputError(
            f"--step_in_backward: would step in each of {args.gradient_accumulation_steps} micro-steps; give "
            "--gradient_accumulation_steps 1"
        )
    if args.step_in_backward and args.max_grad_norm > 0:
        raise InputError(
            "--step_in_backward: the norm of all gradients, which clipping needs, is known only after the last step; "
            "give --max_grad_norm 0"
        )
    if (getattr(args, "dit_path", None) or "").endswith(".gguf"):
        raise InputError(
            f"--dit_path {args.dit_path}: the weights of a GGUF file are quantised, which cannot be trained; give the "
            "bf16, fp16 or fp32 .safetensors file"
        )
    if getattr(args, "fp8_backbone", False) and (args.resume_backbone_from or "").endswith(".gguf"):
        raise InputError(
            f"--fp8_backbone: the weights of {args.resume_backbone_from} are quantised already; leave it out"
        )
    for option in ("offload_backbone", "fp8_backbone"):  # phase 1 does not have both
        if getattr(args, option, False) and args.gradient_checkpointing == "none":
            raise InputError(
                f"--{option}: with --gradient_checkpointing none the device would hold whole weights of all blocks; "
                "give --gradient_checkpointing block"
            )


def _require_compilable(args):
    """Raise InputError for an option that changes how blocks run, and with which --compile is not tested."""
    together = {
        "gradient_checkpointing selective": args.gradient_checkpointing == "selective",
        "offload_activations": args.offload_activations,
        f"ffn_chunks {args.ffn_chunks}": args.ffn_chunks > 1,
        "offload_backbone": args.offload_backbone,
        "fp8_backbone": getattr(args, "fp8_backbone", False),
    }
    for option, given in together.items():
        if given:
            raise InputError(f"--compile: is not tested with --{option}; leave one of them out")


def has_frozen_backbone(args: Namespace) -> bool:
    """Return True for options of phase 2, and of phase 1 with a LoRA."""
    return hasattr(args, "control_layers") or args.lora_rank is not None


def require_frozen_backbone(args: Namespace):
    """Raise InputError for an option that needs a frozen backbone."""
    if args.offload_backbone and not has_frozen_backbone(args):
        raise InputError(
            "--offload_backbone: the backbone trains; give --lora_rank, which freezes it, or leave it out"
        )
