"""Try a model in the browser: coarse video and prompt in, realistic video out.

    python -m c2r.app outputs/phase2/best

The fields of the page make a command line of `c2r.generate`, which checks it as its own; the page shows that command.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

import errno
import html
import logging
import os
import re
import shlex
import shutil
import socket
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2r import InputError, cli
from c2r import generate as generation
from c2r.generate import (
    Length,
    check_files,
    check_options,
    complete_options,
    follow_control,
    length_of,
    load_models,
    name_controls,
    read_padded,
)
from c2r.options import APP, GENERATE
from c2r.options.shared import GUIDANCE_SCALES

if TYPE_CHECKING:
    import gradio
    import numpy as np
    import torch

    from c2r.models.contract import PhaseContract
    from c2r.pipeline import C2RPipeline

logger = logging.getLogger("c2r.app")  # under python -m, __name__ is "__main__"

#: Addresses that only this machine reaches.
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
#: Limits of an upload, beside --max_upload_mb: seconds of a video, pixels of a frame, pictures of a sequence. Only the
#: frames of one clip are kept in memory.
MAX_SECONDS, MAX_FRAME_PIXELS, MAX_PICTURES = 600, 4096 * 4096, 5000
#: Limits of a job: each bounds the time for which the others in the queue wait.
MAX_STEPS, MAX_SWEEP, MAX_QUEUE = 100, 9, 8
#: Width of a sweep's grid in pixels; wider videos are scaled down to fit.
GRID_WIDTH = 1920
#: Seconds between two searches for uploads and videos to delete, and their age then.
DELETE_FILES = (3600, 24 * 3600)

#: Labels of the fields by the options of `c2r.generate` that they set. Messages about an option name its field.
LABELS = {
    "control_video": "Coarse video",
    "sequence_fps": "Pictures per second",
    "follow_control": "Keep the coarse video's shape",
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "num_frames": "Frames",
    "seed": "Seed",
    "num_inference_steps": "Steps",
    "conditioning_scale": "Conditioning scale",
    "guidance": "Guidance",
    "guidance_scale": "Text guidance scale",
    "control_guidance_scale": "Control guidance scale",
    "control_guidance_start": "Control starts at",
    "control_guidance_end": "Control ends at",
}

#: Seeks, plays and pauses control and output together. Its own seek gives an event too, which it ignores.
PLAY_TOGETHER = """
let seeking = 0;
for (const kind of ["loadeddata", "seeked", "play", "pause"])
    document.addEventListener(kind, ({target}) => {
        const pair = [...document.querySelectorAll("#control video, #output video")];
        const other = pair[1 - pair.indexOf(target)];
        if (pair.length < 2 || !pair.includes(target) || performance.now() - seeking < 300) return;
        if (kind == "pause" && !target.ended) other.pause();
        else if (kind == "play" && other.paused) other.play();
        if (kind != "play" && Math.abs(other.currentTime - target.currentTime) > 0.05) {
            seeking = performance.now();
            other.currentTime = target.currentTime;
        }
    }, true);  // media events do not bubble
