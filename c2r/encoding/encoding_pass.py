"""The encoding pass: encode the clips that are not cached and write them to the cache."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from c2r import InputError
from c2r.bars import bar_settings
from c2r.data.buckets import Bucket
from c2r.data.clips import Clip, Clips, DatasetFile
from c2r.data.drop_reasons import DropReason
from c2r.data.failures import Failure, Window, note_failure
from c2r.data.folders import read_frames
from c2r.data.manifest import Manifest
from c2r.data.settings import ClipSettings
from c2r.data.video_info import UnusableVideo
from c2r.data.workers import Heartbeat, shield_worker, usable_workers
from c2r.encoding.cache import CacheSettings, current_encoders
from c2r.encoding.encoders import ControlEncoder, Encoder, LatentEncoder, Tensors
from c2r.encoding.missing import (
    CONTROL_FEATURES,
    MissingClip,
    MissingFiles,
    find_missing,
    find_missing_control,
    is_mine,
    prompt_dtype,
)
from c2r.files import is_complete, save_tensors
from c2r.models.parts import load_pipeline_part, load_text_encoder, log_long_prompts, max_sequence_length
from c2r.units import duration_text, size_text

logger = logging.getLogger(__name__)

#: Batches of each bucket that `estimate_encoding` times, after a first one that warms up.
MEASURED_BATCHES = 3


@dataclass(frozen=True)
class EncodingResult:
    """The result of an encoding pass, the same on every process."""

    kind: str  #: see `MissingFiles`
    seconds_per_clip: float | None  #: duration of the pass per missing clip; None if no clip was missing
    failures: list[str]  #: a line per clip that cannot be encoded; the next `read_manifest` drops it, or its file


@dataclass(frozen=True)
class EncodingJob:
    """One kind of encoding: for which clips, how to find missing files, and how to load the encoder."""

    settings: ClipSettings
    model_name: str  #: the encoder's folder or hub name
    clips_of: Callable[[Manifest], Clips]  #: the clips of a dataset that need the result
    find_missing: Callable[..., MissingFiles]  #: called with clips, and perhaps accelerator=
    load_encoder: Callable[[torch.device], Encoder]


def latent_job(settings: ClipSettings) -> EncodingJob:
    """Return the job of encoding latents and prompts."""
    find = partial(find_missing, settings=settings)
    load = partial(LatentEncoder, settings)
    return EncodingJob(settings, settings.base_model, attrgetter("clips"), find, load)


def control_job(settings: ClipSettings, dinov3: str, dtype: torch.dtype) -> EncodingJob:
    """Return the job of encoding the controls of training clips by DINOv3, with weights of this dtype."""
    find = partial(find_missing_control, settings=settings, dinov3=dinov3, dtype=dtype)
    load = partial(ControlEncoder, settings, dinov3, dtype=dtype)
    return EncodingJob(settings, dinov3, attrgetter("train"), find, load)


def encode_missing(
    clips: Iterable[Clip], settings: ClipSettings, accelerator: Accelerator, watchdog: Heartbeat
) -> EncodingResult:
    """Encode the latents and prompts that are not cached; call it on every process.

    The text encoder is loaded only if a prompt is missing, the VAE only if latents are, and each is freed before the
    next one is loaded. A clip that cannot be encoded is noted with its reason, and the pass continues.

    Args:
        clips: the same on every process.
        settings: the encoders, the cache and the number of workers.
        accelerator: gives the device and the share of this process.
        watchdog: the run's; processes that are done wait through it for slower ones.

    Raises:
        InputError: there is no room for the latents, or the VAE gives NaN for every clip.
    """
    return encode(clips, latent_job(settings), accelerator, watchdog)


def encode_control(
    clips: Iterable[Clip],
    settings: ClipSettings,
    dinov3: str,
    dtype: torch.dtype,
    accelerator: Accelerator,
    watchdog: Heartbeat,
) -> EncodingResult:
    """Encode the control features that are not cached; otherwise as `encode_missing`.

    Args:
        clips, settings, accelerator, watchdog: see `encode_missing`.
        dinov3: folder or hub name.
        dtype: dtype of DINOv3's weights and of the features.

    Raises:
        InputError: there is no room for the features, or some are not finite.
    """
    return encode(clips, control_job(settings, dinov3, dtype), accelerator, watchdog)


def encode(clips: Iterable[Clip], job: EncodingJob, accelerator: Accelerator, watchdog: Heartbeat) -> EncodingResult:
    """Do one encoding job, see `encode_missing` and `encode_control`."""
    with watchdog.unjudged():
        missing = job.find_missing(clips, accelerator=accelerator)
    missing.require_room()
    if missing.damaged:
        logger.info("%d damaged files in the cache are encoded again", missing.damaged)

    _encode_prompts(missing, job.settings, accelerator, watchdog)
    watchdog.wait_for_everyone()  # a clip's file repeats its prompt, which another process may have encoded

    share = _Share(missing.count)
    if missing.clips:
        encoder = job.load_encoder(accelerator.device)
        _encode_clips(missing, encoder, share, job.settings, accelerator, watchdog)
        del encoder
        clear_device_cache(garbage_collection=True)
    watchdog.wait_for_everyone()

    shares = gather_object([share]) if accelerator.num_processes > 1 else [share]
    count = max(share.missing_count for share in shares)
    seconds = max(share.seconds for share in shares)
    failures = [line for share in shares for line in share.failures]
    not_finite = [file for share in shares for file in share.not_finite]
    if not_finite:
        lines = [f"{file.path}: {job.model_name} gives {missing.kind} that are not finite" for file in not_finite]
        if missing.kind == CONTROL_FEATURES:  # a working DINOv3 gives finite features for any pixels
            raise InputError(f"{lines[0]}; check the model")
        if count == missing.total and len(failures) + len(lines) >= count:
            raise InputError(f"{lines[0]}, nor are those of any other clip; check the model")
        if accelerator.is_main_process:
            _note_not_finite(not_finite, lines, job.settings)
        failures += lines
    watchdog.wait_for_everyone()  # all processes will read the notes
    if failures:
        logger.info("%d clips could not be encoded, the first: %s", len(failures), failures[0])
    return EncodingResult(missing.kind, seconds / count if count else None, failures)


@dataclass
class _Share:
    """The work of one process in an encoding pass."""

    missing_count: int  #: missing clips of all processes; fewer if another process had already written some
    failures: list[str] = field(default_factory=list)  #: a line per clip that could not be decoded, already noted
    not_finite: list[DatasetFile] = field(default_factory=list)  #: the file of each clip with a non-finite result
    seconds: float = 0.0  #: time for all clips


def _note_not_finite(files, lines, settings):
    encoders = current_encoders(settings)()
    for file, line in zip(files, lines):
        failure = Failure(file, DropReason.NON_FINITE_LATENTS, line, encoders)
        note_failure(settings.cache_folder(file.folder), failure)


# ------------------------------------------------------------------------------------------------------------- prompts


@torch.no_grad()
def _encode_prompts(missing, settings, accelerator, watchdog):
    """Encode this process's share of the missing prompts."""
    prompts = {path: text for path, text in missing.prompts.items() if is_mine(path, accelerator)}
    if not prompts:
        return
    device = accelerator.device
    text_encoder = load_text_encoder(settings.base_model, prompt_dtype(), device)
    tokenizer = load_pipeline_part(settings.base_model, "tokenizer")
    pipeline = WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None)
    max_length = max_sequence_length(tokenizer)
    if accelerator.is_main_process:
        log_long_prompts(tokenizer, missing.prompts.values())
    metadata = {
        "encoder": str(settings.base_model),
        "text_encoder": CacheSettings.of(settings).text_encoder,
        "max_sequence_length": max_length,
    }
    # One prompt at a time: padded to 512 tokens it uses the device well, and no result depends on its batch.
    for path, text in tqdm(
        prompts.items(), desc="prompts", unit="prompt", **bar_settings(accelerator.is_main_process)
    ):
        watchdog.beat(f"encoding of the prompt '{text}'")
        prompt_embeds, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=max_length, device=device
        )  # (1, L, D_text), zeros after the prompt
        if not prompt_embeds.isfinite().all():
            raise InputError(
                f"{settings.base_model}: its text encoder gives embeddings of '{text}' that are not finite; check it"
            )
        length = len(tokenizer(prompt_clean(text), truncation=True, max_length=max_length).input_ids)
        save_tensors(path, {"prompt_embeds": prompt_embeds[0, :length]}, metadata | {"text": text})
    del pipeline, text_encoder
    clear_device_cache(garbage_collection=True)


