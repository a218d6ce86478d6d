"""Options that several commands have."""

from argparse import Namespace
from pathlib import Path

from c2r import InputError
from c2r.data.buckets import Bucket
from c2r.data.settings import ClipSettings
from c2r.options.option import MUST_NOT_CHANGE, Option
from c2r.options.types import (
    BUCKET,
    COUNT,
    COUNT_OR_ZERO,
    FILE,
    FOLDER,
    FRAME_RATE,
    FRAMES,
    MODEL,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    SHARE,
    Choice,
    Number,
)

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
    Option(
        "vae_dtype",
        "dtype in which the VAE encodes clips; bf16 halves its weights and activations and gives latents with a "
        "larger error",
        Choice(("fp32", "bf16")),
        "fp32",
        on_resume=MUST_NOT_CHANGE,
    ),
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


def clip_option_words(args: Namespace) -> list[str]:
    """Return the options that other commands need for the same clips, as words of a command line, without defaults."""
    names = ("height", "width", "num_frames", "buckets", "fps", "vae_dtype", "cache_dir")
    words = []
    for option in (BASE_MODEL, *(option for option in CLIP_OPTIONS if option.name in names)):
        value = getattr(args, option.name)
        if value != option.default:
            words += [f"--{option.name}", *_value_words(value)]
    return words


def _value_words(value):
    values = value if isinstance(value, list) else [value]
    return [f"{v:g}" if isinstance(v, float) else str(v) for v in values]


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
        vae_dtype=args.vae_dtype,
        cache_dir=Path(args.cache_dir) if args.cache_dir else None,
        max_dropped=args.max_dropped,
        video_cache_gb=args.video_cache_gb,
        num_workers=args.dataloader_num_workers,
    )


# ------------------------------------------------------------------------------------------------------------ sampling

#: Kinds of guidance and their default text scales; those of `c2r.guidance`, whose import takes seconds.
GUIDANCE_SCALES = {"apg": 10.0, "cfg": 5.0}


def sampling_options(num_inference_steps, as_trained=False):
    """Return the options of sampling; as_trained: of a trained model, whose samples in training give the defaults."""

    def trained(otherwise):
        return f"; default: as the samples of training, else {otherwise}" if as_trained else ""

    scales = ", ".join(f"{scale:g} with {name}" for name, scale in GUIDANCE_SCALES.items())
    return [
        Option("num_inference_steps", "denoising steps of each video", COUNT, num_inference_steps, common=as_trained),
        Option(
            "guidance",
            "apg: adaptive projected guidance; cfg: classifier-free guidance" + trained("apg"),
            Choice(tuple(GUIDANCE_SCALES)),
            None if as_trained else "apg",
            common=as_trained,
        ),
        Option(
            "guidance_scale",
            "text guidance scale, 1 is no guidance" + (trained(scales) or f"; default: {scales}"),
            NOT_NEGATIVE,
            common=as_trained,
        ),
        Option(
            "control_guidance_scale",
            "control guidance scale; any value but 1 costs one more forward pass per step" + trained("1"),
            NOT_NEGATIVE,
            None if as_trained else 1.0,
            common=as_trained,
        ),
    ]


def attention_option(backends):
    return Option(
        "attention_backend",
        "attention kernel by Diffusers' name, such as flash, which needs the package flash-attn; default: the one "
        "that torch chooses",
        Choice(backends),
    )