"""

#: Called with (steps done, all steps, description); it may raise `Cancelled`.
Report = Callable[[int, int, str], None]


class Cancelled(Exception):
    """Raised between two steps of a job that its user has cancelled."""


# ---------------------------------------------------------------------------------------------------- the loaded model


@dataclass
class Panel:
    """A loaded model, and what all visitors of its page share."""

    args: Namespace  #: options of the command, completed from the contract
    given: dict[str, Any]  #: those of them that `c2r.generate` has too, as they were given
    contract: "PhaseContract"
    pipeline: "C2RPipeline"
    folder: Path  #: for uploads and videos; removed at the end
    lock: threading.Lock = field(default_factory=threading.Lock)  #: held by the job that runs
    jobs: dict[threading.Event, str] = field(default_factory=dict)  #: {set to cancel a job: session of its user}

    @property
    def has_control(self) -> bool:
        return self.contract.phase == 2

    @contextmanager
    def job(self, session: str) -> Iterator[threading.Event]:
        """Run the block when no other job runs; it gives an event that `cancel` sets."""
        cancelled = threading.Event()
        self.jobs[cancelled] = session
        try:
            with self.lock:
                yield cancelled
        finally:
            del self.jobs[cancelled]

    def cancel(self, session: str) -> None:
        """Cancel the jobs of one user: each ends after the step that runs."""
        for cancelled, owner in list(self.jobs.items()):
            if owner == session:
                cancelled.set()

    def describe(self) -> str:
        """Return a line about the model."""
        args = self.args
        return (
            f"{args.model}, phase {self.contract.phase}, step {self.contract.step:,}: {args.height}x{args.width}, "
            f"{args.num_frames} frames at {args.fps:g} per second ({args.num_frames / args.fps:.1f} s)"
        )


def check(args: Namespace) -> "PhaseContract":
    """Check model and options as `c2r.generate` does, reading headers only. Completes `args` from the contract.

    Raises:
        InputError: a model is missing or does not fit, or an option does not fit this machine.
    """
    from diffusers.utils.torch_utils import get_device

    from c2r.models.contract import fetch_model, read_contract, with_moved_models
    from c2r.models.dinov3 import check_dinov3
    from c2r.models.lora import LoraFile, require_peft

    if args.cpu_offload and get_device() == "cpu":
        raise InputError("--cpu_offload: there is no GPU to offload from; leave it out")
    folder = fetch_model(args.model)
    moved = {"base_model": args.pretrained_model_name_or_path, "backbone": args.backbone, "dinov3": args.dinov3}
    contract = with_moved_models(read_contract(folder), args.model, **moved)
    args.model = str(folder)
    args.conditioning_scale = args.control_video = None
    complete_options(args, contract)
    check_files(args, contract, [LoraFile(path, scale) for path, scale in args.lora or []])
    if args.lora_dir is not None:
        require_peft()
        if not find_loras(args.lora_dir):
            raise InputError(f"--lora_dir {args.lora_dir}: holds no .safetensors files; give the folder of LoRAs")
    if contract.phase == 2:
        check_dinov3(args.dinov3, [(args.height, args.width)])
    return contract


def load(args: Namespace, given: dict[str, Any], contract: "PhaseContract", folder: Path) -> Panel:
    """Load everything that a video needs; unlike in `c2r.generate`, the text encoder stays loaded.

    Raises:
        InputError: see `C2RPipeline.from_pretrained`; or --attention_backend does not work on this machine.
    """
    import torch
    from diffusers.utils.torch_utils import get_device

    from c2r.models.attention import try_attention_backend
    from c2r.models.lora import LoraFile
    from c2r.models.parts import load_text_encoder

    device = get_device()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype or ("fp32" if device == "cpu" else "bf16")]
    parts: dict[str, Any] = {"dinov3": args.dinov3} if contract.phase == 2 else {}
    if not args.cpu_offload:
        parts["text_encoder"] = None
    loras = [LoraFile(path, scale) for path, scale in args.lora or []]
    pipeline = load_models(args, device, dtype, loras, **parts)
    if not args.cpu_offload:
        # Last: where it does not fit beside the others, its blocks stay on the CPU.
        text_encoder = load_text_encoder(args.pretrained_model_name_or_path, dtype, torch.device(device))
        pipeline.register_modules(text_encoder=text_encoder)
    if args.attention_backend is not None:
        head_dim = pipeline.transformer.config.attention_head_dim
        try_attention_backend(args.attention_backend, head_dim, torch.device(device), dtype, backward=False)
    pipeline.set_progress_bar_config(disable=True)  # the page shows it
    return Panel(args, given, contract, pipeline, folder)


# --------------------------------------------------------------------------------------------------------------- a job


@dataclass
class Job:
    """One video to generate: checked options of `c2r.generate`, and its control."""

    args: Namespace
    length: Length
    control: "torch.Tensor | None"  #: (F, 3, H, W) in [0, 1]
    command: str  #: the same as a command of `c2r.generate`
    lora: tuple[str, float] | None  #: path and scale of the LoRA that was chosen on the page


def prepare_job(
    panel: Panel, fields: dict[str, Any], files: Sequence[str] | None, lora: tuple[str, float] | None = None
) -> Job:
    """Check the fields of the page and read the coarse video.

    Args:
        panel: the loaded model.
        fields: {option of `c2r.generate`: value}; None is the option's default.
        files: paths of the upload: one video, or the pictures of a sequence; None is a video without control.
        lora: path and scale of a LoRA to add to the backbone, beside those of the command line.

    Raises:
        InputError: a value is out of range, or the upload is missing, beyond the limits or cannot be decoded.
    """
    from c2r.models.lora import LoraFile

    options = panel.given | fields
    if options["guidance_scale"] == GUIDANCE_SCALES.get(options["guidance"]):
        options["guidance_scale"] = None  # the default, which depends on the kind of guidance
    if options.get("sequence_fps") == panel.args.fps:
        options["sequence_fps"] = None
    if lora is not None:
        options["lora"] = [*(options["lora"] or []), lora]
    options = {name: value for name, value in options.items() if value != getattr(panel.contract, name, None)}
    shown = options | {"output": "out.mp4"}
    with tempfile.TemporaryDirectory(dir=panel.folder) as folder:
        if panel.has_control:
            options["control_video"], shown["control_video"] = place_upload(panel, files, Path(folder))
        args = cli.parse(GENERATE, command_words(shown | options))
        check_options(args)
        complete_options(args, panel.contract)
        if args.num_frames > panel.args.num_frames:
            raise InputError(f"--num_frames {args.num_frames}: more than {panel.args.num_frames}; lower it")
        name_controls(args)
        path = args.control_video[0] if panel.has_control else None
        if path is not None:
            require_within_limits(path)
        if args.follow_control:
            follow_control(args)
        check_files(args, panel.contract, [LoraFile(file, scale) for file, scale in args.lora or []])
        length = length_of(args, path)
        control = None if path is None else read_padded(path, length, args.height, args.width)
    return Job(args, length, control, shlex.join(["python", "-m", "c2r.generate", *command_words(shown)]), lora)


def command_words(options: dict[str, Any]) -> list[str]:
    """Return the arguments of a `c2r.generate` command with these options, without those at their defaults."""
    words = []
    for name, value in options.items():
        if name == "lora":
            words += [word for path, scale in value or [] for word in ("--lora", f"{path}:{scale:g}")]
        elif value is True:
            words.append(f"--{name}")
        elif value is None or value is False or value == GENERATE.options[name].default:
            continue
        elif value != "" or name == "prompt":
            # A value that begins with a dash would be read as an option.
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return words


def find_loras(folder: str) -> list[str]:
    """Return the names of the .safetensors files in a folder."""
    return sorted(path.name for path in Path(folder).glob("*.safetensors"))


def chosen_lora(panel: Panel, name: str | None, scale: float) -> tuple[str, float] | None:
    """Return the path and scale of a LoRA chosen by name, which is never outside --lora_dir; None for none.

    Raises:
        InputError: there is no such LoRA.
    """
    if not name:
        return None
    if name not in find_loras(panel.args.lora_dir):
        raise InputError(f"LoRA {name}: not in --lora_dir; choose another")
    return os.path.join(panel.args.lora_dir, name), scale


def place_upload(panel: Panel, files: Sequence[str] | None, folder: Path) -> tuple[str, str]:
    """Return the path of an upload, and its name for a command; pictures are first put into a new folder.

    Raises:
        InputError: there is none, it is too large, or its files are not the pictures of one sequence.
    """
    from c2r.data.sequences import SUFFIXES

    if not files:
        raise InputError("--control_video: missing; upload a video, or the numbered pictures of a sequence")
    size = sum(os.path.getsize(file) for file in files)
    if size > panel.args.max_upload_mb * 10**6:
        raise InputError(
            f"--control_video: {size / 1e6:.0f} MB, above {panel.args.max_upload_mb} MB; scale it down, or restart "
            "with a higher --max_upload_mb"
        )
    if len(files) == 1:
        return files[0], Path(files[0]).name
    if len(files) > MAX_PICTURES:
        raise InputError(f"--control_video: {len(files)} files, above {MAX_PICTURES:,}; upload fewer")
    for file in files:
        if not file.lower().endswith(SUFFIXES):
            raise InputError(
                f"--control_video {Path(file).name}: is no picture, and only the pictures of a sequence are several "
                "files; remove the others, or this one"
            )
    sequence = folder / "upload"
    sequence.mkdir()
    for file in files:
        picture = sequence / Path(file).name
        if picture.exists():
            raise InputError(f"--control_video {picture.name}: uploaded twice; remove one of the two")
        os.link(file, picture)
    return str(sequence), "FOLDER"


def require_within_limits(path: str) -> None:
    """Raise InputError for a video that is too long or too large."""
    from c2r.data.video import probe

    info = probe(path)
    width = round(info.height * info.aspect)
    if info.duration > MAX_SECONDS:
        raise InputError(f"--control_video {path}: {info.duration:.0f} s long, above {MAX_SECONDS} s; cut it")
    if info.height * width > MAX_FRAME_PIXELS:
        raise InputError(
            f"--control_video {path}: {width}x{info.height} pixels, above {MAX_FRAME_PIXELS:,}; scale it down"
        )


def generate(panel: Panel, job: Job, report: Report, **changed: float) -> "np.ndarray":
    """Generate one video, (F, H, W, 3) uint8.

    Args:
        panel: the loaded model.
        job: see `prepare_job`.
        report: called before the first step and after each; if it raises, no further step runs.
        changed: options with other values than the job's.

    Raises:
        InputError: see `c2r.generate.generate`.
    """
    args = Namespace(**vars(job.args) | changed)
    steps = args.num_inference_steps

    def on_step_end(pipeline, step, timestep, tensors):
        report(step + 1, steps, "denoising" if step + 1 < steps else "decoding")
        return {}

    report(0, steps, "denoising")
    inputs = {"prompt": args.prompt[0], "negative_prompt": args.negative_prompt, "callback_on_step_end": on_step_end}
    try:
        with added_lora(panel, job.lora):
            return generation.generate(panel.pipeline, args, job.length, job.control, "the video", **inputs)
    except Cancelled:
        panel.pipeline.maybe_free_model_hooks()  # --cpu_offload: otherwise the next job finds a model on the GPU
        raise


@contextmanager
def added_lora(panel: Panel, lora: tuple[str, float] | None) -> Iterator[None]:
    """Add a LoRA to the backbone while the block runs."""
    if lora is None:
        yield
        return
    from c2r.files import library_errors_as_input

    path, scale = lora
    folder, name = os.path.split(path)
    try:
        with library_errors_as_input(path):
            panel.pipeline.load_lora_weights(folder, weight_name=name, use_safetensors=True, adapter_name="page")
            panel.pipeline.set_adapters("page", scale)
        yield
    finally:
        panel.pipeline.unload_lora_weights()


def parse_scales(text: str) -> list[float]:
    """Return the conditioning scales of a sweep, written as "0, 0.5, 1".

    Raises:
        InputError: there are none, too many, or one is no number of at least 0.
    """
    scales = []
    for word in re.split(r"[\s,;]+", text.strip()):
        try:
            scales.append(GENERATE.options["conditioning_scale"].type(word))
        except ValueError as error:
            raise InputError(f"Scales {text}: {word or 'nothing'} is {error}") from None
    if len(scales) > MAX_SWEEP:
        raise InputError(f"Scales {text}: {len(scales)} of them; give at most {MAX_SWEEP}")
    return scales


def sweep(panel: Panel, job: Job, scales: Sequence[float], report: Report) -> "np.ndarray":
    """Generate the same video with several conditioning scales; return them beside the control as one labelled grid.

    Returns:
        (F, H', W', 3) uint8.
    """
    columns = grid_columns(len(scales) + 1)
    cells = [labelled(control_pixels(job), "control", columns)]
    all_steps = job.args.num_inference_steps * len(scales)
    for number, scale in enumerate(scales):

        def report_of_all(step, steps, text, number=number, scale=scale):
            report(number * steps + step, all_steps, f"{text}, scale {scale:g}")

        frames = generate(panel, job, report_of_all, conditioning_scale=scale)
        cells.append(labelled(frames, f"scale {scale:g}", columns))
    return arrange(cells, columns)


def control_pixels(job: Job) -> "np.ndarray":
    """Return the control of a job as frames (F, H, W, 3) uint8, without those that are repeated at its end."""
    return (job.control[: job.length.num_frames].permute(0, 2, 3, 1) * 255).round().byte().numpy()


def grid_columns(count: int) -> int:
    """Return the number of columns of a grid that is about as wide as it is high, in cells."""
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)


def labelled(frames: "np.ndarray", label: str, columns: int) -> "np.ndarray":
    """Scale frames (F, H, W, 3) down to a cell of a grid, and write a label above; sizes stay even, as H.264 needs."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    height, width = frames.shape[1:3]
    shrink = min(1, GRID_WIDTH / (columns * width))
    height, width = (2 * round(size * shrink / 2) for size in (height, width))
    title = 2 * max(8, height // 24)
    cell = Image.new("RGB", (width, title), "white")
    font = ImageFont.load_default(title * 0.75)
    ImageDraw.Draw(cell).text((width / 2, title / 2), label, "black", font, anchor="mm")
    strip = np.broadcast_to(np.asarray(cell), (len(frames), title, width, 3))
    resized = np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])
    return np.concatenate([strip, resized], axis=1)