# --------------------------------------------------------------------------------------------------------------- clips


class _DecodedBatch(NamedTuple):
    """The clips of a batch that could be decoded, and those that could not."""

    clips: list[MissingClip]
    frames: torch.Tensor | None  # (B, F, 3, H, W) uint8 RGB; None if B is 0
    failures: list[Failure]


class _Batches(Dataset):
    """Decodes clips in batches of one bucket, in data loader workers while the encoder runs.

    Args:
        clips: the clips to decode.
        encoder: class of the encoder. Its instances stay out of the workers.
        settings: see `read_frames`.
    """

    def __init__(self, clips: Iterable[MissingClip], encoder: type[Encoder], settings: ClipSettings):
        self.encoder, self.settings = encoder, settings
        self.batches: list[list[MissingClip]] = []
        open_batches: dict[Bucket, list[MissingClip]] = {}
        for missing in clips:
            bucket = missing.clip.bucket
            batch = open_batches.setdefault(bucket, [])
            batch.append(missing)
            if len(batch) == encoder.clips_at_once(bucket):
                self.batches.append(open_batches.pop(bucket))
        self.batches += open_batches.values()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> _DecodedBatch:
        clips, frames, failures = [], [], []
        for missing in self.batches[number]:
            if is_complete(missing.path, self.encoder.tensors):
                continue  # another encoding pass has written it meanwhile
            decoded = self._decode(missing.clip)
            if isinstance(decoded, Failure):
                failures.append(decoded)
            else:
                clips.append(missing)
                frames.append(decoded)
        return _DecodedBatch(clips, torch.stack(frames) if frames else None, failures)

    def _decode(self, clip: Clip) -> torch.Tensor | Failure:
        """Decode a clip in each of its files; return the frames of the last one, or the first failure."""
        for file in self.encoder.files_to_decode(clip):
            try:
                frames = read_frames(file, clip, self.settings)
            except UnusableVideo as error:
                window = Window(clip.start, clip.bucket.num_frames, self.settings.fps) if error.of_window else None
                return Failure(file, error.reason, str(error), window=window)
        return frames


