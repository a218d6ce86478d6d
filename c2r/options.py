"""The options of both training scripts: the command line over --config FILE.yaml over the defaults."""

import argparse
import math
from pathlib import Path

import yaml
from diffusers.optimization import SchedulerType

from c2r import InputError, flow_matching
from c2r.data.buckets import buckets_of, parse_bucket
from c2r.pipeline import DEFAULT_GUIDANCE_SCALE
from c2r.training.interruption import slot_deadline
from c2r.training.watchdog import DEFAULT_TIMEOUT_MINUTES

#: The options that a call of `C2RPipeline` takes by the same names.
PIPELINE_OPTIONS = (
    *("height", "width", "num_frames", "num_inference_steps"),
    *("guidance", "guidance_scale", "control_guidance_scale", "conditioning_scale"),
)


def add_clip_options(group):
    """Add what decides how a clip is cut and encoded, and where the result is kept.

    Args:
        group: an `argparse` parser or group.
    """
    group.add_argument(
        "--pretrained_model_name_or_path",
        default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        help="Wan 2.1 in Diffusers' layout, a folder or a hub id",
    )
    group.add_argument(
        "--cache_dir", help="for latents and prompt embeddings; default: .c2r_cache in the dataset's folder"
    )
    group.add_argument("--height", type=int, default=480, help="pixels, divisible by 16")
    group.add_argument("--width", type=int, default=832, help="pixels, divisible by 16")
    group.add_argument("--num_frames", type=int, default=81, help="frames of a clip, 4k + 1")
    group.add_argument(
        "--buckets",
        type=parse_bucket,
        nargs="+",
        metavar="81x480x832",
        help="frames x height x width of several kinds of clips, instead of --num_frames, --height and --width; "
        "a clip goes to the one that fits it best, images to those of one frame",
    )
    group.add_argument("--fps", type=float, default=16.0, help="frame rate that the clips are resampled to")
    group.add_argument(
        "--max_dropped", type=float, help="end where more than this share of a dataset's rows is dropped, e.g. 0.1"
    )
    group.add_argument(
        "--video_cache_gb", type=float, default=50.0, help="bound of what is fetched of datasets at an address"
    )
    group.add_argument("--dataloader_num_workers", type=int, default=4, help="per process; 0 loads in the loop itself")


def add_dinov3_option(group):
    """Add what the control is encoded by, to an `argparse` parser or group."""
    group.add_argument("--dinov3", default="facebook/dinov3-vitb16-pretrain-lvd1689m", help="a folder or a hub id")


def add_timeout_option(group):
    """Add what a hang is, to an `argparse` parser or group."""
    group.add_argument(
        "--distributed_timeout_minutes",
        type=float,
        default=DEFAULT_TIMEOUT_MINUTES,
        help="a process that makes no progress for so long ends the run; above the slowest load, step, fetch or save",
    )


def check_timeout_option(args):
    """Raise InputError for a time that cannot be."""
    if not 0 < args.distributed_timeout_minutes < math.inf:
        raise InputError(
            f"--distributed_timeout_minutes {args.distributed_timeout_minutes}: must be above 0 and finite"
        )


def check_clip_options(args):
    """Raise InputError for the first value of `add_clip_options` that cannot work."""
    buckets_of(args)
    if args.max_dropped is not None and not 0 <= args.max_dropped <= 1:
        raise InputError(f"--max_dropped {args.max_dropped}: must be from 0 to 1")
    if not 0 < args.video_cache_gb < math.inf:
        raise InputError(f"--video_cache_gb {args.video_cache_gb}: must be above 0 and finite")
    if args.dataloader_num_workers < 0:
        raise InputError(f"--dataloader_num_workers {args.dataloader_num_workers}: must not be negative")


