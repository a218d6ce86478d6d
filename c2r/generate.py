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
from pathlib import Path
from typing import TYPE_CHECKING

from c2r import InputError, cli
from c2r.options import GENERATE

logger = logging.getLogger("c2r.generate")  # under python -m, __name__ is "__main__"

if TYPE_CHECKING:
    from c2r.models.contract import PhaseContract
    from c2r.models.lora import LoraFile


def name_controls(args: Namespace):
    """Check that the coarse videos exist; name image sequences by pattern and rate. Changes `args` in place.

    Raises:
        InputError: one is missing or incomplete.
    """
    from c2r.data.control_video import name_control

    for i, path in enumerate(args.control_video or []):
        try:
            args.control_video[i] = name_control(path, args.sequence_fps or args.fps)
        except InputError as error:
            raise InputError(f"--control_video {error}") from None


def check_options(args: Namespace):
    """Raise InputError for options that do not fit each other."""
    if not args.control_guidance_start < args.control_guidance_end:
        raise InputError(
            f"--control_guidance_start {args.control_guidance_start}: not below --control_guidance_end "
            f"{args.control_guidance_end}; lower it, or raise the end"
        )
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
        InputError: the contract has a value that the option would refuse.
    """
    from c2r.models.contract import DEFAULT_FORMAT

    for name in (*DEFAULT_FORMAT, "flow_shift", "conditioning_scale"):
        value = getattr(contract, name)
        if getattr(args, name) is None and value is not None:
            try:
                setattr(args, name, GENERATE.options[name].type(str(value)))
            except ValueError as error:
                raise InputError(f"--model {args.model}: its contract has {name} {value}: {error}") from None
    for name, default in (DEFAULT_FORMAT | {"flow_shift": 3.0, "conditioning_scale": 1.0}).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
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
        if info.is_image and args.num_frames > 1:
            raise InputError(
                f"--control_video {path}: one picture, but --num_frames is {args.num_frames}; give a video, or the "
                "folder of an image sequence"
            )
        available = info.frames_at(args.fps)
        if available < args.num_frames:
            raise InputError(
                f"{path}: gives {available} frames at {args.fps:g} fps, but --num_frames is {args.num_frames}; "
                "give a longer video, or lower --num_frames"
            )
    check_model(args.model, contract, args.backbone, loras)
    if args.control_video:
        check_dinov3(args.dinov3, [(args.height, args.width)])
    # Last, because the text encoder is the largest download.
    check_pipeline_parts(args.pretrained_model_name_or_path, [*ENCODERS, "scheduler"])


def main(argv: list[str] | None = None):
    """Run the command with these arguments."""
    args = cli.parse(GENERATE, argv)
    check_options(args)
    controls = args.control_video or []
    outputs = output_paths(args.output, max(len(args.prompt), len(controls)), controls)

    import numpy as np
    import torch
    from diffusers.utils.torch_utils import get_device

    from c2r.data.video_writer import write_video
    from c2r.models.assembly import read_transformer_config
    from c2r.models.attention import try_attention_backend, use_lean_attention
    from c2r.models.contract import fetch_model, read_contract, with_moved_models
    from c2r.models.lora import LoraFile
    from c2r.pipeline import C2RPipeline, Sampling, encode_prompts, with_flow_shift

    # 1. Refuse early.
    device = get_device()
    if args.cpu_offload and device == "cpu":
        raise InputError("--cpu_offload: there is no GPU to offload from; leave it out")
    model = fetch_model(args.model)
    moved = {"base_model": args.pretrained_model_name_or_path, "backbone": args.backbone}
    moved |= {"dinov3": args.dinov3} if controls else {}
    contract = with_moved_models(read_contract(model), args.model, **moved)
    args.model = str(model)
    complete_options(args, contract)
    name_controls(args)
    if args.follow_control:
        follow_control(args)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype or ("fp32" if device == "cpu" else "bf16")]
    if args.attention_backend is not None:
        has_backbone = contract.phase == 2 or contract.lora_rank is not None
        config = read_transformer_config(args.backbone if has_backbone else args.model, contract.base_model)
        head_dim = config["attention_head_dim"]
        try_attention_backend(args.attention_backend, head_dim, torch.device(device), dtype, backward=False)
    loras = [LoraFile(path, scale) for path, scale in args.lora or []]
    check_files(args, contract, loras)

    # 2. Encode the prompts, then load the other models.
    prompts = [args.negative_prompt or "", *args.prompt]
    negative_embeds, *embeds = encode_prompts(args.pretrained_model_name_or_path, prompts, device, dtype)
    pipeline = C2RPipeline.from_pretrained(
        args.model,
        torch_dtype=dtype,
        base=args.pretrained_model_name_or_path,
        backbone=args.backbone,
        dinov3=args.dinov3 if controls else None,
        loras=loras,
        tokenizer=None,
        text_encoder=None,
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

    # 3. Generate.
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    sampling = Sampling(
        num_inference_steps=args.num_inference_steps,
        guidance=args.guidance,
        guidance_scale=args.guidance_scale,
        control_guidance_scale=args.control_guidance_scale,
        conditioning_scale=args.conditioning_scale,
    )
    for i, output in enumerate(outputs):
        video = pipeline(
            control_video=controls[i % len(controls)] if controls else None,
            fps=args.fps,
            **size,
            **vars(sampling),
            control_guidance_start=args.control_guidance_start,
            control_guidance_end=args.control_guidance_end,
            generator=torch.Generator().manual_seed(args.seed),  # on CPU: the same noise on every machine
            prompt_embeds=embeds[i % len(embeds)],
            negative_prompt_embeds=negative_embeds,
            return_dict=False,
        )[0][0]  # (F, H, W, 3) in [0, 1]
        if not np.isfinite(video).all():
            raise InputError(
                f"{output}: not written, its frames are not finite; check --model and its VAE, or give --dtype fp32"
            )
        write_video(output, video, args.fps)
        print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    cli.run(main)