def _first(items):
    return items[0]


@torch.no_grad()
def _encode_clips(missing, encoder, share, settings, accelerator, watchdog):
    """Encode the clips of this process and record the outcome in `share`."""
    device = accelerator.device
    batches = _Batches(missing.clips, type(encoder), settings)
    num_workers = usable_workers(settings.num_workers, len(batches))
    loader = DataLoader(
        batches,
        batch_size=1,
        collate_fn=_first,
        num_workers=num_workers,
        # A worker that fails while it sends a batch drops it and goes on, and the loop would wait without end.
        timeout=watchdog.timeout_seconds if num_workers else 0,
        worker_init_fn=shield_worker,
        pin_memory=device.type == "cuda",
    )
    started = time.perf_counter()
    progress_bar = tqdm(
        total=len(missing.clips), desc=missing.kind, unit="clip", **bar_settings(accelerator.is_main_process)
    )
    with progress_bar:
        for clips, batch in zip(batches.batches, loader):
            watchdog.beat(f"encoding of {clips[0].clip.name}")
            share.not_finite += _encode_batch(batch, encoder, device)
            for failure in batch.failures:
                share.failures.append(failure.detail)
                note_failure(settings.cache_folder(failure.file.folder), failure)
            progress_bar.update(len(clips))
            rate = accelerator.num_processes * progress_bar.n / _seconds_since(started)
            progress_bar.set_postfix_str(f"all processes {rate:.2f} clips/s")
    share.seconds = _seconds_since(started)


