"""Turn a coarse video and a prompt into a real-looking video.

    python -m c2r.generate --model outputs/phase2/best --control_video coarse.mp4 --prompt "…" --output out.mp4

--prompt and --control_video may be given several times: models are loaded once, and the videos are written to
out-0.mp4, out-1.mp4 and so on. Without --control_video the backbone generates alone.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

import errno
import logging
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2r import InputError, cli
from c2r.options import GENERATE

logger = logging.getLogger("c2r.generate")  # under python -m, __name__ is "__main__"

if TYPE_CHECKING:
    import numpy as np
    import torch

    from c2r.models.contract import PhaseContract
    from c2r.models.lora_file import LoraFile
    from c2r.pipeline import C2RPipeline
    from c2r.windows import Window


def name_controls(args: Namespace):
    """Check that the coarse videos exist; name image sequences by pattern and rate. Changes `args` in place.

    Raises:
        InputError: one is missing or incomplete.
    """
    from c2r.data.control_video import name_control

    for i, path in enumerate(args.control_video or []):
        rate = args.sequence_fps or args.fps
        if rate == "control" and not Path(path).is_file():
            raise InputError(f"--fps control: pictures have no rate of their own ({path}); give --sequence_fps too")
        try:
            args.control_video[i] = name_control(path, 1.0 if rate == "control" else rate)
        except InputError as error:
            raise InputError(f"--control_video {error}") from None


def check_options(args: Namespace):
    """Raise InputError for options that do not fit each other."""
    if not args.control_guidance_start < args.control_guidance_end:
        raise InputError(
            f"--control_guidance_start {args.control_guidance_start}: not below --control_guidance_end "
            f"{args.control_guidance_end}; lower it, or raise the end"
        )
    if not args.control_video:
        if args.num_frames == "all":
            raise InputError("--num_frames all: needs a --control_video; give one, or a number")
        if args.fps == "control":
            raise InputError("--fps control: needs the rate of a --control_video; give one, or a number")
    counts = {len(args.prompt), len(args.control_video or [None])}
    if len(counts - {1}) > 1:
        raise InputError(
            f"--control_video: given {len(args.control_video)} times, --prompt {len(args.prompt)} times; "
            "give equally many, or one of either for all"
        )


def output_paths(output: str, count: int, inputs: list[str]) -> list[Path]:
    """Return `output` for one video, or numbered paths: out-0.mp4, out-1.mp4, …

    Raises:
        InputError: `output` is not an .mp4, its folder cannot be created, or it would overwrite an input.
    """
    path = Path(output)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"--output {output}: only .mp4 is written; give a name that ends in .mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output {output}: its folder cannot be created ({error.strerror}); choose another"
        ) from None
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    for path in paths:
        _require_writable(path)
    for given in inputs:
        if Path(given).resolve() in [path.resolve() for path in paths]:
            raise InputError(f"--output {output}: would overwrite --control_video {given}; choose another name")
    return paths


def _require_writable(path):
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        path.lstat()  # fails if the name is too long for the file system
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror}); choose another name") from None


def complete_options(args: Namespace, contract: "PhaseContract"):
    """Take options that were not given from the model's contract. Changes `args` in place.

    Raises:
        InputError: the contract has a value that the option would refuse, or windows would not overlap.
    """
    from c2r.models.contract import DEFAULT_FORMAT
    from c2r.windows import trained_window

    for name in (*DEFAULT_FORMAT, "flow_shift", "conditioning_scale"):
        value, is_given = getattr(contract, name), getattr(args, name) is not None
        is_window = name == "num_frames" and args.window_frames is None
        if value is None or (is_given and not is_window):
            continue
        try:
            value = GENERATE.options[name].type(str(value))
        except ValueError as error:
            raise InputError(f"--model {args.model}: its contract has {name} {value}: {error}") from None
        if not is_given:
            setattr(args, name, value)
    for name, default in (DEFAULT_FORMAT | {"flow_shift": 3.0, "conditioning_scale": 1.0}).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.window_frames = args.window_frames or trained_window(contract.format["num_frames"])
    if args.window_frames == 1 != args.num_frames:
        raise InputError("--window_frames 1: windows of a longer video overlap; give at least 5, or leave it out")
    if None not in (args.window_frames, args.window_overlap) and args.window_overlap >= args.window_frames:
        raise InputError(
            f"--window_overlap {args.window_overlap}: not below --window_frames {args.window_frames}; lower it"
        )
    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or contract.base_model
    args.backbone = args.backbone or contract.backbone
    args.dinov3 = args.dinov3 or contract.dinov3


def follow_control(args: Namespace):
    """Set height and width to those that crop least from the first coarse video. Changes `args` in place.

    Raises:
        InputError: no coarse video is given, or its shape cannot be read.
    """
    from c2r.data.buckets import fitting_size
    from c2r.data.video import probe

    if not args.control_video:
        raise InputError("--follow_control: needs the shape of a --control_video; give one, or --height and --width")
    args.height, args.width = fitting_size(probe(args.control_video[0]).aspect, args.height * args.width)


@dataclass(frozen=True)
class Length:
    """Frames and rate of a video."""

    num_frames: int
    fps: float

    @property
    def generated(self) -> int:
        """Frames that are generated, 4k + 1; those beyond num_frames are not written."""
        return self.num_frames + -(self.num_frames - 1) % 4


def length_of(args: Namespace, control: str | None) -> Length:
    """Return the length of the video that a coarse video gives.

    Raises:
        InputError: --num_frames is all, and the coarse video hardly changes.
    """
    from c2r.data.video import probe

    if control is None:
        return Length(args.num_frames, args.fps)
    info = probe(control)
    fps = info.rate if args.fps == "control" else args.fps
    if args.num_frames != "all":
        return Length(args.num_frames, fps)
    if info.is_frozen_at(fps):
        raise InputError(f"{control}: hardly changes at --fps {fps:g}; lower it, or give --fps control")
    return Length(info.frames_at(fps), fps)


def describe_windows(windows: "Sequence[Window]", temporal_stride: int, trained: int | None) -> str | None:
    """Return a line on the length of a video if it is not that of training, else None.

    Args:
        windows: of the video, from `C2RPipeline.plan_windows`.
        temporal_stride: the VAE's.
        trained: frames of a clip in training, if they are known.
    """
    window_frames, num_frames = (window.frames(temporal_stride).stop for window in (windows[0], windows[-1]))
    frames = f"generates {num_frames} frame{'s' * (num_frames > 1)}"
    if len(windows) > 1:
        overlap = temporal_stride * (min(window.overlap for window in windows[1:]) - 1) + 1
        line = f"{frames} in {len(windows)} windows of {window_frames}, overlapping by {overlap}"
    elif num_frames != trained:
        line = f"{frames} in one window"
    else:
        return None
    if trained is not None and window_frames != trained:
        line += f"; the model was trained on {trained}"
    return line


def check_files(args: Namespace, contract: "PhaseContract", loras: "Sequence[LoraFile]" = ()):
    """Check the files and models that the options name, reading headers only.

    Raises:
        InputError: one is missing or does not fit.
    """
    from c2r.data.buckets import MUCH_CROPPED, cropped_share, fitting_size
    from c2r.data.video import probe
    from c2r.models.assembly import check_model
    from c2r.models.dinov3 import check_dinov3
    from c2r.models.parts import ENCODERS, check_pipeline_parts

    if contract.phase == 1 and args.control_video:
        raise InputError(f"--model {args.model}: phase 1 has no control; leave --control_video out, or give phase 2")
    for path in args.control_video or []:
        info = probe(path)
        cropped = cropped_share(info.aspect, args.width / args.height)
        if cropped > MUCH_CROPPED:
            height, width = fitting_size(info.aspect, args.height * args.width)
            logger.warning(
                "--control_video %s: %.0f %% of its picture is cropped away at %dx%d; to keep it, give --height %d "
                "--width %d, or --follow_control",
                *(path, 100 * cropped, args.height, args.width, height, width),
            )
        length = length_of(args, path)
        if info.is_image and length.num_frames > 1:
            raise InputError(
                f"--control_video {path}: one picture, but --num_frames is {length.num_frames}; give a video, or the "
                "folder of an image sequence"
            )
        available = info.frames_at(length.fps)
        if available < length.num_frames:
            raise InputError(
                f"{path}: gives {available} frames at {length.fps:g} fps, but --num_frames is {length.num_frames}; "
                "give a longer video, or lower --num_frames; --num_frames all takes what there is"
            )
    check_model(args.model, contract, args.backbone, loras)
    if args.control_video:
        check_dinov3(args.dinov3, [(args.height, args.width)])
    # Last, because the text encoder is the largest download.
    check_pipeline_parts(args.pretrained_model_name_or_path, [*ENCODERS, "scheduler"])


def read_padded(control: str, length: Length, height: int, width: int) -> "torch.Tensor":
    """Read a coarse video's start, (F, 3, H, W) in [0, 1]; its last frame is repeated where F = 4k + 1 needs more."""
    from c2r.data.control_video import read_control

    frames = read_control(control, length.num_frames, length.fps, height, width)
    missing = length.generated - length.num_frames
    return frames if missing == 0 else frames[[*range(length.num_frames), *[-1] * missing]]