def arrange(cells: Sequence["np.ndarray"], columns: int) -> "np.ndarray":
    """Arrange videos (F, h, w, 3) row by row in a grid; places without a video are white."""
    import numpy as np

    white = np.full_like(cells[0], 255)
    rows = [[*cells[i : i + columns]] for i in range(0, len(cells), columns)]
    rows[-1] += [white] * (columns - len(rows[-1]))
    return np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)


def save(panel: Panel, kind: str, name: str, frames: "np.ndarray", fps: float) -> str:
    """Write a video for the page to show, and delete the last one of its kind: the page has a copy of its own.

    Each kind is written by one kind of job, of which one runs at a time.
    """
    from c2r.data.video_writer import write_video

    shutil.rmtree(panel.folder / kind, ignore_errors=True)
    path = panel.folder / kind / name
    write_video(path, frames, fps)
    return str(path)


def show_control(panel: Panel, job: Job) -> tuple[str, str]:
    """Return the path of a video of the control, as the model sees it, and a line about it."""
    args = job.args
    line = (
        f"Control: the first {args.num_frames / args.fps:.2f} s of the coarse video, {args.num_frames} frames of "
        f"{args.height}x{args.width}"
    )
    return save(panel, "control", "control.mp4", control_pixels(job), args.fps), line


