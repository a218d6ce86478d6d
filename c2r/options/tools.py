"""Options of all commands but the training scripts."""

import os
from dataclasses import replace

from c2r import InputError
from c2r.metrics.catalogue import MEASURES, ROLES
from c2r.options.option import Command, Option
from c2r.options.presets import PRESETS, preset_options
from c2r.options.shared import (
    ATTENTION_BACKENDS,
    BASE_MODEL,
    CLIP_OPTIONS,
    DINOV3,
    INFERENCE_BACKENDS,
    TIMEOUT,
    attention_option,
    clip_settings,
    sampling_options,
)
from c2r.options.training import PHASE1, PHASE2
from c2r.options.types import (
    COUNT,
    FILE,
    FOLDER,
    FRAME_RATE,
    FRAMES,
    LORA,
    MEMORY,
    MODEL,
    NOT_NEGATIVE,
    PIXELS,
    PORT,
    POSITIVE,
    SEED,
    SHARE,
    Checked,
    Choice,
    Flag,
    OrWord,
    Switch,
    Text,
)


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
    clip_settings,
)

GENERATE = Command(
    "python -m c2r.generate",
    "Turn a coarse video and a prompt into a real-looking video.",
    {
        "models": _all_common(
            Option(
                "model",
                "best/ or final/ of phase 2, or of phase 1 (without control); or a folder that save_pretrained wrote, "
                "or its hub name",
                MODEL,
                required=True,
            ),
            Option(
                "backbone",
                "backbone that the ControlNet was trained on, if it was moved, or a .gguf or float8 file of it",
                Text("a folder or file"),
            ),
            Option(
                "pretrained_model_name_or_path",
                "Wan pipeline with VAE, text encoder and scheduler; default: the one of training",
                MODEL,
            ),
            Option("dinov3", "DINOv3 model; default: the one of training", MODEL),
            Option("dtype", "dtype of the weights; default: bf16 on a GPU, else fp32", Choice(("bf16", "fp32"))),
            Option(
                "lora",
                "LoRA of Wan 2.1 to add to the backbone: a .safetensors file of Diffusers, ComfyUI or musubi-tuner, "
                "or best/ of train_phase1.py --lora_rank; may be given several times; SCALE is 1 where none is given",
                LORA,
                metavar="FILE[:SCALE]",
                repeatable=True,
            ),
            Option("cpu_offload", "keep only the model in use on the GPU", Flag(), False),
            Option("vae_tiling", "decode in tiles: less memory, more time", Flag(), False),
            attention_option(ATTENTION_BACKENDS + INFERENCE_BACKENDS),
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
            Option(
                "num_frames",
                "frames, or all: as many as the coarse video has; default: as trained",
                OrWord(FRAMES, "all"),
            ),
            Option(
                "fps",
                "frames per second of the output and of the coarse video, or control: the coarse video's own; "
                "default: as trained",
                OrWord(FRAME_RATE, "control"),
            ),
            Option(
                "window_frames",
                "frames of a window, 4k + 1; a longer video is made of overlapping windows that are denoised "
                "together; default: as trained",
                FRAMES,
            ),
            Option(
                "window_overlap",
                "frames that neighbouring windows share, 4k + 1; default: about a quarter of a window",
                FRAMES,
            ),
            Option("seed", "seed of the noise of each video", SEED, 0),
        ),
        "sampling": [
            *sampling_options(num_inference_steps=50, as_trained=True),
            *_all_common(
                Option("conditioning_scale", "factor of the control residuals; default: as trained", NOT_NEGATIVE),
                Option("control_guidance_start", "fraction of the steps at which control starts", SHARE, 0.0),
                Option("control_guidance_end", "fraction of the steps at which control ends", SHARE, 1.0),
                Option("flow_shift", "shift of the noise levels; default: as trained, else 3", POSITIVE),
            ),
        ],
    },
)


def _network(text):
    """Return (role, folder or hub name)."""
    role, equals, name = text.partition("=")
    if not (equals and name and role in ROLES):
        raise ValueError(f"not ROLE=NETWORK; give one of {', '.join(f'{role}=…' for role in ROLES)}")
    return role, name


def _check_evaluate(args):
    if not args.model and not args.videos:
        raise InputError("--model: missing; give a trained model, or --videos that were made elsewhere")
    if not args.model and args.control != ["own"]:
        raise InputError(f"--control {' '.join(args.control)}: no video is generated; give a --model, or leave it out")
    for name in ("control", "metrics"):
        values = getattr(args, name) or []
        for value in values:
            if values.count(value) > 1:
                raise InputError(f"--{name} {value}: named twice; name it once")
    folders = set()
    for name in ("model", "videos"):
        for value in getattr(args, name) or []:
            folder = os.path.realpath(value)
            if folder in folders:
                raise InputError(f"--{name} {value}: named twice; name it once")
            folders.add(folder)
    roles = [role for role, _ in args.networks or []]
    for role in roles:
        if roles.count(role) > 1:
            raise InputError(f"--networks {role}: named twice; name one network for it")