def find_model(args: Namespace, device: str, with_control: bool) -> "tuple[PhaseContract, torch.dtype]":
    """Find the model, complete the options from its contract, and try --attention_backend. Changes `args` in place.

    Args:
        args: options.
        device: where the models are to run.
        with_control: True if a coarse video is given, which needs DINOv3.

    Returns:
        the model's contract, with the models that the options name; the dtype of the weights.

    Raises:
        InputError: there is no such model, or an option does not fit the model or this machine.
    """
    import torch

    from c2r.models.attention import try_attention_backend
    from c2r.models.backbone import read_transformer_config
    from c2r.models.contract import fetch_model, read_contract, with_moved_models

    if args.cpu_offload and device == "cpu":
        raise InputError("--cpu_offload: there is no GPU to offload from; leave it out")
    model = fetch_model(args.model)
    moved = {"base_model": args.pretrained_model_name_or_path, "backbone": args.backbone}
    moved |= {"dinov3": args.dinov3} if with_control else {}
    contract = with_moved_models(read_contract(model), args.model, **moved)
    args.model = str(model)
    complete_options(args, contract)
    dtype = weight_dtype(args.dtype, device)
    if args.attention_backend is not None:
        backbone = args.backbone if contract.has_backbone else args.model
        head_dim = read_transformer_config(backbone, contract.base_model)["attention_head_dim"]
        try_attention_backend(args.attention_backend, head_dim, torch.device(device), dtype, backward=False)
    return contract, dtype


