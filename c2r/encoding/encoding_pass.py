"""The encoding pass: fill the cache with what is missing from it."""

import gc
import time
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import gather_object
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.torch_utils import empty_device_cache
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from c2r import InputError
from c2r.data.clips import cache_folder
from c2r.data.failures import Failure, note_failure
from c2r.data.folders import read_source
from c2r.data.video import UnusableVideo
from c2r.data.workers import shield_worker
from c2r.encoding.cache import CacheSettings
from c2r.encoding.encoders import ControlEncoder, LatentEncoder
from c2r.encoding.missing import find_missing, find_missing_control, is_mine, prompt_dtype
from c2r.files import is_complete, save_tensors
from c2r.models.parts import load_pipeline_part, max_sequence_length
from c2r.training.watchdog import DEFAULT_TIMEOUT_MINUTES, Watchdog
from c2r.units import duration_text, size_text

# Batches of each bucket that a dry run measures, after a first one that is not counted.
MEASURED_BATCHES = 3


@dataclass
class Encoded:
    """What an encoding pass has done, the same on every process."""

    kind: str  #: as in `Missing`
    seconds_per_clip: float | None  #: all processes together; None: nothing was missing
    #: One line for each clip that cannot be encoded; noted, so that the next `read_manifest` drops their files.
    failures: list[str]


def encode_missing(clips, options, accelerator, watchdog=None) -> Encoded:
    """Encode the clips that the cache lacks; returns when every process has done its share. Call it on every process.

    The text encoder is loaded only if a prompt is missing, the VAE only if latents are, and each is freed again before
    the other is loaded. A clip that cannot be encoded is noted with its reason, and the pass goes on.

    Args:
        clips: iterable of `Clip`, the same on every process.
        options: has buckets (or height, width, num_frames), fps, pretrained_model_name_or_path,
            dataloader_num_workers, and perhaps cache_dir.
        accelerator: an `Accelerator`: whose device, and which share.
        watchdog: the run's `Watchdog`, through which a process that is done waits for the others, for any time; None:
            one of its own.

    Raises:
        InputError: no room for the latents, or a VAE that gives NaN for whatever it is given.
    """
    watchdog = watchdog or Watchdog(accelerator, 60 * DEFAULT_TIMEOUT_MINUTES)
    with watchdog.unjudged():
        missing = find_missing(clips, options, accelerator)
    return _encode(missing, LatentEncoder, options, accelerator, watchdog)


def encode_control(clips, options, dtype, accelerator, watchdog=None) -> Encoded:
    """Make the features of the clips' controls that the cache lacks; otherwise as `encode_missing`.

    Args:
        clips, accelerator, watchdog: see `encode_missing`.
        options: has fps, dinov3, dataloader_num_workers, and perhaps cache_dir.
        dtype: torch dtype of DINOv3's weights and of the features.

    Raises:
        InputError: no room for the features, or features that are not finite.
    """
    watchdog = watchdog or Watchdog(accelerator, 60 * DEFAULT_TIMEOUT_MINUTES)
    with watchdog.unjudged():
        missing = find_missing_control(clips, options, dtype, accelerator)
    return _encode(missing, partial(ControlEncoder, dtype=dtype), options, accelerator, watchdog)


