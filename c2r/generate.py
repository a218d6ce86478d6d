"""Coarse video and prompt in, real-looking video out.

    python -m c2r.generate --model outputs/phase2/best --control_video coarse.mp4 --prompt "…" --output out.mp4

--prompt and --control_video may be given several times: models are loaded once, and the videos are written to
out-0.mp4, out-1.mp4 and so on. Without --control_video the backbone generates alone.
"""

import argparse
import gc
import math
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.torch_utils import empty_device_cache, get_device

from c2r import InputError
from c2r.cli import run
from c2r.data.video import probe, read_window, write_video
from c2r.models.assembly import check_transformer, load_for_generation
from c2r.models.contract import read_contract
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.hub import resolve_model_folder
from c2r.models.parts import load_pipeline_part, max_sequence_length
from c2r.options import PIPELINE_OPTIONS, add_sampling_options, check_sampling_options
from c2r.pipeline import C2RPipeline, with_flow_shift

#: What Wan 2.1 was made for, where neither the options nor the model's c2r.json name a size.
DEFAULT_SIZE = {"height": 480, "width": 832, "num_frames": 81, "fps": 16.0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_parser():
    parser = argparse.ArgumentParser(prog="python -m c2r.generate", description=__doc__.partition("\n")[0])

    group = parser.add_argument_group("models")
    group.add_argument("--model", required=True, help="best/ or final/ of phase 2, or of phase 1 (no control then)")
    group.add_argument("--backbone", help="phase 1 folder the ControlNet was trained on, if it was moved")
    group.add_argument(
        "--pretrained_model_name_or_path", help="Wan pipeline of VAE, text encoder and scheduler; default: as trained"
    )
    group.add_argument("--dinov3", help="default: as trained")
    group.add_argument("--dtype", choices=list(DTYPES), help="of the weights; default: bf16 on a GPU, else fp32")
    group.add_argument("--cpu_offload", action="store_true", help="keep only the model at work on the GPU")
    group.add_argument("--vae_tiling", action="store_true", help="decode in tiles: less memory, more time")

    group = parser.add_argument_group("what to generate")
    group.add_argument("--prompt", action="append", required=True, help="repeatable")
    group.add_argument("--control_video", action="append", help="coarse video, its start is used; repeatable")
    group.add_argument("--output", required=True, help="the .mp4 to write")
    group.add_argument("--negative_prompt", help="default: the empty prompt, as in training")
    group.add_argument("--height", type=int, help="pixels; default, also of the next three: as trained")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--num_frames", type=int, help="frames, a multiple of 4 plus 1")
    group.add_argument("--fps", type=float, help="frames per second, of the output and read from the coarse video")
    group.add_argument("--seed", type=int, default=0, help="each video starts from it anew")

    group = parser.add_argument_group("sampling")
    add_sampling_options(group, num_inference_steps=50)
    group.add_argument(
        "--conditioning_scale", type=float, help="multiplies the control residuals; default: as trained"
    )
    group.add_argument(
        "--control_guidance_start", type=float, default=0.0, help="fraction of the steps at which control starts"
    )
    group.add_argument("--control_guidance_end", type=float, default=1.0, help="and ends")
    group.add_argument("--flow_shift", type=float, help="of the noise levels; default: as trained, else 3")
    return parser


def check_options(args):
    """What can be checked without looking at any file.

    Raises:
        InputError: naming the option.
    """
    for name in ("height", "width"):
        value = getattr(args, name)
        # VAE 8 × patch 2, and DINOv3's patch.
        if value is not None and (value < 16 or value % 16):
            raise InputError(f"--{name} is {value}: it must be a multiple of 16")
    if args.num_frames is not None and (args.num_frames < 1 or args.num_frames % 4 != 1):
        raise InputError(f"--num_frames is {args.num_frames}: it must be a multiple of 4 plus 1, like 81")
    check_sampling_options(args)
    for name in ("fps", "flow_shift"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} is {value}: it must be a positive number")
    if args.conditioning_scale is not None and not 0 <= args.conditioning_scale < math.inf:
        raise InputError(f"--conditioning_scale is {args.conditioning_scale}: it must be a number of at least 0")
    if not 0 <= args.control_guidance_start < args.control_guidance_end <= 1:
        raise InputError(
            f"--control_guidance_start {args.control_guidance_start} --control_guidance_end "
            f"{args.control_guidance_end}: they must be in ascending order in [0, 1]"
        )
    counts = {len(args.prompt), len(args.control_video or [None])}
    if len(counts - {1}) > 1:
        raise InputError(
            f"--control_video is given {len(args.control_video)} times, --prompt {len(args.prompt)} times: "
            "give equally many, or one of either for all"
        )
    if args.cpu_offload and get_device() == "cpu":
        raise InputError("--cpu_offload: there is no GPU to offload from; leave it out")


def output_paths(output, count):
    """`output` itself for one video, else numbered from 0: out-0.mp4, out-1.mp4, …

    Raises:
        InputError: if it is no .mp4, or its folder cannot be made.
    """
    output = Path(output)
    if output.suffix.lower() != ".mp4":
        raise InputError(f"--output {output}: only .mp4 is written; name the file so")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: its folder cannot be made ({error.strerror})") from error
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def complete_options(args, contract):
    """Fill in what the options leave to the model's contract, and check the files they name: headers only.

    Raises:
        InputError: a file or model folder that is missing or does not fit.
    """
    for name, default in DEFAULT_SIZE.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(contract, name) or default)
    args.flow_shift = args.flow_shift or contract.flow_shift or 3.0
    if args.conditioning_scale is None:
        args.conditioning_scale = 1.0 if contract.conditioning_scale is None else contract.conditioning_scale
    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or contract.base_model
    args.dinov3 = args.dinov3 or contract.dinov3
    if contract.phase == 1 and args.control_video:
        raise InputError(f"--model {args.model}: phase 1 has no control; leave --control_video out, or give phase 2")
    for path in args.control_video or []:
        available = probe(path).frames_at(args.fps)
        if available < args.num_frames:
            raise InputError(
                f"{path}: gives {available} frames at {args.fps:g} fps, but --num_frames is {args.num_frames}; "
                "give a longer video, or lower --num_frames"
            )
    if contract.phase == 2:
        check_transformer(args.backbone or contract.backbone, contract.base_model)
    if args.control_video:
        resolve_model_folder(args.dinov3)
    # Last: of all that may have to be downloaded, the text encoder is the largest.
    resolve_model_folder(args.pretrained_model_name_or_path, ["tokenizer", "text_encoder", "vae", "scheduler"])


