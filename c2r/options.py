"""Every option of every command, declared once: name, type with its range, default, help.

`python -m c2r.options` prints all of them as Markdown: docs/options.md.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from c2r import InputError
from c2r.data.buckets import Bucket
from c2r.data.settings import ClipSettings
from c2r.option_types import (
    ANY_NUMBER,
    ANY_TEXT,
    BUCKET,
    COUNT,
    COUNT_OR_ZERO,
    DURATION,
    FILE,
    FOLDER,
    FRAME_RATE,
    FRAMES,
    MEMORY,
    MODEL,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    SEED,
    SHARE,
    Choice,
    Flag,
    Number,
    Switch,
    Text,
)

#: Values of `Option.on_resume`.
FROM_COMMAND_LINE = "from the command line"
MUST_NOT_CHANGE = "must not change"
NEW_BASELINE = "from the command line; a change starts a new baseline of validation"


#: torch's own attention kernels by Diffusers' names.
TORCH_ATTENTION = ("native", "_native_flash", "_native_cudnn", "_native_efficient")
#: Attention that can be trained through. Those from a package: flash (flash-attn), _flash_3 (flash-attn 3, built from
#: source) and xformers; those that end in _hub are downloaded by the package kernels.
ATTENTION_BACKENDS = (
    *TORCH_ATTENTION,
    *("_native_math", "flash", "flash_hub", "_flash_3", "_flash_3_hub", "flash_4_hub", "xformers"),
)
#: Those without a backward pass, which compute in 8 bits.
INFERENCE_BACKENDS = ("sage", "sage_hub")


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Args:
        name: without the dashes, as Diffusers names it where Diffusers has it.
        help: one sentence that needs no other option's help to be understood.
        type: reads and checks one value.
        default: value where none is given.
        metavar: placeholder for the value in --help.
        several: takes one or more values, a list.
        repeatable: may be given several times, a list.
        required: has no default.
        common: shown by --help; --help-all shows all options.
        on_resume: value that a resumed run uses: FROM_COMMAND_LINE, MUST_NOT_CHANGE, or a sentence.
    """

    name: str
    help: str
    type: Any = ANY_TEXT
    default: Any = None
    metavar: str | None = None
    several: bool = False
    repeatable: bool = False
    required: bool = False
    common: bool = False
    on_resume: str = FROM_COMMAND_LINE


@dataclass(frozen=True)
class Command:
    """A command: what --help says first, its options by group, and its check across options."""

    prog: str
    description: str
    groups: dict[str, list[Option]]
    check: Callable[[Namespace], None] = field(default=lambda args: None)

    @property
    def options(self) -> dict[str, Option]:
        """All options by name."""
        return {option.name: option for options in self.groups.values() for option in options}


# ----------------------------------------------------------------------------------------------- clips and their cache

CONFIG = Option(
    "config", "YAML file that sets any option by its name; the command line wins", FILE, metavar="FILE", common=True
)
BASE_MODEL = Option(
    "pretrained_model_name_or_path",
    "Wan 2.1 text-to-video pipeline in Diffusers' layout",
    MODEL,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    common=True,
)
DINOV3 = Option(
    "dinov3",
    "DINOv3 ViT that turns control frames into features",
    MODEL,
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    metavar="PATH",
    common=True,
)
TIMEOUT = Option(
    "distributed_timeout_minutes",
    "minutes without progress after which a process counts as hung and the command ends; set it above the longest "
    "load, step, fetch or save",
    Number(above=0, most=30_000),  # three weeks; a data loader takes little more
    10.0,
)
CLIP_OPTIONS = [
    Option(
        "cache_dir",
        "folder for latents and prompt embeddings; default: .c2r_cache in each dataset's folder",
        FOLDER,
        common=True,
    ),
    Option("height", "height of a clip in pixels, divisible by 16", PIXELS, 480, common=True),
    Option("width", "width of a clip in pixels, divisible by 16", PIXELS, 832, common=True),
    Option("num_frames", "frames of a clip, 4k + 1", FRAMES, 81, common=True),
    Option(
        "buckets",
        "several clip sizes as frames x height x width, such as 81x480x832 1x480x832, instead of --num_frames, "
        "--height and --width; each file goes to the size that fits it best",
        BUCKET,
        metavar="FxHxW",
        several=True,
        common=True,
    ),
    Option("fps", "frames per second that clips are resampled to", FRAME_RATE, 16.0, common=True),
    Option("sequence_fps", "frames per second of image sequences whose row has no fps", FRAME_RATE),
    Option(
        "max_dropped",
        "stop if more than this share of a dataset's rows is dropped, such as 0.1",
        SHARE,
        metavar="SHARE",
    ),
    Option("video_cache_gb", "GB of disk for videos fetched from remote datasets", POSITIVE, 50.0),
    Option(
        "dataloader_num_workers",
        "data loader workers per process, at most as many as it has cores; 0 loads in the main process",
        COUNT_OR_ZERO,
        4,
    ),
]


