"""Turn a coarse video and a prompt into a real-looking video.

    python -m c2r.generate --model outputs/phase2/best --control_video coarse.mp4 --prompt "…" --output out.mp4

--prompt and --control_video may be given several times: models are loaded once, and the videos are written to
out-0.mp4, out-1.mp4 and so on. Without --control_video the backbone generates alone.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

import errno
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from c2r import InputError, cli
from c2r.generation.control import follow_control, length_of, name_controls, read_padded
from c2r.generation.models import check_files, find_model, load_models
from c2r.generation.options import check_options
from c2r.generation.video import generate
from c2r.options import GENERATE

if TYPE_CHECKING:
    from c2r.windows import Window

logger = logging.getLogger("c2r.generate")  # under python -m, __name__ is "__main__"


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


if __name__ == "__main__":
    cli.run(main)