def add_sampling_options(group, num_inference_steps):
    """Add what a generated video depends on besides its conditions.

    Args:
        group: an `argparse` parser or group.
        num_inference_steps: the default.
    """
    group.add_argument("--num_inference_steps", type=int, default=num_inference_steps, help="of each video")
    group.add_argument(
        "--guidance", choices=list(DEFAULT_GUIDANCE_SCALE), default="apg", help="adaptive projected, or plain"
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        help="of the text, 1: none; default: "
        + ", ".join(f"{scale:g} with {name}" for name, scale in DEFAULT_GUIDANCE_SCALE.items()),
    )
    group.add_argument(
        "--control_guidance_scale", type=float, default=1.0, help="of the control; other than 1 costs a pass per step"
    )


def check_sampling_options(args):
    """Raise InputError for the first value of `add_sampling_options` that cannot work."""
    if args.num_inference_steps < 1:
        raise InputError(f"--num_inference_steps is {args.num_inference_steps}: it must be at least 1")
    for name in ("guidance_scale", "control_guidance_scale"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"--{name} is {value}: it must be a number of at least 0")


def add_common_options(parser, **defaults):
    """Add the options of both phases.

    Args:
        parser: an `argparse.ArgumentParser`.
        defaults: values that differ between the phases, by option name.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="sets any option below by its name; the command line wins"
    )
    group.add_argument("--output_dir", required=True, help="checkpoints, best/, final/ and logs/ go here")
    group.add_argument("--seed", type=int, default=0, help="of everything random in the run")
    group.add_argument(
        "--mixed_precision",
        default="bf16",
        choices=("bf16", "no"),
        help="bf16: autocast over fp32 trainable weights, frozen ones in bf16; no: all in fp32",
    )
    add_timeout_option(group)
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="try all of it on a few clips (train, validate, save, resume), tell what the run would take, and stop",
    )
    group.add_argument("--report_to", default="tensorboard", choices=("tensorboard", "none"), help="where logs go")

    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--real_dataset",
        required=True,
        nargs="+",
        metavar="FOLDER[:WEIGHT]",
        help="folder or address with real videos and metadata.csv; of several, each with the weight of its samples",
    )
    add_clip_options(group)
    group.add_argument(
        "--num_validation_clips", type=int, default=8, help="held-out clips of each domain to validate on"
    )

    _add_optimisation_options(parser.add_argument_group("optimisation"))
    _add_flow_matching_options(parser.add_argument_group("flow matching"))
    _add_checkpoint_options(parser.add_argument_group("checkpoints and validation"))
    parser.set_defaults(**defaults)


def _add_optimisation_options(group):
    group.add_argument("--train_batch_size", type=int, help="clips per device and micro-step")
    group.add_argument("--gradient_accumulation_steps", type=int, help="micro-steps per optimizer step")
    group.add_argument("--max_train_steps", type=int, help="optimizer steps")
    group.add_argument("--learning_rate", type=float, help="after the warm-up")
    group.add_argument(
        "--lr_scheduler",
        default="constant_with_warmup",
        choices=[s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT],
        help="of diffusers.optimization",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=100, help="optimizer steps")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="of AdamW")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="of AdamW")
    group.add_argument("--adam_weight_decay", type=float, default=0.01, help="of AdamW")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="of AdamW")
    group.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute each block again in the backward pass: far less memory, more time",
    )
    group.add_argument(
        "--optimizer", default="adamw", choices=("adamw", "adamw8bit"), help="adamw8bit: states in 8 bit, bitsandbytes"
    )
    group.add_argument(
        "--weight_storage",
        default="fp32",
        choices=("fp32", "bf16"),
        help="of trainable weights. bf16: weights and gradients in bf16, the low 16 bits beside; no update is lost",
    )
    group.add_argument("--ema_decay", type=float, help="validate and save a moving average of the weights, e.g. 0.999")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")


def _add_flow_matching_options(group):
    group.add_argument(
        "--flow_shift", type=float, default=3.0, help="shift of the noise levels: 3 for 480p, 5 for 720p"
    )
    group.add_argument(
        "--weighting_scheme",
        default="none",
        choices=flow_matching.WEIGHTING_SCHEMES,
        help="density of the noise levels and weight of the loss, as in diffusers.training_utils",
    )
    group.add_argument("--logit_mean", type=float, default=0.0, help="of logit_normal; above 0: more noise")
    group.add_argument("--logit_std", type=float, default=1.0, help="of logit_normal")
    group.add_argument("--mode_scale", type=float, default=1.29, help="of mode")
    group.add_argument(
        "--prompt_dropout", type=float, default=0.1, help="share of samples trained with the empty prompt"
    )


def _add_checkpoint_options(group):
    group.add_argument("--checkpointing_steps", type=int, default=2000, help="optimizer steps between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="older ones are deleted; default: keep all")
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="PATH|latest",
        help="a checkpoint-N folder; latest starts anew if there is none",
    )
    group.add_argument("--save_every_minutes", type=float, help="write a checkpoint at least so often")
    group.add_argument(
        "--save_before_timeout",
        metavar="5m",
        help="so long before the Slurm slot ends, save and stop with exit status 75",
    )
    group.add_argument(
        "--max_skipped_steps", type=int, default=5, help="with a non-finite gradient, in a row; one more ends the run"
    )
    group.add_argument("--validation_steps", type=int, default=500, help="optimizer steps between validations")


def parse_options(parser, argv=None):
    """Parse the command line over `--config FILE.yaml` over the defaults, and check what can be checked at once.

    Raises:
        InputError: for an unknown key or a bad value in the file, or for options that do not fit each other.
    """
    # The file must be read before the rest can be parsed.
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config = config_parser.parse_known_args(argv)[0].config
    actions = {action.dest: action for action in parser._actions}
    if config is not None:
        for key, value in _read_config(config, actions).items():
            parser.set_defaults(**{key: value})
            actions[key].required = False
    args = parser.parse_args(argv)
    check_options(args)
    return args


def _read_config(path, actions):
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: must hold lines of the form 'option: value'")
    checked = {}
    for key, value in values.items():
        if key not in actions or key in ("config", "help"):
            raise InputError(f"--config {path}: unknown option {key!r}; see --help for the names")
        action = actions[key]
        if action.nargs == 0:
            valid = isinstance(value, bool)
        else:
            # As the command line would read it: YAML takes 1e-5 for a string and 2024 for a number.
            read = action.type or str
            try:
                if value is None:
                    valid = action.default is None and not action.required
                elif action.nargs == "+":
                    value = [read(str(one)) for one in (value if isinstance(value, list) else [value])]
                    valid = bool(value)
                else:
                    value = read(str(value))
                    valid = action.choices is None or value in action.choices
            except (ValueError, argparse.ArgumentTypeError):
                valid = False
        if not valid:
            raise InputError(f"--config {path}: {key}: {value!r} is not a valid value; see --help")
        checked[key] = value
    return checked


def check_options(args):
    """Raise InputError for the first value that cannot work."""
    check_clip_options(args)
    check_timeout_option(args)
    positive = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps")
    for name in (*positive, "validation_steps", "num_validation_clips", "flow_shift", "max_grad_norm", "sample_steps"):
        if not getattr(args, name, 1) > 0:  # nan too
            raise InputError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        raise InputError(f"--checkpoints_total_limit {args.checkpoints_total_limit}: must be at least 1")
    if args.save_every_minutes is not None and not args.save_every_minutes > 0:
        raise InputError(f"--save_every_minutes {args.save_every_minutes}: must be above 0")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise InputError(f"--ema_decay {args.ema_decay}: must be between 0 and 1")
    slot_deadline(args.save_before_timeout)
    for name in ("prompt_dropout", "control_dropout", "control_augmentation", "cg_ratio"):
        if not 0 <= getattr(args, name, 0) <= 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be from 0 to 1")
    for name in ("learning_rate", "lr_warmup_steps", "max_skipped_steps", "num_samples"):
        if not getattr(args, name, 0) >= 0:
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")