def clip_settings(args: Namespace) -> ClipSettings:
    """Return the settings of the data stage that a command's options give.

    Raises:
        InputError: --buckets names a bucket twice.
    """
    buckets = tuple(args.buckets or [Bucket(args.num_frames, args.height, args.width)])
    for bucket in buckets:
        if buckets.count(bucket) > 1:
            raise InputError(f"--buckets {bucket}: named twice; name it once")
    return ClipSettings(
        buckets=buckets,
        fps=args.fps,
        sequence_fps=args.sequence_fps,
        base_model=args.pretrained_model_name_or_path,
        cache_dir=Path(args.cache_dir) if args.cache_dir else None,
        max_dropped=args.max_dropped,
        video_cache_gb=args.video_cache_gb,
        num_workers=args.dataloader_num_workers,
    )


# ------------------------------------------------------------------------------------------------------------ sampling

#: Kinds of guidance and their default text scales; those of `c2r.pipeline`, whose import takes seconds.
GUIDANCE_SCALES = {"apg": 10.0, "cfg": 5.0}


def _sampling_options(num_inference_steps, common=False):
    return [
        Option("num_inference_steps", "denoising steps of each video", COUNT, num_inference_steps, common=common),
        Option(
            "guidance",
            "apg: adaptive projected guidance; cfg: classifier-free guidance",
            Choice(tuple(GUIDANCE_SCALES)),
            "apg",
            common=common,
        ),
        Option(
            "guidance_scale",
            "text guidance scale, 1 is no guidance; default: "
            + ", ".join(f"{scale:g} with {name}" for name, scale in GUIDANCE_SCALES.items()),
            NOT_NEGATIVE,
            common=common,
        ),
        Option(
            "control_guidance_scale",
            "control guidance scale; any value but 1 costs one more forward pass per step",
            NOT_NEGATIVE,
            1.0,
            common=common,
        ),
    ]


# ------------------------------------------------------------------------------------------------------------ training

#: Names of `diffusers.optimization.SchedulerType` that need no further argument, and of
#: `c2r.flow_matching.WEIGHTING_SCHEMES`; importing these takes seconds.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")

DATASET_METAVAR = "FOLDER[:WEIGHT]"


def _attention_option(backends):
    return Option(
        "attention_backend",
        "attention kernel by Diffusers' name, such as flash, which needs the package flash-attn; default: the one "
        "that torch chooses",
        Choice(backends),
    )