_OF_MODELS = (
    "backbone",
    "pretrained_model_name_or_path",
    "dinov3",
    "dtype",
    "cpu_offload",
    "vae_tiling",
    "attention_backend",
)
_OF_VIDEOS = ("negative_prompt", "height", "width", "window_frames", "window_overlap")
#: Kinds of control that c2r.evaluate generates with.
CONTROLS = ("own", "shuffled", "none")
EVALUATE = Command(
    "python -m c2r.evaluate",
    "Measure how well models follow their control and how real their videos look, on the same scenes and seeds.",
    {
        "what is measured": _all_common(
            Option(
                "dataset",
                "folder with a metadata.csv: prompts (text), coarse videos (control_name), true videos (file_name) "
                "and perhaps passes of the renderer (id_name, depth_name)",
                FOLDER,
                required=True,
            ),
            Option(
                "model",
                "one or several trained models: best/ or final/ of phase 2 or 1, folders that save_pretrained wrote, "
                "or hub names",
                MODEL,
                several=True,
            ),
            Option(
                "videos",
                "one or several folders of videos made elsewhere, named as the scenes' true or coarse videos",
                Text("folders"),
                several=True,
            ),
            Option(
                "control",
                "one or several kinds of control: own: the scene's; shuffled: another scene's; none: no control",
                Choice(CONTROLS),
                ["own"],
                several=True,
            ),
            Option("num_seeds", "videos that a model generates of each scene, with seeds from --seed on", COUNT, 1),
            Option("seed", "first seed", SEED, 0),
            Option("max_clips", "number of scenes to measure, from the first row on; default: all", COUNT),
            Option("output_dir", "folder for everything that is written", FOLDER, "evaluation"),
        ),
        "measures": [
            *_all_common(
                Option(
                    "metrics",
                    "measures to compute; default: all whose network is given",
                    Choice(tuple(measure.name for measure in MEASURES)),
                    several=True,
                ),
                Option(
                    "networks",
                    "networks of measures, such as clip=openai/clip-vit-large-patch14; roles: " + ", ".join(ROLES),
                    Checked(_network, "ROLE=NETWORK"),
                    metavar="ROLE=NETWORK",
                    several=True,
                ),
                Option(
                    "real_dataset",
                    "real clips of the training, for its validation numbers and the CG look",
                    Text("folders"),
                    several=True,
                ),
                Option(
                    "cg_dataset",
                    "CG pairs of the training, for its validation numbers and the CG look",
                    Text("folders"),
                    several=True,
                ),
                replace(
                    PHASE2.options["num_validation_clips"],
                    help="held-out clips of each of these datasets that a model is validated on",
                ),
            ),
            *(option for option in CLIP_OPTIONS if option.name == "cache_dir"),
        ],
        "models": [GENERATE.options[name] for name in _OF_MODELS],
        "videos": [
            *(GENERATE.options[name] for name in _OF_VIDEOS),
            Option("num_frames", "frames of a clip, 4k + 1; default: as trained", FRAMES, common=True),
            Option("fps", "frames per second; default: as trained", FRAME_RATE, common=True),
            Option("sequence_fps", "frames per second of image sequences whose row has no fps", FRAME_RATE),
        ],
        "sampling": GENERATE.groups["sampling"],
    },
    _check_evaluate,
)

