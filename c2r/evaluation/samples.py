"""Sample videos during training: fixed controls, prompts and seeds, so that two steps, and two runs, can be compared.

A row for each sample: the control, the output with it, the output of the backbone alone, and the true video.
"""

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers.utils.torch_utils import empty_device_cache
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from c2r.data.clips import Clip
from c2r.data.contact_sheet import draw_contact_sheet, encoded
from c2r.data.video import write_video
from c2r.encoding.dataset import ClipDataset
from c2r.files import digest, load_tensors, save_tensors, write_atomic
from c2r.models.parts import load_pipeline_part
from c2r.models.vae import decode_frames
from c2r.options import PIPELINE_OPTIONS
from c2r.pipeline import C2RPipeline, with_flow_shift
from c2r.training.engine import failing_together
from c2r.training.logs import tensorboard_writer

COLUMNS = ("control", "with control", "without control", "truth")

GIF_WIDTH = 960  # pixels of the whole row in TensorBoard


@dataclass(frozen=True)
class Sample:
    """A fixed task for the model; its seed is its number."""

    scene: Clip  # whose control is followed, and whose own video is the truth
    caption: Clip  # whose caption is the prompt


def choose_samples(scenes, captions, count):
    """Up to `count` samples, from as many files as possible.

    Args:
        scenes: `Clips` to take the control from, those of most clips' bucket: held-out CG pairs, or the clips of
            `--sample_dataset`.
        captions: `Clips` to take the prompts from: held-out real clips, so that a CG scene is asked to look real.
            None: each scene's own.
        count: how many.
    """
    scenes = scenes.of_bucket(scenes.main_bucket).first_windows(count)
    if captions is None:
        return [Sample(scene, scene) for scene in scenes]
    captions = captions.first_windows(count)
    return [Sample(scene, captions[i % len(captions)]) for i, scene in enumerate(scenes)]


@contextmanager
def sampling_pipeline(args, transformer, dinov3, device):
    """A `C2RPipeline` of the models in training and a VAE of its own, which is freed at the end.

    Args:
        args: has pretrained_model_name_or_path and flow_shift.
        transformer: the prepared `C2RTransformer`, unwrapped.
        dinov3: `DINOv3FeatureExtractor`.
        device: of the run.
    """
    source = args.pretrained_model_name_or_path
    vae = load_pipeline_part(source, "vae", torch.float32).to(device)
    vae.enable_tiling()  # a whole frame at once would need memory that training has not left
    scheduler = with_flow_shift(load_pipeline_part(source, "scheduler"), args.flow_shift)
    pipeline = C2RPipeline(None, None, vae, scheduler, transformer, dinov3=dinov3)
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield pipeline
    finally:
        vae.to("cpu")  # the caller may still hold the pipeline
        gc.collect()
        empty_device_cache()


def make_samples(samples, pipeline, args, accelerator, backbone_sha256, go_on):
    """Generate this process's share of the samples. Call it on every process.

    No generator but the samples' own is drawn from, so training goes on as if nothing had been sampled.

    Args:
        samples: list of `Sample`, encoded.
        pipeline: of `sampling_pipeline`, the model in eval mode.
        args: has output_dir, the clips' shape, conditioning_scale and the sampling options.
        accelerator: the run's.
        backbone_sha256: what the output without control depends on: it is made once and kept in `output_dir`/samples.
        go_on: called before each video; where it returns False, which it does on all processes alike, sampling ends.

    Returns:
        {number of the sample: {column: (F, H, W, 3) uint8}} with COLUMNS; None if it was ended.
    """
    scenes = ClipDataset([sample.scene for sample in samples], args)
    captions = ClipDataset([sample.caption for sample in samples], args)
    # Every process generates equally many, or a sharded model's collectives would hang: the last shares are filled up.
    per_process = -(-len(samples) // accelerator.num_processes)
    positions = [accelerator.process_index * per_process + i for i in range(per_process)]
    numbers = [position % len(samples) for position in positions]

    def generate(number, control_video):
        return pipeline(
            control_video=control_video,
            **{name: getattr(args, name) for name in PIPELINE_OPTIONS} | samples[number].scene.bucket._asdict(),
            generator=torch.Generator().manual_seed(number),  # on CPU: the same noise on every machine
            prompt_embeds=captions[number]["prompt_embeds"][None],
            negative_prompt_embeds=captions.empty_prompt_embeds[None],
            output_type="latent",
        ).frames[0]

    def path_without_control(number):
        setting = [samples[number].caption.text, number, backbone_sha256, args.num_inference_steps, args.guidance]
        setting += [args.guidance_scale, args.flow_shift, samples[number].scene.bucket]
        setting += vars(captions.settings).values()
        return Path(args.output_dir) / "samples/.without_control" / f"{digest(setting)}.safetensors"

    kept = all(gather_object([path_without_control(number).exists() for number in numbers]))
    rows = {}
    for position, number in zip(positions, numbers):
        if not go_on():
            return None
        control_frames = scenes.control_frames(number)  # (F, 3, H, W) uint8
        latents = generate(number, control_frames.float() / 255)
        without_control = path_without_control(number)
        if not kept:
            with failing_together(accelerator, without_control):
                save_tensors(without_control, {"latents": generate(number, None)}, {})
        if position < len(samples):
            columns = (
                control_frames.permute(0, 2, 3, 1).numpy(),
                decode_frames(pipeline.vae, latents),
                decode_frames(pipeline.vae, load_tensors(without_control)[0]["latents"]),
                scenes.source_frames(number).permute(0, 2, 3, 1).numpy(),
            )
            rows[number] = dict(zip(COLUMNS, columns))
    return rows


def write_samples(rows, samples, args, accelerator, step):
    """Write the rows to `output_dir`/samples and to TensorBoard. Call it on every process.

    samples/step-N/ gets an mp4 for each row, from the process that has made it, and a contact sheet of all.

    Args:
        rows: of `make_samples`.
        samples: all `Sample`s.
        args: has output_dir and fps.
        accelerator: the run's.
        step: optimizer step.

    Raises:
        InputError: no room or no right to write.
    """
    folder = Path(args.output_dir) / f"samples/step-{step}"
    with failing_together(accelerator, folder):
        for number, columns in rows.items():
            write_video(folder / f"{number}.mp4", np.concatenate(list(columns.values()), axis=2), args.fps)
    if accelerator.num_processes > 1:
        rows = dict(gather_object(list(rows.items())))
    with failing_together(accelerator, folder):
        if accelerator.is_main_process:
            rows = [rows[number] for number in range(len(samples))]
            columns = {name: [row[name] for row in rows] for name in COLUMNS}
            sheet = draw_contact_sheet(columns, [sample.caption.text for sample in samples])
            write_atomic(folder / "sheet.png", encoded(sheet))
            if (writer := tensorboard_writer(accelerator)) is not None:
                writer.add_image("samples/sheet", np.asarray(sheet), step, dataformats="HWC")
                for number, row in enumerate(rows):
                    _log_moving_picture(writer, f"samples/{number}", row, args.fps, step)


def _log_moving_picture(writer, tag, row, fps, step):
    """What `SummaryWriter.add_video` does, without its need of moviepy."""
    frames = [Image.fromarray(frame) for frame in np.concatenate(list(row.values()), axis=2)]
    for frame in frames:
        frame.thumbnail((GIF_WIDTH, GIF_WIDTH))
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)
    width, height = frames[0].size
    picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)