def _encode(missing, load_encoder, options, accelerator, watchdog):
    missing.require_room()
    if accelerator.is_main_process and missing.damaged:
        print(f"{missing.damaged} damaged files in the cache are encoded anew", flush=True)
    texts = [(path, text) for path, text in missing.texts.items() if is_mine(path, accelerator)]
    if texts:
        _encode_prompts(texts, options, accelerator, watchdog)
    watchdog.wait_for_everyone()

    count, failures, not_finite, seconds = missing.count, [], [], 0.0
    if missing.clips:
        encoder = load_encoder(options, accelerator.device)
        failures, not_finite, seconds = _encode_clips(missing, encoder, options, accelerator, watchdog)
        del encoder
        gc.collect()
        empty_device_cache()
    watchdog.wait_for_everyone()
    if accelerator.num_processes > 1:
        failures, not_finite = gather_object(failures), gather_object(not_finite)
        # A process that has looked a little later may have found what others had made by then.
        count, seconds = max(gather_object([count])), max(gather_object([seconds]))
    if not_finite and missing.kind == "control features":  # DINOv3 gives finite ones for any pixels
        raise InputError(f"{not_finite[0].detail}; check the model")
    if not_finite and count == missing.total and len(failures) + len(not_finite) >= count:
        raise InputError(f"{not_finite[0].detail}, nor are those of any other clip; check the model")
    for failure in not_finite if accelerator.is_main_process else ():
        note_failure(cache_folder(failure.source.folder, options), failure)
    failures += [failure.detail for failure in not_finite]
    watchdog.wait_for_everyone()  # the notes are there
    if failures:
        accelerator.print(f"{len(failures)} clips could not be encoded, the first: {failures[0]}")
    return Encoded(missing.kind, seconds / count if count else None, failures)


@torch.no_grad()
def _encode_prompts(texts, options, accelerator, watchdog):
    device = accelerator.device
    dtype = prompt_dtype()
    source = options.pretrained_model_name_or_path
    text_encoder = CacheSettings.from_options(options).text_encoder
    pipeline = WanPipeline(
        tokenizer=load_pipeline_part(source, "tokenizer"),
        text_encoder=load_pipeline_part(source, "text_encoder", torch_dtype=dtype).to(device),
        vae=None,
        scheduler=None,
    )
    length_limit = max_sequence_length(pipeline.tokenizer)
    # One at a time: padded to 512 tokens a prompt fills the device by itself, and no result depends on its batch.
    for path, text in tqdm(texts, desc="prompts", unit="prompt", disable=not accelerator.is_main_process):
        watchdog.beat(f"encoding of the prompt '{text}'")
        prompt_embeds, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=length_limit, device=device
        )  # (1, L, D_text), zeros behind the prompt
        length = len(pipeline.tokenizer(prompt_clean(text), truncation=True, max_length=length_limit).input_ids)
        metadata = {"encoder": str(source), "text": text, "max_sequence_length": length_limit}
        metadata["text_encoder"] = text_encoder
        save_tensors(path, {"prompt_embeds": prompt_embeds[0, :length]}, metadata)
    del pipeline
    gc.collect()
    empty_device_cache()


class _Batches(Dataset):
    """Clips' pixels, in batches of one bucket; decoding runs in the data loader's workers while the model encodes.

    Args:
        clips: list of (path in the cache, `Clip`).
        encoder: the class of what encodes them.
        options: see `read_source`.
    """

    def __init__(self, clips, encoder, options):
        self.encoder, self.options, self.batches, open_batches = encoder, options, [], {}
        for path, clip in clips:
            batch = open_batches.setdefault(clip.bucket, [])
            batch.append((path, clip))
            if len(batch) == encoder.clips_at_once(clip.bucket):
                self.batches.append(open_batches.pop(clip.bucket))
        self.batches += open_batches.values()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        """[(path, clip, its (F, 3, H, W) uint8, or a `Failure`)]."""
        # Another pass may have been faster; then this one decodes nothing.
        missing = [(path, clip) for path, clip in self.batches[number] if not is_complete(path, self.encoder.tensors)]
        return [(path, clip, self._frames(clip)) for path, clip in missing]

    def _frames(self, clip):
        for source in self.encoder.sources(clip):
            try:
                frames = read_source(source, clip, self.options)
            except UnusableVideo as error:
                return Failure(source, error.reason, str(error))
        return frames


def _one_item(items):
    return items[0]


