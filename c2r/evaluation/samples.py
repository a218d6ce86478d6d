"""Sample videos during training: controls, prompts and seeds are fixed, so that steps and runs can be compared.

Each sample is a row: the control, the output with it, the output of the backbone alone, and the true video.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from einops import rearrange
from torch import nn

from c2r.bars import progress_bar
from c2r.data.clips import Clip, Clips
from c2r.data.contact_sheet import draw_contact_sheet, image_bytes
from c2r.data.settings import ClipSettings
from c2r.data.video_writer import write_video
from c2r.encoding.cache import CacheSettings
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.shares import equal_share
from c2r.files import digest, load_tensors, save_tensors, write_atomic
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.parts import load_pipeline_part
from c2r.models.vae import decode_frames
from c2r.pipeline import C2RPipeline, Sampling, with_flow_shift
from c2r.training.failing_together import failing_together
from c2r.training.output_files import SAMPLE_COLUMNS
from c2r.training.trackers import log_picture, log_video

#: {number of a sample: {column: (F, H, W, 3) uint8}}
SampleRows = dict[int, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Sample:
    """A fixed task for the model. Its position in the list of samples is also its seed."""

    scene: Clip  #: its control is followed, and its own video is the truth
    caption: Clip  #: its text is the prompt


def choose_samples(scenes: Clips, captions: Clips | None, count: int) -> list[Sample]:
    """Return up to `count` samples from as many files as possible.

    Args:
        scenes: the clips that give the controls; only those of the main bucket are used.
        captions: the clips that give the prompts; None: each scene's own text is its prompt.
        count: number of samples.
    """
    chosen: Sequence[Clip] = scenes.of_bucket(scenes.main_bucket).first_windows(count)
    if captions is None:
        return [Sample(scene, scene) for scene in chosen]
    captions = captions.first_windows(count)
    return [Sample(scene, captions[i % len(captions)]) for i, scene in enumerate(chosen)]


@contextmanager
def sampling_pipeline(
    base_model: str,
    flow_shift: float,
    transformer: nn.Module | None,
    dinov3: DINOv3FeatureExtractor,
    device: torch.device,
) -> Iterator[C2RPipeline]:
    """Yield a `C2RPipeline` of the models in training and of a VAE, which is freed at the end.

    Args:
        base_model: the Wan pipeline, a folder or hub name, that gives VAE and scheduler.
        flow_shift: shift of the scheduler's noise levels.
        transformer: the prepared `C2RTransformer`, unwrapped; None: the pipeline only decodes.
        dinov3: encodes the control.
        device: the run's device.
    """
    vae = load_pipeline_part(base_model, "vae", torch.float32).to(device)
    vae.enable_tiling()  # decoding a whole frame at once needs memory that training has not left
    scheduler = with_flow_shift(load_pipeline_part(base_model, "scheduler"), flow_shift)
    pipeline = C2RPipeline(None, None, vae, scheduler, transformer, dinov3=dinov3)
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield pipeline
    finally:
        vae.to("cpu")  # the caller may still hold the pipeline
        clear_device_cache(garbage_collection=True)


def make_samples(
    samples: list[Sample],
    pipeline: C2RPipeline,
    sampling: Sampling,
    flow_shift: float,
    settings: ClipSettings,
    output_dir: str | Path,
    accelerator: Accelerator,
    backbone_sha256: str,
    go_on: Callable[[], bool],
) -> SampleRows | None:
    """Generate this process's share of the samples. Call it on every process.

    Each sample has a random generator of its own, so training continues as if nothing had been sampled.

    Args:
        samples: the samples, whose clips must be in the cache.
        pipeline: from `sampling_pipeline`, with the model in eval mode.
        sampling: how videos are sampled.
        flow_shift: shift of the pipeline's scheduler.
        settings: the settings that the clips are cut and encoded with.
        output_dir: the run's output folder. Outputs without control are made once and kept in
            samples/.without_control there.
        accelerator: each process makes its share.
        backbone_sha256: fingerprint of the backbone, on which the outputs without control depend.
        go_on: called before each video; sampling ends when it returns False, on all processes alike.

    Returns:
        the rows of this process, each with SAMPLE_COLUMNS; None if `go_on` ended the sampling.

    Raises:
        InputError: an output without control cannot be written.
    """
    scenes = ClipDataset([sample.scene for sample in samples], settings)
    captions = ClipDataset([sample.caption for sample in samples], settings)
    positions = equal_share(len(samples), accelerator)
    numbers = [position % len(samples) for position in positions]

    paths = {}  # of the latents without control
    for number in numbers:
        determined_by = [samples[number].caption.text, number, backbone_sha256, sampling.num_inference_steps]
        determined_by += [sampling.guidance, sampling.guidance_scale, flow_shift, samples[number].scene.bucket]
        determined_by += vars(CacheSettings.of(settings)).values()
        paths[number] = Path(output_dir) / "samples/.without_control" / f"{digest(determined_by)}.safetensors"
    kept = all(gather_object([path.exists() for path in paths.values()]))

    rows = {}
    with progress_bar(len(numbers), "samples", "video", accelerator.process_index == 0) as bar:
        for position, number in zip(positions, numbers):
            if not go_on():
                return None
            control_frames = scenes.control_frames(number)  # (F, 3, H, W) uint8
            latents = _generate(samples, number, captions, pipeline, sampling, control_frames.float() / 255)
            if not kept:
                with failing_together(accelerator, paths[number]):
                    without_control = _generate(samples, number, captions, pipeline, sampling, None)
                    save_tensors(paths[number], {"latents": without_control}, {})
            if position < len(samples):
                columns = (
                    rearrange(control_frames, "f c h w -> f h w c").numpy(),
                    decode_frames(pipeline.vae, latents),
                    decode_frames(pipeline.vae, load_tensors(paths[number], ["latents"])[0]["latents"]),
                    rearrange(scenes.target_frames(number), "f c h w -> f h w c").numpy(),
                )
                rows[number] = dict(zip(SAMPLE_COLUMNS, columns))
            bar.update()
    return rows


def _generate(samples, number, captions, pipeline, sampling, control_video):
    """Generate the latents (C, T, h, w) of one sample, with a control video (F, 3, H, W) in [0, 1] or without."""
    return pipeline(
        control_video=control_video,
        **vars(sampling),
        **samples[number].scene.bucket._asdict(),
        generator=torch.Generator().manual_seed(number),  # on CPU: the same noise on every machine
        prompt_embeds=captions[number]["prompt_embeds"][None],
        negative_prompt_embeds=captions.empty_prompt_embeds[None],
        output_type="latent",
    ).frames[0]


def write_samples(
    rows: SampleRows,
    samples: list[Sample],
    output_dir: str | Path,
    fps: float,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Write the rows into the output folder and to the trackers. Call it on every process.

    samples/step-N/ gets an mp4 of each row, from the process that made it, and a contact sheet of all rows.

    Args:
        rows: from `make_samples`.
        samples: all samples, those of other processes included.
        output_dir: the run's output folder.
        fps: frames per second of the videos.
        accelerator: the run's.
        step: the optimizer step.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(output_dir) / f"samples/step-{step}"
    with failing_together(accelerator, folder):
        for number, row in rows.items():
            write_video(folder / f"{number}.mp4", _side_by_side(row), fps)
    if accelerator.num_processes > 1:
        rows = dict(gather_object(list(rows.items())))
    with failing_together(accelerator, folder):
        if accelerator.is_main_process:
            columns = {name: [rows[number][name] for number in range(len(samples))] for name in SAMPLE_COLUMNS}
            sheet = draw_contact_sheet(columns, [sample.caption.text for sample in samples])
            write_atomic(folder / "sheet.png", image_bytes(sheet))
            log_picture(accelerator, "samples/sheet", np.asarray(sheet), step)
            for number in range(len(samples)):
                video = folder / f"{number}.mp4"
                frames, prompt = _side_by_side(rows[number]), samples[number].caption.text
                log_video(accelerator, f"samples/{number}", video, frames, fps, step, prompt)


def _side_by_side(row):
    """{column: (F, H, W, 3)} -> (F, H, columns · W, 3)."""
    return np.concatenate(list(row.values()), axis=2)