def _training_groups(before_data, after_data, **defaults):
    """Return the groups of options that both phases share.

    Args:
        before_data, after_data: the phase's own options in the group "model and data".
        defaults: default values that differ between the phases, by option name.
    """
    groups = {
        "run": [
            CONFIG,
            Option("output_dir", "folder for checkpoints, best/, final/ and logs", FOLDER, required=True, common=True),
            Option(
                "resume_from_checkpoint",
                "checkpoint-N, or latest: the newest complete one, and step 0 where there is none",
                Text("checkpoint-N or latest"),
                metavar="NAME",
                common=True,
            ),
            Option(
                "dry_run",
                "train, validate, save and resume on a few clips, print what the whole run would take, and stop",
                Flag(),
                False,
                common=True,
            ),
            Option(
                "seed",
                "seed of everything that is random in the run",
                SEED,
                0,
                common=True,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option(
                "mixed_precision",
                "bf16: autocast over fp32 trainable weights, frozen weights in bf16; no: everything in fp32",
                Choice(("bf16", "no")),
                "bf16",
            ),
            Option("report_to", "tracker that gets the logs", Choice(("tensorboard", "none")), "tensorboard"),
            TIMEOUT,
        ],
        "model and data": [
            BASE_MODEL,
            *before_data,
            Option(
                "real_dataset",
                "one or several folders (or remote addresses) with real videos and a metadata.csv; real samples are "
                "drawn in proportion to the weights, which are 1 where none is given",
                Text("folders or addresses"),
                metavar=DATASET_METAVAR,
                several=True,
                required=True,
                common=True,
            ),
            *after_data,
            *CLIP_OPTIONS,
        ],
        "optimisation": [
            Option("train_batch_size", "clips per device and micro-step", COUNT, common=True),
            Option("gradient_accumulation_steps", "micro-steps per optimizer step", COUNT, common=True),
            Option("max_train_steps", "optimizer steps of the run", COUNT, common=True),
            Option("learning_rate", "learning rate after the warm-up", NOT_NEGATIVE, common=True),
            Option(
                "lr_scheduler",
                "learning rate schedule of diffusers.optimization",
                Choice(LR_SCHEDULERS),
                "constant_with_warmup",
            ),
            Option("lr_warmup_steps", "optimizer steps of learning rate warm-up", COUNT_OR_ZERO, 100),
            Option(
                "optimizer",
                "adamw; or adamw8bit: states in 8 bit, needs bitsandbytes",
                Choice(("adamw", "adamw8bit")),
                "adamw",
                common=True,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option("adam_beta1", "AdamW's decay of the first moment", Number(least=0, below=1), 0.9),
            Option("adam_beta2", "AdamW's decay of the second moment", Number(least=0, below=1), 0.999),
            Option("adam_weight_decay", "AdamW's weight decay", NOT_NEGATIVE, 0.01),
            Option("adam_epsilon", "AdamW's epsilon", POSITIVE, 1e-8),
            Option("max_grad_norm", "norm that gradients are clipped to; 0: no clipping", NOT_NEGATIVE, 1.0),
            Option(
                "gradient_checkpointing",
                "memory saved by computing again in the backward pass. none: nothing is; block: each block, from its "
                "input; selective: each block except self-attention, whose outputs are kept",
                Choice(("none", "block", "selective")),
                "block",
                common=True,
            ),
            Option(
                "offload_activations",
                "keep the inputs of blocks in the CPU's memory until the backward pass",
                Flag(),
                False,
            ),
            Option(
                "ffn_chunks",
                "parts of the sequence, such as 4, in which feed-forward layers and projectors run one after another",
                COUNT,
                1,
            ),
            _attention_option(ATTENTION_BACKENDS),
            Option(
                "compile",
                "compile the blocks by torch.compile: the first steps take minutes longer, the others less time; one "
                "GPU, DDP or ZeRO-2",
                Flag(),
                False,
            ),
            Option(
                "weight_storage",
                "precision of trainable weights; bf16 stores weights and gradients in bf16 and the low 16 bits beside "
                "them, so no small update is lost",
                Choice(("fp32", "bf16")),
                "fp32",
            ),
            Option(
                "step_in_backward",
                "update each weight as soon as its gradient is known, and free the gradient; on one device, with "
                "--gradient_accumulation_steps 1 and --max_grad_norm 0",
                Flag(),
                False,
            ),
            Option(
                "ema_decay",
                "validate and save an exponential moving average of the weights with this decay, such as 0.999",
                Number(above=0, below=1),
                on_resume="from the command line; cannot be switched on or off",
            ),
        ],
        "flow matching": [
            Option(
                "flow_shift",
                "shift of the noise levels: 3 for 480p, 5 for 720p",
                POSITIVE,
                3.0,
                on_resume=NEW_BASELINE,
            ),
            Option(
                "weighting_scheme",
                "density of the noise levels and weight of the loss, as in diffusers.training_utils",
                Choice(WEIGHTING_SCHEMES),
                "none",
            ),
            Option("logit_mean", "mean of the logit_normal density; above 0: more noise", ANY_NUMBER, 0.0),
            Option("logit_std", "standard deviation of the logit_normal density", POSITIVE, 1.0),
            # Beyond 2 / (π − 2) the density is not monotonic, and stratified noise levels would not stay so.
            Option("mode_scale", "scale of the mode density", Number(least=-1, most=1.75), 1.29),
            Option("prompt_dropout", "share of samples trained with the empty prompt", SHARE, 0.1),
        ],
        "checkpoints and validation": [
            Option("checkpointing_steps", "optimizer steps between checkpoints", COUNT, 2000, common=True),
            Option(
                "checkpoints_total_limit",
                "checkpoints to keep, older ones are deleted; default: all",
                COUNT,
                common=True,
            ),
            Option("save_every_minutes", "longest time in minutes between two checkpoints", POSITIVE),
            Option(
                "save_before_timeout",
                "time before the end of a Slurm slot, such as 5m, at which the run saves and stops with status 75",
                DURATION,
                metavar="5m",
            ),
            Option(
                "max_skipped_steps",
                "maximum consecutive steps skipped for a non-finite gradient; one more ends the run",
                COUNT_OR_ZERO,
                5,
            ),
            Option("validation_steps", "optimizer steps between validations", COUNT, 500, common=True),
            Option(
                "num_validation_clips",
                "held-out clips of each domain to validate on",
                COUNT,
                8,
                on_resume=NEW_BASELINE,
            ),
        ],
    }
    return {
        name: [replace(o, default=defaults[o.name]) if o.name in defaults else o for o in options]
        for name, options in groups.items()
    }


def _check_clips(args):
    clip_settings(args)


def _check_training(args):
    _check_clips(args)
    check_modes(args)
    if args.save_before_timeout is not None and not os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
        raise InputError(
            f"--save_before_timeout {args.save_before_timeout:g}s: the end of this slot is unknown; outside Slurm set "
            "SLURM_JOB_END_TIME to its end in seconds since 1970"
        )


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
    for option in ("offload_backbone", "fp8_backbone"):  # phase 1 has no frozen backbone
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
        "offload_backbone": getattr(args, "offload_backbone", False),  # phase 1 has no frozen backbone
        "fp8_backbone": getattr(args, "fp8_backbone", False),
    }
    for option, given in together.items():
        if given:
            raise InputError(f"--compile: is not tested with --{option}; leave one of them out")


def _check_phase2(args):
    _check_training(args)
    if args.cg_ratio > 0 and args.cg_dataset is None:
        raise InputError(f"--cg_ratio {args.cg_ratio:g}: needs CG pairs; give --cg_dataset, or --cg_ratio 0")
    if args.cg_ratio_min is not None and args.cg_ratio_min > args.cg_ratio:
        raise InputError(
            f"--cg_ratio_min {args.cg_ratio_min:g}: above --cg_ratio {args.cg_ratio:g}; give a share from 0 to "
            f"{args.cg_ratio:g}"
        )
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


PHASE1 = Command(
    "train_phase1.py",
    "Phase 1: adapt the Wan 2.1 DiT to real urban video with a flow-matching loss.",
    _training_groups(
        [
            Option(
                "dit_path",
                "single-file DiT (.safetensors) to start from instead of the pipeline's transformer/",
                FILE,
                common=True,
                on_resume=MUST_NOT_CHANGE,
            )
        ],
        [],
        train_batch_size=4,
        gradient_accumulation_steps=8,
        max_train_steps=10_000,
        learning_rate=1e-5,
    ),
    _check_training,
)

PHASE2 = Command(
    "train_phase2.py",
    "Phase 2: ground the control on mixed CG and real video, over the frozen backbone of phase 1.",
    _training_groups(
        [
            Option(
                "resume_backbone_from",
                "frozen backbone: best/ or final/ of phase 1, a Diffusers transformer folder or a .safetensors file",
                Text("a folder or file"),
                metavar="PATH",
                required=True,
                common=True,
            ),
            DINOV3,
        ],
        [
            Option(
                "cg_dataset",
                "one or several folders (or remote addresses) with CG pairs: a metadata.csv with file_name, "
                "control_name and text; CG samples are drawn in proportion to the weights, which are 1 where none is "
                "given",
                Text("folders or addresses"),
                metavar=DATASET_METAVAR,
                several=True,
                common=True,
            ),
            Option(
                "cg_ratio",
                "share of CG samples, exact over the run",
                SHARE,
                0.2,
                common=True,
                on_resume="from the command line if it has changed, else the share that the run has reached",
            ),
        ],
        train_batch_size=1,
        gradient_accumulation_steps=1,
        max_train_steps=15_000,
        learning_rate=5e-6,
        # Under 3 % of a run at batch 1, see benchmarks/validation_share.py.
        validation_steps=1500,
        num_validation_clips=4,
    )
    | {
        "frozen backbone": [
            Option(
                "offload_backbone",
                "keep the backbone's blocks in the CPU's memory and copy each to the device while it runs",
                Flag(),
                False,
            ),
            Option(
                "fp8_backbone",
                "store the matrices of the backbone's blocks in 8 bit; on the toy this changes the gradients by 2 %",
                Flag(),
                False,
                on_resume=MUST_NOT_CHANGE,
            ),
        ],
        "control": [
            Option("control_layers", "number of ControlNet blocks", COUNT, 15, common=True, on_resume=MUST_NOT_CHANGE),
            Option(
                "control_stride",
                "backbone blocks per ControlNet block: 1 injects after the first blocks, 3 after every third",
                COUNT,
                1,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option("conditioning_scale", "factor of the control residuals", NOT_NEGATIVE, 1.0),
            Option("control_dropout", "share of samples trained with a blank control", SHARE, 0.1),
            Option(
                "cache_control_features",
                "run DINOv3 once per clip instead of in each step: 194 MB of disk per clip of 480x832x81",
                Flag(),
                False,
            ),
            Option(
                "best_by",
                "criterion of best/: the lowest validation loss, or the highest control gain",
                Choice(("loss", "control_gain")),
                "loss",
                on_resume="from the command line; a change discards the previous best",
            ),
        ],
        "against a CG look": [
            Option("real_weight", "loss weight of a real sample relative to a CG sample, such as 2", POSITIVE, 1.0),
            Option(
                "adversarial_weight",
                "weight of the gradient that makes the predicted latents of CG samples look real to a domain "
                "classifier, such as 0.1; 0: no classifier",
                NOT_NEGATIVE,
                0.0,
                on_resume="from the command line; cannot be switched on or off",
            ),
            Option(
                "control_augmentation",
                "share of real clips whose control is altered in its look, never in its geometry",
                SHARE,
                0.0,
            ),
            Option(
                "cg_ratio_min",
                "lower bound of --cg_ratio, which is halved while the samples' CG look stays above --monitor_bound; "
                "default: --cg_ratio stays as it is",
                SHARE,
                common=True,
            ),
        ],
        "sample videos and CG monitor": [
            Option(
                "num_samples",
                "videos made at each sampling; 0: no samples and no CG monitor",
                COUNT_OR_ZERO,
                4,
                common=True,
            ),
            Option("sample_steps", "optimizer steps between samplings", COUNT, 2500),
            Option(
                "sample_dataset",
                "folder of coarse videos to sample from, laid out like --cg_dataset, with the prompts as captions; "
                "default: held-out CG pairs with captions of held-out real clips",
                FOLDER,
            ),
            *_sampling_options(num_inference_steps=20),
            Option(
                "monitor_bound", "CG look that counts as too strong: 0 is real clips, 1 is CG clips", ANY_NUMBER, 0.5
            ),
            Option(
                "monitor_patience",
                "samplings above --monitor_bound after which the run advises, or lowers --cg_ratio",
                COUNT,
                3,
            ),
        ],
    },
    _check_phase2,
)

# ------------------------------------------------------------------------------------------------------ other commands


def _all_common(*options):
    return [replace(option, common=True) for option in options]


ENCODE = Command(
    "python -m c2r.encode",
    "Fill the cache: VAE latents and UMT5 prompt embeddings of every clip that has none yet.",
    {
        "options": _all_common(
            Option("dataset", "folder or remote address with videos and a metadata.csv", FOLDER, required=True),
            Option(
                "domain",
                "real: videos with captions; cg: pairs, whose rows also name a control_name",
                Choice(("real", "cg")),
                "real",
            ),
            BASE_MODEL,
            Option(
                "dry_run", "print what would be encoded and how long it would take; write no latents", Flag(), False
            ),
            Option(
                "preview",
                "encode a few clips of each bucket, write contact sheets of the decoded clips into this folder, "
                "and stop",
                FOLDER,
                metavar="FOLDER",
            ),
            Option("preview_count", "clips of each bucket that --preview shows", COUNT, 6),
            Option("preview_files", "show files whose name matches a pattern alone, such as 'berlin_*'"),
            Option(
                "control_only",
                "make the DINOv3 features of the training clips' controls instead of latents, in bf16 as phase 2 "
                "takes them by default",
                Flag(),
                False,
            ),
            DINOV3,
            *CLIP_OPTIONS,
            TIMEOUT,
        )
    },
    _check_clips,
)

GENERATE = Command(
    "python -m c2r.generate",
    "Turn a coarse video and a prompt into a real-looking video.",
    {
        "models": _all_common(
            Option("model", "best/ or final/ of phase 2, or of phase 1 (without control)", FOLDER, required=True),
            Option("backbone", "phase 1 folder that the ControlNet was trained on, if it was moved", FOLDER),
            Option(
                "pretrained_model_name_or_path",
                "Wan pipeline with VAE, text encoder and scheduler; default: the one of training",
                MODEL,
            ),
            Option("dinov3", "DINOv3 model; default: the one of training", MODEL),
            Option("dtype", "dtype of the weights; default: bf16 on a GPU, else fp32", Choice(("bf16", "fp32"))),
            Option("cpu_offload", "keep only the model in use on the GPU", Flag(), False),
            Option("vae_tiling", "decode in tiles: less memory, more time", Flag(), False),
            _attention_option(ATTENTION_BACKENDS + INFERENCE_BACKENDS),
        ),
        "what to generate": _all_common(
            Option("prompt", "prompt of a video; repeatable", repeatable=True, required=True),
            Option(
                "control_video",
                "coarse video whose start is the control, or folder or pattern (a_####.png) of pictures; repeatable",
                FILE,
                repeatable=True,
            ),
            Option("sequence_fps", "frames per second of a --control_video of pictures; default: --fps", FRAME_RATE),
            Option("output", ".mp4 file to write; several videos are numbered", FILE, required=True),
            Option("negative_prompt", "prompt to guide away from; default: the empty prompt, as in training"),
            Option("height", "height in pixels, divisible by 16; default: as trained", PIXELS),
            Option("width", "width in pixels, divisible by 16; default: as trained", PIXELS),
            Option(
                "follow_control",
                "take the shape of the first coarse video, with about as many pixels as --height and --width give",
                Flag(),
                False,
            ),
            Option("num_frames", "frames, 4k + 1; default: as trained", FRAMES),
            Option("fps", "frames per second of the output and of the coarse video; default: as trained", FRAME_RATE),
            Option("seed", "seed of the noise of each video", SEED, 0),
        ),
        "sampling": [
            *_sampling_options(num_inference_steps=50, common=True),
            *_all_common(
                Option("conditioning_scale", "factor of the control residuals; default: as trained", NOT_NEGATIVE),
                Option("control_guidance_start", "fraction of the steps at which control starts", SHARE, 0.0),
                Option("control_guidance_end", "fraction of the steps at which control ends", SHARE, 1.0),
                Option("flow_shift", "shift of the noise levels; default: as trained, else 3", POSITIVE),
            ),
        ],
    },
)


def _command_of_one_group(prog, description, *options):
    return Command(prog, description, {"options": _all_common(*options)})


def _output_dir(default):
    return Option("output_dir", "folder for everything that is written", FOLDER, default)


#: Training engines by their configurations in accelerate_configs/.
ENGINES = ("single_gpu", "multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")

#: Options of the training scripts that change what a run takes.
_OF_BOTH_PHASES = (
    *("height", "width", "num_frames", "buckets", "train_batch_size", "gradient_accumulation_steps"),
    *("max_train_steps", "mixed_precision", "weight_storage", "optimizer", "ema_decay", "gradient_checkpointing"),
    *("offload_activations", "ffn_chunks", "step_in_backward", "max_grad_norm"),
)
_OF_PHASE2 = (
    *("control_layers", "control_stride", "adversarial_weight", "num_samples", "offload_backbone", "fp8_backbone"),
)


def _estimate_options():
    """Return the training options of `c2r.estimate`: those whose default depends on the phase have none."""
    for name in (*_OF_BOTH_PHASES, *_OF_PHASE2):
        option, other = PHASE2.options[name], PHASE1.options.get(name)
        if isinstance(option.type, Flag) or (other is not None and other.default == option.default):
            yield option
        else:
            default = (
                f"{option.default:g}" if other is None else f"{other.default:g} in phase 1, {option.default:g} in 2"
            )
            yield replace(option, default=None, help=f"{option.help}; default: {default}")


def _check_estimate(args):
    if args.phase == "1":
        for name in _OF_PHASE2:
            value = getattr(args, name)
            if value is not None and value is not False:
                given = name if value is True else f"{name} {value:g}"
                raise InputError(f"--{given}: phase 1 has no control; leave it out, or give --phase 2")
    if args.engine == "single_gpu" and args.num_processes > 1:
        raise InputError(f"--num_processes {args.num_processes}: --engine single_gpu has one; give another engine")
    for bucket in args.buckets or []:
        if args.buckets.count(bucket) > 1:
            raise InputError(f"--buckets {bucket}: named twice; name it once")


ESTIMATE = Command(
    "python -m c2r.estimate",
    "Compute the memory, FLOPs, disk space and time of a run before it runs, without weights and without a GPU.",
    {
        "options": _all_common(
            Option("model", "1.3b, 14b, or the folder of a Wan pipeline", Text("1.3b, 14b or a folder"), "1.3b"),
            Option("phase", "phase of the training", Choice(("1", "2")), "2"),
            Option("dinov3", "folder of a DINOv3 ViT; default: ViT-B", FOLDER),
            Option("engine", "training engine, see docs/engines.md", Choice(ENGINES), "single_gpu"),
            Option("num_processes", "number of devices", COUNT, 1),
            Option("tflops", "10^12 FLOPs that a device does in a second, to compute the time of a step", POSITIVE),
            Option(
                "fit",
                "memory of a device, such as 24GB: find options with which the run fits, fast ones first",
                MEMORY,
            ),
            *_estimate_options(),
            Option("cpu_offload", "as in c2r.generate: keep only the model in use on the GPU", Flag(), False),
            Option("vae_tiling", "as in c2r.generate: decode in tiles", Flag(), False),
        )
    },
    _check_estimate,
)


def _check_prepare(args):
    for name, other in (("fine_pattern", "coarse_pattern"), ("coarse_pattern", "fine_pattern")):
        pattern = getattr(args, name)
        if pattern is None:
            continue
        if args.domain != "cg":
            raise InputError(f"--{name} {pattern}: names pairs; give --domain cg, or leave it out")
        if getattr(args, other) is None:
            raise InputError(f"--{name} {pattern}: names one side of the pairs; give --{other} too")
        if "*" not in pattern or pattern.count("*") != getattr(args, other).count("*"):
            raise InputError(f"--{name} {pattern}: must have a * for each * of --{other}, at least one; add it")
    if args.caption_model is not None and args.default_caption is not None:
        raise InputError(f"--default_caption {args.default_caption}: --caption_model captions all; leave one out")
    if args.default_caption is not None and not args.default_caption.strip():
        raise InputError(f"--default_caption {args.default_caption!r}: is empty; give a text")


PREPARE = Command(
    "python -m c2r.prepare",
    "Turn a folder of videos into a dataset: find captions, pairs and cuts, write metadata.csv, propose --buckets.",
    {
        "options": _all_common(
            Option(
                "dataset",
                "folder with videos or image sequences; also the first word without --dataset",
                FOLDER,
                required=True,
            ),
            Option(
                "domain",
                "real: videos with captions; cg: pairs of a fine and a coarse video",
                Choice(("real", "cg")),
                "real",
            ),
            Option(
                "captions",
                "table with columns of files and captions; default: the one .csv or .tsv in the folder, if there is "
                "one, then a .txt of each video's name",
                FILE,
            ),
            Option(
                "caption_model",
                "image-text-to-text chat model of transformers that writes the captions that are missing",
                MODEL,
            ),
            Option(
                "caption_prompt",
                "question to --caption_model",
                default="Describe this video in one sentence: the place, the weather, the light, and what moves.",
            ),
            Option("default_caption", "caption of videos that have none", metavar="TEXT"),
            Option(
                "fine_pattern",
                "names of fine videos without their ending, such as final/*; default: *_fine, or in a folder fine",
                metavar="PATTERN",
            ),
            Option(
                "coarse_pattern",
                "names of coarse videos, with * where --fine_pattern has it; default: *_coarse, or in a folder coarse",
                metavar="PATTERN",
            ),
            Option("scenes", "find cuts and give each scene a row of its own", Switch(), True),
            Option(
                "scene_threshold",
                "number of times that the frame after a cut differs more than its neighbours; lower finds more cuts",
                POSITIVE,
                3.0,
            ),
            Option("sequence_fps", "frames per second of image sequences", POSITIVE),
            Option("fps", "frames per second of clips, to choose their number of frames by", POSITIVE, 16.0),
            Option(
                "overwrite",
                "replace a metadata.csv that this command has not written; it is kept as replaced_metadata.csv",
                Flag(),
                False,
            ),
            Option(
                "output_dir",
                "folder for contact sheets of the clips; default: .c2r_cache/prepare in the dataset's folder",
                FOLDER,
            ),
        )
    },
    _check_prepare,
)
QUICKSTART = _command_of_one_group(
    "python -m c2r.quickstart",
    "Run both phases on a toy city, on a CPU and without downloads, then turn coarse videos into realistic ones.",
    _output_dir("quickstart"),
)
STUDY = _command_of_one_group(
    "python -m c2r.study",
    "Compare settings of phase 2 on the toy city by how well the control works and how strong the CG look is.",
    _output_dir("study"),
    Option("seeds", "runs of each setting", COUNT, 3),
    Option("workers", "runs at a time, one core each", COUNT, 2),
)
TOY = _command_of_one_group(
    "python -m c2r.toy",
    "Write the toy: small base models, real clips, CG pairs, test scenes and a config for each phase.",
    _output_dir("toy"),
    Option("num_real", "real videos, two clips each", COUNT, 96),
    Option("num_cg", "CG pairs, two clips each", COUNT, 32),
    Option("train", "train the base models from scratch (hours) instead of writing the shipped ones", Flag(), False),
)

COMMANDS = (PHASE1, PHASE2, PREPARE, ENCODE, GENERATE, ESTIMATE, QUICKSTART, STUDY, TOY)


# ----------------------------------------------------------------------------------------------------------- docs page


def _default_text(option):
    if option.required:
        return "required"
    if option.default is None or isinstance(option.type, Flag):
        return ""
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def markdown() -> str:
    """Return the page of all options."""
    lines = [
        "# Options",
        "",
        "All options of all commands. `--help` shows the common ones (bold here), `--help-all` shows all. A YAML file "
        "given by `--config` can set any option of the training scripts; the command line wins. A resumed run takes "
        "all options from its command line, except where the last column says otherwise, and prints those that "
        "differ. This page is printed by `python -m c2r.options`.",
    ]
    for command in COMMANDS:
        lines += ["", f"## {command.prog}", "", command.description]
        training = command in (PHASE1, PHASE2)
        for group, options in command.groups.items():
            lines += ["", f"**{group}**" if len(command.groups) > 1 else "", ""]
            lines += [
                "| option | value | default | |" + " on resume |" * training,
                "|---|---|---|---|" + "---|" * training,
            ]
            for option in options:
                name = f"**`--{option.name}`**" if option.common else f"`--{option.name}`"
                row = f"| {name} | {option.type} | {_default_text(option)} | {option.help} |"
                changed = "" if option.on_resume == FROM_COMMAND_LINE else option.on_resume
                lines.append(f"{row} {changed} |" if training else row)
    return "\n".join(line for line, after in zip(lines, [*lines[1:], None]) if line or after) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