def generate_one(panel: Panel, job: Job, report: Report) -> tuple[str, str, str]:
    """Generate one video; return its path, a line about it, and the same as a command."""
    start = time.monotonic()
    frames = generate(panel, job, report)
    path = save(panel, "output", f"c2r-seed{job.args.seed}.mp4", frames, job.args.fps)
    return path, _summary(job, "Output", start), job.command


def generate_grid(panel: Panel, job: Job, scales: str, report: Report) -> tuple[str, str]:
    """Generate a video for each conditioning scale; return the path of their grid and a line about it."""
    start = time.monotonic()
    frames = sweep(panel, job, parse_scales(scales), report)
    path = save(panel, "grid", f"c2r-seed{job.args.seed}-scales.mp4", frames, job.args.fps)
    return path, _summary(job, "Comparison", start)


def _summary(job, what, start):
    line = f"{what}: seed {job.args.seed}, {job.args.num_inference_steps} steps, {time.monotonic() - start:.1f} s"
    logger.info(line)
    return line


def plain_message(panel: Panel, message: object) -> str:
    """Return a message in the words of the page: labels instead of options, no folders of uploads."""
    text = re.sub(rf"{re.escape(str(panel.folder))}/(\S*/)?", "", str(message))
    for remedy in (", or remove its row", "; --num_frames all takes what there is"):  # which the page does not have
        text = text.removesuffix(remedy)
    return re.sub(r"--(\w+)", lambda option: LABELS.get(option[1], option[0]), text)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings that this thread logs, to show them on the page."""
    messages: list[str] = []
    thread = threading.get_ident()

    class Collector(logging.Handler):
        def emit(self, record):
            if record.thread == thread:
                messages.append(self.format(record))

    handler = Collector(logging.WARNING)
    package = logging.getLogger("c2r")
    package.addHandler(handler)
    try:
        yield messages
    finally:
        package.removeHandler(handler)


# ------------------------------------------------------------------------------------------------------------ the page


def build_page(panel: Panel) -> "gradio.Blocks":
    """Lay out the page and connect its buttons to the functions above."""
    import gradio as gr

    args, control, defaults = panel.args, panel.has_control, GENERATE.options
    fields: dict[str, Any] = {}  # by the options of `c2r.generate` that they set

    def add(kind, name, *values, **keywords):
        fields[name] = kind(*values, label=LABELS[name], **keywords)

    player = partial(gr.Video, show_label=False, loop=True, autoplay=True, interactive=False)
    half = {"min_width": 140}  # two in a row, on a phone too
    with gr.Blocks(title="C2R", analytics_enabled=False, delete_cache=DELETE_FILES) as page:
        gr.Markdown(f"## Coarse video to real-looking video\n{panel.describe()}")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                label = f"{LABELS['control_video']} or picture sequence"
                upload = gr.File(label=label, file_count="multiple", height=140, visible=control, elem_id="upload")
                add(gr.Textbox, "prompt", lines=3, max_length=2000, placeholder="a rainy street at dusk, brick houses")
                add(gr.Textbox, "negative_prompt", max_length=2000, placeholder="Optional: what to keep away from.")
                if control:
                    note = "Strength of the control; 0 ignores the coarse video."
                    add(gr.Slider, "conditioning_scale", 0, 2, args.conditioning_scale, step=0.05, info=note)
                steps, note = defaults["num_inference_steps"].default, "Fewer are faster, more are finer."
                add(gr.Slider, "num_inference_steps", 1, MAX_STEPS, steps, step=1, info=note)
                with gr.Row():
                    note = f"{args.fps:g} per second."
                    add(gr.Slider, "num_frames", 1, args.num_frames, args.num_frames, step=4, info=note, **half)
                    note = "Same seed, same video."
                    add(gr.Number, "seed", 0, precision=0, minimum=0, info=note, **half)
                with gr.Accordion("Guidance", open=False):
                    note = "apg: adaptive projected guidance; cfg: classifier-free guidance."
                    kind = defaults["guidance"].default
                    add(gr.Radio, "guidance", list(GUIDANCE_SCALES), value=kind, info=note)
                    note = "How strictly to follow the prompt; 1 is off."
                    add(gr.Slider, "guidance_scale", 0, 20, GUIDANCE_SCALES[kind], step=0.5, info=note)
                    if control:
                        note = "How strictly to follow the coarse video; 1 is off, and faster."
                        add(gr.Slider, "control_guidance_scale", 0, 5, 1, step=0.1, info=note)
                        note = "Share of the steps."
                        with gr.Row():
                            add(gr.Slider, "control_guidance_start", 0, 1, 0, step=0.05, info=note, **half)
                            add(gr.Slider, "control_guidance_end", 0, 1, 1, step=0.05, info=note, **half)
                with gr.Accordion("LoRA", open=False, visible=args.lora_dir is not None):
                    choices = [("none", ""), *((name, name) for name in find_loras(args.lora_dir or os.devnull))]
                    lora = gr.Dropdown(choices, value="", label="LoRA", info=f"Files of {args.lora_dir}.")
                    lora_scale = gr.Slider(-1, 2, 1, step=0.05, label="LoRA scale")
                if control:
                    with gr.Accordion("Shape and rate of the coarse video", open=False):
                        note = f"With as many pixels as {args.height}x{args.width}. Otherwise its edges are cropped."
                        add(gr.Checkbox, "follow_control", info=note)
                        note = "Rate of uploaded pictures. The output has the model's rate."
                        add(gr.Number, "sequence_fps", args.fps, info=note)
            with gr.Column(scale=7, min_width=320):
                with gr.Row():
                    generate_button = gr.Button("Generate", variant="primary", scale=3)
                    cancel_button = gr.Button("Cancel", scale=1, min_width=100)
                with gr.Row():
                    with gr.Column(min_width=320, visible=control):
                        gr.Markdown("**Control**, as the model sees it")
                        control_video = player(elem_id="control")
                    with gr.Column(min_width=320):
                        gr.Markdown("**Output**")
                        output_video = player(elem_id="output")
                status = gr.Markdown()
                command = gr.Textbox(
                    label="The same as a command", buttons=["copy"], max_lines=8, visible=False, elem_id="command"
                )
                with gr.Column(visible=control):
                    gr.Markdown("**Comparison** of conditioning scales, with the same seed")
                    with gr.Row():
                        scales = gr.Textbox(
                            "0, 0.5, 1, 1.5", label="Conditioning scales", container=False, scale=3, min_width=140
                        )
                        sweep_button = gr.Button("Generate a video for each", scale=2, min_width=100)
                    grid_video = player(elem_id="grid")
                    grid_status = gr.Markdown()

        @contextmanager
        def messages():
            """Show bad input as a message of one line."""
            import torch

            try:
                yield
            except Cancelled:  # gradio no longer waits for it, and would print a traceback
                raise gr.Error("cancelled", visible=False, print_exception=False) from None
            except InputError as error:
                text = plain_message(panel, error)
            except torch.OutOfMemoryError:
                text = "out of memory; restart with --cpu_offload, --vae_tiling or a smaller --num_frames"
            else:
                return
            raise gr.Error(html.escape(text, quote=False), duration=30, print_exception=False)

        def answer(function, values, *details):
            """Call a function of a job; add the warnings that it logs to the line that it returns."""
            with messages(), collected_warnings() as warnings:
                options = {name: values[field] for name, field in fields.items()}
                added = chosen_lora(panel, values[lora], values[lora_scale])
                path, line, *rest = function(panel, prepare_job(panel, options, values[upload], added), *details)
                lines = [line, *(f"⚠ {plain_message(panel, warning)}" for warning in warnings)]
                return path, html.escape("\n\n".join(lines), quote=False), *rest

        tracked = gr.Progress()  # gradio gives its own to a function that has it as a default

        def on_upload(values):
            return answer(show_control, values) if values[upload] else (None, "")

        def on_generate(values, request: gr.Request, progress=tracked):
            with panel.job(request.session_hash) as cancelled:
                path, line, text = answer(generate_one, values, reporter(progress, cancelled))
                return path, line, gr.Textbox(text, visible=True)

        def on_sweep(values, request: gr.Request, progress=tracked):
            with panel.job(request.session_hash) as cancelled:
                return answer(generate_grid, values, values[scales], reporter(progress, cancelled))

        def on_close(request: gr.Request):
            panel.cancel(request.session_hash)

        def on_cancel(request: gr.Request):
            panel.cancel(request.session_hash)
            return "Cancelled."

        # One job at a time: those of a concurrency_id share its limit. Private: only the page calls them.
        shared: dict[str, Any] = {
            "inputs": {upload, lora, lora_scale, scales, *fields.values()},
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        if control:
            changes = [upload.change, fields["num_frames"].release, fields["follow_control"].change]
            changes.append(fields["sequence_fps"].change)
            outputs = [control_video, status]
            gr.on(changes, on_upload, outputs=outputs, show_progress_on=control_video, **shared)
        shared["concurrency_id"] = "job"
        outputs = [output_video, status, command]
        jobs = [
            generate_button.click(on_generate, outputs=outputs, show_progress_on=output_video, **shared),
            sweep_button.click(on_sweep, outputs=[grid_video, grid_status], show_progress_on=grid_video, **shared),
        ]
        cancel_button.click(on_cancel, outputs=status, cancels=[*jobs], queue=False, api_visibility="private")
        page.unload(on_close)
        fields["guidance"].change(
            GUIDANCE_SCALES.get, fields["guidance"], fields["guidance_scale"], queue=False, api_visibility="private"
        )
    page.queue(max_size=MAX_QUEUE, api_open=False)
    return page


def reporter(progress: "gradio.Progress", cancelled: threading.Event) -> Report:
    """Return a function that shows progress on the page, and raises `Cancelled` once the user has cancelled."""

    def report(step, steps, text):
        if cancelled.is_set():
            raise Cancelled
        progress((step, steps), desc=text, unit="steps")

    return report


@contextmanager
def served(panel: Panel) -> Iterator[str]:
    """Serve the page while the block runs; it gives the page's address. Nothing is loaded from the internet."""
    import gradio as gr

    page = build_page(panel)
    _, address, _ = page.launch(
        server_name=panel.args.host,
        server_port=panel.args.port,
        max_file_size=panel.args.max_upload_mb * 10**6,
        css=".toast-wrap {top: auto !important; bottom: 1rem !important}",  # otherwise it covers the buttons
        head=f"<script>{PLAY_TOGETHER}</script>",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        prevent_thread_lock=True,
        show_error=True,
        quiet=True,
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    try:
        yield address
    finally:
        page.close(verbose=False)


# --------------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(APP, cli.name_first_words("model", argv))
    given = {name: value for name, value in vars(args).items() if name in GENERATE.options}
    require_gradio()
    require_free_port(args.host, args.port)
    if args.host not in LOCAL_HOSTS:
        logger.warning(f"--host {args.host}: others can reach the page, and there is no password")
    contract = check(args)
    with tempfile.TemporaryDirectory(prefix="c2r-app-") as folder:
        # Apart from the videos that `save` writes: gradio serves files in its own folder itself, and copies others.
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/page"
        panel = load(args, given, contract, Path(folder))
        with served(panel) as address:
            print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
            threading.Event().wait()


def require_gradio() -> None:
    """Raise InputError if gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at its import
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError(f"c2r.app: needs gradio ({error}); pip install gradio==6.31.0") from None


def require_free_port(host: str, port: int) -> None:
    """Raise InputError if nothing can be served at an address."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port}: another program uses it; give another") from None
        raise InputError(f"--host {host}: nothing can be served there ({error.strerror}); give another") from None


if __name__ == "__main__":
    cli.run(main)