def weight_dtype(name: str | None, device: str) -> "torch.dtype":
    """Return the dtype of the weights by the value of --dtype; None is bf16 on a GPU, else fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name or ("fp32" if device == "cpu" else "bf16")]


def load_models(
    args: Namespace, device: str, dtype: "torch.dtype", loras: "Sequence[LoraFile]", **parts: Any
) -> "C2RPipeline":
    """Load the models that the options name, to a device.

    Args:
        args: options, completed from the contract.
        device: where the models run.
        dtype: dtype of the weights.
        loras: LoRAs to add to the backbone.
        parts: parts to replace, or None to leave one out, see `C2RPipeline.from_pretrained`.

    Raises:
        InputError: see `C2RPipeline.from_pretrained`.
    """
    from c2r.models.attention import use_lean_attention
    from c2r.pipeline import C2RPipeline, with_flow_shift

    pipeline = C2RPipeline.from_pretrained(
        args.model,
        torch_dtype=dtype,
        base=args.pretrained_model_name_or_path,
        backbone=args.backbone,
        loras=loras,
        **parts,
    )
    pipeline.scheduler = with_flow_shift(pipeline.scheduler, args.flow_shift)
    if args.attention_backend is not None:
        use_lean_attention(pipeline.transformer, args.attention_backend)
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def generate(
    pipeline: "C2RPipeline",
    args: Namespace,
    length: Length,
    control: "torch.Tensor | None",
    output: object,
    **inputs: Any,
) -> "np.ndarray":
    """Generate one video.

    Args:
        pipeline: from `load_models`.
        args: options, completed from the contract.
        length: from `length_of`.
        control: from `read_padded`; None is a video without control.
        output: name of the video, for messages.
        inputs: prompts or their embeddings, and other arguments of the pipeline.

    Returns:
        (F, H, W, 3) uint8.

    Raises:
        InputError: its frames are not finite.
    """
    import numpy as np
    import torch

    from c2r.pipeline import Sampling

    sampling = Sampling(
        num_inference_steps=args.num_inference_steps,
        guidance=args.guidance,
        guidance_scale=args.guidance_scale,
        control_guidance_scale=args.control_guidance_scale,
        conditioning_scale=args.conditioning_scale,
    )
    latents = pipeline(
        control_video=control,
        num_frames=length.generated,
        height=args.height,
        width=args.width,
        window_frames=args.window_frames,
        window_overlap=args.window_overlap,
        **vars(sampling),
        control_guidance_start=args.control_guidance_start,
        control_guidance_end=args.control_guidance_end,
        generator=torch.Generator().manual_seed(args.seed),  # on CPU: the same noise on every machine
        output_type="latent",
        return_dict=False,
        **inputs,
    )[0]
    chunks = []
    for frames in pipeline.stream_frames(latents):  # (1, f, H, W, 3) in [0, 1]
        if not np.isfinite(frames).all():
            raise InputError(
                f"{output}: not written, its frames are not finite; check --model and its VAE, or give --dtype fp32"
            )
        chunks.append((frames[0] * 255).round().astype(np.uint8))
    return np.concatenate(chunks)[: length.num_frames]


def main(argv: list[str] | None = None):
    """Run the command with these arguments."""
    args = cli.parse(GENERATE, argv)
    check_options(args)
    controls = args.control_video or []
    outputs = output_paths(args.output, max(len(args.prompt), len(controls)), controls)

    from diffusers.utils.torch_utils import get_device

    from c2r.data.video_writer import write_video
    from c2r.models.lora_file import LoraFile
    from c2r.pipeline import encode_prompts

    # 1. Refuse early.
    device = get_device()
    contract, dtype = find_model(args, device, with_control=bool(controls))
    name_controls(args)
    if args.follow_control:
        follow_control(args)
    loras = [LoraFile(path, scale) for path, scale in args.lora or []]
    check_files(args, contract, loras)

    if contract.phase == 2 and not controls:
        logger.info("no --control_video: the backbone generates alone, without the control that was trained")

    # 2. Encode the prompts, then load the other models.
    prompts = [args.negative_prompt or "", *args.prompt]
    negative_embeds, *embeds = encode_prompts(args.pretrained_model_name_or_path, prompts, device, dtype)
    pipeline = load_models(
        args,
        device,
        dtype,
        loras,
        dinov3=args.dinov3 if controls else None,
        tokenizer=None,
        text_encoder=None,
    )

    # 3. Generate.
    for i, output in enumerate(outputs):
        control = controls[i % len(controls)] if controls else None
        length = length_of(args, control)
        windows = pipeline.plan_windows(length.generated, args.window_frames, args.window_overlap)
        if line := describe_windows(windows, pipeline.vae_scale_factor_temporal, contract.num_frames):
            print(line, flush=True)
        frames = generate(
            pipeline,
            args,
            length,
            None if control is None else read_padded(control, length, args.height, args.width),
            output,
            prompt_embeds=embeds[i % len(embeds)],
            negative_prompt_embeds=negative_embeds,
        )
        write_video(output, frames, length.fps)
        print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    cli.run(main)