APP = Command(
    "python -m c2r.app",
    "Try a model in the browser: coarse video and prompt in, realistic video out.",
    {
        "models": [
            replace(option, help=f"{option.help}; also the first word without --model")
            if option.name == "model"
            else option
            for option in GENERATE.groups["models"]
        ],
        "videos": [
            *(GENERATE.options[name] for name in ("height", "width")),
            replace(
                GENERATE.options["num_frames"], help="most frames of a video, 4k + 1; default: as trained", type=FRAMES
            ),
            replace(GENERATE.options["fps"], help="frames per second; default: as trained", type=FRAME_RATE),
            *(GENERATE.options[name] for name in ("window_frames", "window_overlap", "flow_shift")),
            Option("lora_dir", "folder with LoRAs to choose from on the page", FOLDER),
        ],
        "page": _all_common(
            Option(
                "host",
                "address that the page is served at; the default is seen by this machine alone, and there is no "
                "password",
                default="127.0.0.1",
            ),
            Option("port", "port that the page is served at", PORT, 7860),
            Option("max_upload_mb", "largest coarse video in MB; of a sequence, all pictures together", COUNT, 500),
        ),
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
    *("offload_activations", "ffn_chunks", "step_in_backward", "max_grad_norm", "offload_backbone"),
)
_OF_PHASE2 = ("injection", "control_layers", "control_stride", "adversarial_weight", "num_samples", "fp8_backbone")


def _estimate_options():
    """Return the training options of `c2r.estimate`: those whose default depends on the phase have none."""
    for name in (*_OF_BOTH_PHASES, *_OF_PHASE2):
        option, other = PHASE2.options[name], PHASE1.options.get(name)
        if isinstance(option.type, Flag | Switch) or (other is not None and other.default == option.default):
            yield option
        else:
            default = _text(option.default)
            if other is not None:
                default = f"{_text(other.default)} in phase 1, {default} in 2"
            yield replace(option, default=None, help=f"{option.help}; default: {default}")
    yield PHASE1.options["lora_rank"]


def _text(value):
    return value if isinstance(value, str) else f"{value:g}"


def _check_estimate(args):
    if args.phase == "1":
        for name in _OF_PHASE2:
            value = getattr(args, name)
            if value is not None and value is not False:
                given = name if value is True else f"{name} {_text(value)}"
                raise InputError(f"--{given}: phase 1 has no control; leave it out, or give --phase 2")
    elif args.lora_rank is not None:
        raise InputError(f"--lora_rank {args.lora_rank}: phase 2 trains no LoRA; leave it out, or give --phase 1")
    if args.engine == "single_gpu" and args.num_processes > 1:
        raise InputError(f"--num_processes {args.num_processes}: --engine single_gpu has one; give another engine")
    if args.measure and args.engine != "single_gpu":
        raise InputError(f"--measure: runs one process; leave it out, or leave out --engine {args.engine}")
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
            Option(
                "preset",
                "options of a preset of the training scripts",
                Choice(tuple(PRESETS["2"] | PRESETS["1"])),
            ),
            *_estimate_options(),
            Option(
                "measure",
                "take a few real steps with random weights on this machine's GPU, and print their memory and time",
                Flag(),
                False,
            ),
            Option("cpu_offload", "as in c2r.generate: keep only the model in use on the GPU", Flag(), False),
            Option("vae_tiling", "as in c2r.generate: decode in tiles", Flag(), False),
        )
    },
    _check_estimate,
    lambda given: preset_options(given.get("phase", "2"), given),
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
    for name in ("default_caption", "caption_prefix"):
        if (text := getattr(args, name)) is not None and not text.strip():
            raise InputError(f"--{name} {text!r}: is empty; give a text")


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
                "caption_prefix",
                'text before each caption that does not begin with it, such as "cg render of": a look that captions '
                "name stays out of videos of other prompts",
                metavar="TEXT",
            ),
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
#: Forms that c2r.export writes, each with a function in `c2r.export.FORMATS`.
EXPORT_FORMATS = ("original", "lora", "lora-comfyui", "pipeline")
EXPORT = _command_of_one_group(
    "python -m c2r.export",
    "Write a trained model in a form that other programs read.",
    Option("model", "best/ or final/ of a phase", FOLDER, required=True),
    Option(
        "format",
        "original: phase 1 as one .safetensors file in Wan's original layout, as ComfyUI and DiffSynth read it, "
        "with its LoRA if it trained one; lora, lora-comfyui: this LoRA alone, for Diffusers or ComfyUI; "
        "pipeline: either phase with all models that it needs, as one Diffusers folder",
        Choice(EXPORT_FORMATS),
        required=True,
    ),
    Option("output", "file or folder to write", Text("a file or folder"), required=True),
    Option(
        "dtype",
        "dtype of the weights; default: as they are stored, of a pipeline fp32",
        Choice(("bf16", "fp16", "fp32")),
    ),
)
REPORT = _command_of_one_group(
    "python -m c2r.report",
    "Write one HTML page on one or several runs: curves, paired differences, samples, options.",
    Option(
        "runs",
        "output folders of runs, finished or running, the first being what the others are compared with; also the "
        "first words without --runs",
        Text("folders"),
        metavar="RUN",
        several=True,
        required=True,
    ),
    Option("output", "HTML file to write", FILE, "report.html"),
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
    Option(
        "only",
        "settings to run: their whole names, or texts that are in the names of one or several; default: all; a text "
        "that is in no name prints all names",
        metavar="TEXT",
        several=True,
    ),
    Option("seeds", "runs of each setting", COUNT, 3),
    Option("workers", "runs at a time, one core each", COUNT, 2),
)
TOY = _command_of_one_group(
    "python -m c2r.toy",
    "Write the toy: small base models, real clips, CG pairs, test scenes and a config for each phase.",
    _output_dir("toy"),
    Option("num_real", "real videos, two clips each", COUNT, 96),
    Option("num_cg", "CG pairs, two clips each", COUNT, 32),
    Option(
        "train",
        "train the base models from scratch (hours; continues where it was) instead of writing the shipped ones",
        Flag(),
        False,
    ),
)