def _encode_batch(batch: _DecodedBatch, encoder: Encoder, device: torch.device) -> list[DatasetFile]:
    """Encode and save a batch; return the file of each clip whose result is not finite."""
    if batch.frames is None:
        return []
    not_finite = []
    for missing, encoded in zip(batch.clips, encoder.encode(batch.frames.to(device))):
        if all(tensor.isfinite().all() for tensor in encoded.values()):
            _save_clip(missing, encoded, encoder)
        else:
            not_finite.append(encoder.files_to_decode(missing.clip)[-1])
    return not_finite


def _save_clip(missing: MissingClip, encoded: Tensors, encoder: Encoder):
    path, clip = missing
    tensors, origin = encoder.file_content(clip, encoded)
    window = {"window": clip.window, "start": clip.start, "bucket": str(clip.bucket)}
    model = {"encoder": str(encoder.model_name), "settings": vars(encoder.cache_settings)}
    save_tensors(path, tensors, origin | window | model)


def _seconds_since(started):
    return max(time.perf_counter() - started, 1e-9)


# ------------------------------------------------------------------------------------------------------------- dry run


def estimate_encoding(missing: MissingFiles, job: EncodingJob, accelerator: Accelerator) -> Iterator[str]:
    """Estimate an encoding pass: encode a few clips of each bucket, and write nothing.

    Args:
        missing: all missing clips, not the share of one process.
        job: see `encode`.
        accelerator: gives the device and the number of processes that would share the work. Call this on one process.

    Yields:
        lines for the user.

    Raises:
        InputError: there is no room for the missing files.
    """
    size = size_text(sum(missing.bytes_needed.values()))
    yield (
        f"{missing.count:,} clips and {len(missing.prompts):,} captions to encode, {size} of {missing.kind}; "
        f"{missing.total - missing.count:,} clips are cached already"
    )
    missing.require_room()
    if not missing.clips:
        return

    encoder = job.load_encoder(accelerator.device)
    batches = _Batches(missing.clips, type(encoder), job.settings)
    numbers_of: dict[Bucket, list[int]] = {}
    for number, batch in enumerate(batches.batches):
        numbers_of.setdefault(batch[0].clip.bucket, []).append(number)
    total = 0.0
    for bucket, numbers in numbers_of.items():
        times = [_time_batch(batches, n, encoder, accelerator.device) for n in numbers[: 1 + MEASURED_BATCHES]]
        measured = times[1:] or times
        seconds = len(numbers) * sum(measured) / len(measured) / accelerator.num_processes
        total += seconds
        count = sum(len(batches.batches[number]) for number in numbers)
        yield (
            f"{bucket}: {count:,} clips, {duration_text(seconds)} without data loader workers "
            f"({len(measured)} batches measured)"
        )
    yield f"{duration_text(total)} in all on {accelerator.num_processes} processes, without captions"


@torch.no_grad()
def _time_batch(batches, number, encoder, device):
    """Return the seconds that a batch takes to decode and encode."""
    started = time.perf_counter()
    frames = batches[number].frames
    if frames is not None:
        first_clip = encoder.encode(frames.to(device))[0]
        first_clip.popitem()[1].cpu()  # waits for the device
    return _seconds_since(started)