def read_control(args, path):
    """The start of a coarse video at the asked rate, resized and cropped as for training: (F, 3, H, W) in [0, 1]."""
    frames = read_window(path, 0.0, args.num_frames, args.fps, args.height, args.width)
    return torch.as_tensor(frames).float() / 255


@torch.no_grad()
def encode_prompts(args, device, dtype):
    """Encode all prompts, then give the text encoder's memory back: it is larger than Wan 1.3B.

    Returns:
        list of (prompt_embeds, negative_prompt_embeds), (1, L, D_text) each, on CPU; one per prompt.
    """
    source = args.pretrained_model_name_or_path
    tokenizer = load_pipeline_part(source, "tokenizer")
    text_encoder = load_pipeline_part(source, "text_encoder", dtype).to(device)
    pipeline = C2RPipeline(tokenizer, text_encoder, vae=None, scheduler=None)
    length = max_sequence_length(tokenizer)
    negative, *prompts = (
        pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=device)[
            0
        ].cpu()
        for prompt in [args.negative_prompt or "", *args.prompt]
    )
    del pipeline, text_encoder
    gc.collect()
    empty_device_cache()
    return [(prompt_embeds, negative) for prompt_embeds in prompts]


def load_pipeline(args, device, dtype):
    """The pipeline of everything but the text encoder, on the device or offloaded from it.

    Raises:
        InputError: as `load_for_generation`.
    """
    transformer, _ = load_for_generation(args.model, args.backbone, dtype)
    dinov3 = DINOv3FeatureExtractor.from_pretrained(args.dinov3, dtype) if args.control_video else None
    source = args.pretrained_model_name_or_path
    pipeline = C2RPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=load_pipeline_part(source, "vae", torch.float32),  # as Wan's own examples: it costs little
        scheduler=with_flow_shift(load_pipeline_part(source, "scheduler"), args.flow_shift),
        transformer=transformer,
        dinov3=dinov3,
    )
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_options(args)
    count = max(len(args.prompt), len(args.control_video or []))
    outputs = output_paths(args.output, count)
    for path in args.control_video or []:
        if Path(path).resolve() in [output.resolve() for output in outputs]:
            raise InputError(f"--output {args.output}: would overwrite --control_video {path}; choose another name")
    contract = read_contract(args.model)
    complete_options(args, contract)

    device = get_device()
    dtype = DTYPES[args.dtype or ("fp32" if device == "cpu" else "bf16")]
    embeds = encode_prompts(args, device, dtype)
    pipeline = load_pipeline(args, device, dtype)
    for i, output in enumerate(outputs):
        control_video = None
        if args.control_video:
            control_video = read_control(args, args.control_video[i % len(args.control_video)])
        prompt_embeds, negative_prompt_embeds = embeds[i % len(embeds)]
        video = pipeline(
            control_video=control_video,
            **{name: getattr(args, name) for name in PIPELINE_OPTIONS},
            control_guidance_start=args.control_guidance_start,
            control_guidance_end=args.control_guidance_end,
            generator=torch.Generator().manual_seed(args.seed),  # on CPU: the same noise on every machine
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        ).frames[0]  # (F, H, W, 3) in [0, 1]
        write_video(output, (video * 255).round().astype(np.uint8), args.fps)
        print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    run(main)