@torch.no_grad()
def _encode_clips(missing, encoder, options, accelerator, watchdog):
    """Encode this process's clips; returns a line for each that failed, a `Failure` for each whose latents or features
    are not finite, and the seconds that all took."""
    device = accelerator.device
    batches = _Batches(missing.clips, type(encoder), options)
    loader = DataLoader(
        batches,
        batch_size=1,
        collate_fn=_one_item,
        num_workers=options.dataloader_num_workers,
        worker_init_fn=shield_worker,
        pin_memory=device.type == "cuda",
    )
    failures, not_finite, started = [], [], time.perf_counter()
    with tqdm(
        total=len(missing.clips), desc=missing.kind, unit="clip", disable=not accelerator.is_main_process
    ) as bar:
        for batch, items in zip(batches.batches, loader):
            watchdog.beat(f"encoding of {batch[0][1].name}")
            decoded = [item for item in items if isinstance(item[-1], torch.Tensor)]
            if decoded:
                encoded = encoder.encode(torch.stack([frames for *_, frames in decoded]).to(device))
                for (path, clip, _), tensors in zip(decoded, encoded):
                    if all(tensor.isfinite().all() for tensor in tensors.values()):
                        _save_clip(path, clip, tensors, encoder)
                    else:
                        source = encoder.sources(clip)[-1]
                        detail = f"{source.file}: {encoder.model_name} gives {missing.kind} that are not finite"
                        not_finite.append(Failure(source, f"non-finite {missing.kind}", detail, encoder.settings))
            for failure in (item[-1] for item in items if isinstance(item[-1], Failure)):
                failures.append(failure.detail)
                note_failure(cache_folder(failure.source.folder, options), failure)
            bar.update(len(batch))
            rate = accelerator.num_processes * bar.n / _since(started)
            bar.set_postfix_str(f"all processes {rate:.2f} clips/s")
    return failures, not_finite, _since(started)


def _since(started):
    return max(time.perf_counter() - started, 1e-9)


def _save_clip(path, clip, tensors, encoder):
    others, provenance = encoder.others(clip)
    provenance |= {"window": clip.window, "start": clip.start, "bucket": str(clip.bucket)}
    provenance |= {"encoder": str(encoder.model_name), "settings": vars(encoder.settings)}
    save_tensors(path, tensors | others, provenance)


def project(missing, load_encoder, options, accelerator):
    """Lines that tell what an encoding pass would do, from a few clips of each bucket that are encoded and not kept.

    Args:
        missing: `Missing`.
        load_encoder: `(options, device) -> encoder`.
        options, accelerator: see `encode_missing`; to be called on one process.
    """
    there, needed = missing.total - missing.count, size_text(sum(missing.room.values()))
    yield (
        f"{missing.count:,} clips and {len(missing.texts):,} captions to encode, {needed} of {missing.kind}; "
        f"{there:,} clips are there already"
    )
    missing.require_room()
    if not missing.clips:
        return
    encoder = load_encoder(options, accelerator.device)
    batches = _Batches(missing.clips, type(encoder), options)
    of_bucket, total = {}, 0.0
    for number, batch in enumerate(batches.batches):
        of_bucket.setdefault(batch[0][1].bucket, []).append(number)
    for bucket, numbers in of_bucket.items():
        seconds = [
            _time_batch(encoder, batches, number, accelerator.device) for number in numbers[: 1 + MEASURED_BATCHES]
        ]
        warm = seconds[1:] or seconds  # the first one pays for the start
        here = len(numbers) * sum(warm) / len(warm) / accelerator.num_processes
        total += here
        count = sum(len(batches.batches[number]) for number in numbers)
        yield f"{bucket}: {count:,} clips, {duration_text(here)} with no worker ahead ({len(warm)} batches measured)"
    yield f"{duration_text(total)} in all on {accelerator.num_processes} processes, without captions"


def _time_batch(encoder, batches, number, device):
    started = time.perf_counter()
    decoded = [frames for *_, frames in batches[number] if isinstance(frames, torch.Tensor)]
    if decoded:
        encoder.encode(torch.stack(decoded).to(device))[0].popitem()[1].cpu()  # waits for the device
    return _since(started)
