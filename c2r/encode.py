"""Fill the cache: VAE latents and UMT5 prompt embeddings of every clip that has none yet.

    accelerate launch -m c2r.encode --dataset data/real
    accelerate launch -m c2r.encode --dataset data/cg --domain cg

Each process takes its share. Killed and started again, it goes on where it was. The training scripts do the same for
whatever is missing when they start.
"""

import argparse
import gc
import itertools
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.torch_utils import empty_device_cache
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from c2r import InputError
from c2r.data.buckets import Bucket
from c2r.data.cache import (
    CLIP_TENSORS,
    CacheSettings,
    cache_folder,
    is_complete,
    load_tensors,
    note_failure,
    prompt_path,
    save_tensors,
)
from c2r.data.folders import read_source
from c2r.data.manifest import read_manifest
from c2r.data.missing import find_missing, is_mine
from c2r.data.video import UnusableVideo
from c2r.engine import require_joined
from c2r.interruption import shield_worker
from c2r.models.parts import load_pipeline_part
from c2r.options import HelpFormatter, add_clip_options, check_clip_options, run
from c2r.pipeline import max_sequence_length
from c2r.preview import choose_clips, write_preview
from c2r.watchdog import DEFAULT_TIMEOUT_MINUTES, Watchdog

# Batches of each bucket that a dry run measures, after a first one that is not counted.
MEASURED_BATCHES = 3


@dataclass
class Encoded:
    """What an encoding pass has done, the same on every process."""

    seconds_per_clip: float | None = None  #: all processes together; None: nothing was missing
    #: One line for each clip that gives no latents; noted, so that the next `read_manifest` drops their files.
    failures: list[str] = field(default_factory=list)


def clips_at_once(bucket) -> int:
    """How many clips the VAE encodes in one batch. It takes four frames at a time: a batch of small ones needs no more
    memory for them than one clip of 480×832 does, for which a batch gains nothing."""
    return max(1, min(8, 4 * 480 * 832 // (min(4, bucket.num_frames) * bucket.height * bucket.width)))


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
    settings, missing = CacheSettings.from_options(options), find_missing(clips, options, accelerator)
    missing.require_room()
    if accelerator.is_main_process and missing.damaged:
        print(f"{missing.damaged} damaged files in the cache are encoded anew", flush=True)

    texts = [(path, text) for path, text in missing.texts.items() if is_mine(path, accelerator)]
    if texts:
        _encode_prompts(texts, options, settings, accelerator, watchdog)
    watchdog.wait_for_everyone()

    failures, not_finite, seconds = [], [], 0.0
    if missing.clips:
        failures, not_finite, seconds = _encode_clips(missing.clips, options, settings, accelerator, watchdog)
    watchdog.wait_for_everyone()
    if accelerator.num_processes > 1:
        failures, not_finite = gather_object(failures), gather_object(not_finite)
        seconds = max(gather_object([seconds]))
    if not_finite and not missing.any_there and len(failures) + len(not_finite) >= missing.count:
        raise InputError(
            f"{options.pretrained_model_name_or_path}: its VAE gives NaN for every clip, {not_finite[0].file} the "
            "first; check the VAE"
        )
    for source in not_finite:
        failures.append(f"{source.file}: the VAE gives latents that are not finite")
        if accelerator.is_main_process:
            note_failure(cache_folder(source.folder, options), source, "non-finite latents", failures[-1])
    watchdog.wait_for_everyone()  # the notes are there
    if failures:
        accelerator.print(f"{len(failures)} clips could not be encoded, the first: {failures[0]}")
    return Encoded(seconds / missing.count if missing.count else None, failures)


def _provenance(options, **more):
    return {"encoders": str(options.pretrained_model_name_or_path), **more}


# ----------------------------------------------------------------------------------------------------------- prompts


@torch.no_grad()
def _encode_prompts(texts, options, settings, accelerator, watchdog):
    device = accelerator.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = options.pretrained_model_name_or_path
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
        metadata = _provenance(
            options, text=text, max_sequence_length=length_limit, text_encoder=settings.text_encoder
        )
        save_tensors(path, {"prompt_embeds": prompt_embeds[0, :length]}, metadata)
    del pipeline
    gc.collect()
    empty_device_cache()


# ------------------------------------------------------------------------------------------------------------- clips


class _Batches(Dataset):
    """Clips' pixels, in batches of one bucket; decoding runs in the data loader's workers while the VAE encodes.

    Args:
        clips: list of (path in the cache, `Clip`).
        options: see `read_source`.
    """

    def __init__(self, clips, options):
        self.options, self.batches, open_batches = options, [], {}
        for path, clip in clips:
            batch = open_batches.setdefault(clip.bucket, [])
            batch.append((path, clip))
            if len(batch) == clips_at_once(clip.bucket):
                self.batches.append(open_batches.pop(clip.bucket))
        self.batches += open_batches.values()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        """[(path, clip, its (F, 3, H, W) uint8, or (Source, reason, detail) where a file fails)]."""
        # Another pass may have been faster; then this one decodes nothing.
        missing = [(path, clip) for path, clip in self.batches[number] if not is_complete(path, CLIP_TENSORS)]
        return [(path, clip, self._frames(clip)) for path, clip in missing]

    def _frames(self, clip):
        # The coarse video is not encoded, but a pair whose control fails must not be found out in the midst of
        # training, nor a real clip whose coarse version does in the midst of validation.
        for source in filter(None, (clip.coarse_source, clip.source)):
            try:
                frames = read_source(source, clip, self.options)
            except UnusableVideo as error:
                return source, error.reason, str(error)
        return frames


def _one_item(items):
    return items[0]


@torch.no_grad()
def _encode_batch(vae, decoded, device):
    """[(mean, log-variance)] of clips of one bucket, see `encode_frames`.

    The batch always has `clips_at_once`, filled up with black: a clip's last bits depend on the size of its batch, but
    not on what else is in it. So the cache does not depend on what was missing, on kills or on the processes.
    """
    frames = torch.stack(decoded).to(device)  # (B, F, 3, H, W)
    num_frames, _, height, width = frames.shape[1:]
    filler = frames.new_zeros(clips_at_once(Bucket(num_frames, height, width)) - len(frames), *frames.shape[1:])
    return list(zip(*encode_frames(vae, torch.cat([frames, filler]))))[: len(frames)]


def _encode_clips(clips, options, settings, accelerator, watchdog):
    """Encode this process's clips; returns a line for each that failed, the sources of those whose latents are not
    finite, and the seconds that all took."""
    device = accelerator.device
    # fp32, as the pipeline decodes: in bf16 the latents lose more than the source's 8 bits.
    vae = load_pipeline_part(options.pretrained_model_name_or_path, "vae", torch_dtype=torch.float32).to(device)
    batches = _Batches(clips, options)
    loader = DataLoader(
        batches,
        batch_size=1,
        collate_fn=_one_item,
        num_workers=options.dataloader_num_workers,
        worker_init_fn=shield_worker,
        pin_memory=device.type == "cuda",
    )
    failures, not_finite, started = [], [], time.perf_counter()
    with tqdm(total=len(clips), desc="clips", unit="clip", disable=not accelerator.is_main_process) as bar:
        for batch, items in zip(batches.batches, loader):
            watchdog.beat(f"encoding of {batch[0][1].name}")
            decoded = [item for item in items if isinstance(item[-1], torch.Tensor)]
            if decoded:
                latents = _encode_batch(vae, [frames for *_, frames in decoded], device)
                for (path, clip, _), (mean, logvar) in zip(decoded, latents):
                    if mean.isfinite().all() and logvar.isfinite().all():
                        _save_clip(path, clip, mean, logvar, options, settings)
                    else:
                        not_finite.append(clip.source)
            for source, reason, detail in (item[-1] for item in items if not isinstance(item[-1], torch.Tensor)):
                failures.append(detail)
                note_failure(cache_folder(source.folder, options), source, reason, detail)
            bar.update(len(batch))
            rate = accelerator.num_processes * bar.n / _since(started)
            bar.set_postfix_str(f"all processes {rate:.2f} clips/s")
    seconds = _since(started)
    del vae
    gc.collect()
    empty_device_cache()
    return failures, not_finite, seconds


def _since(started):
    return max(time.perf_counter() - started, 1e-9)


def _save_clip(path, clip, mean, logvar, options, settings):
    prompt, _ = load_tensors(prompt_path(cache_folder(clip.folder, options), clip.text, settings))
    metadata = _provenance(
        options,
        file=clip.name,
        size=clip.size,
        mtime_ns=clip.mtime_ns,
        window=clip.window,
        start=clip.start,
        bucket=str(clip.bucket),
        text=clip.text,
        settings=vars(settings),
    )
    # The log-variance says how much noise to add: half precision is plenty.
    save_tensors(path, {"latents_mean": mean, "latents_logvar": logvar.half(), **prompt}, metadata)


def encode_frames(vae, frames):
    """The distributions of clips' normalised latents, z' = (z − latents_mean) / latents_std per channel.

    Args:
        vae: AutoencoderKLWan.
        frames: (B, F, 3, H, W) uint8 RGB on the VAE's device; F = 4k + 1.

    Returns:
        mean and log-variance of z', each (B, C, T, H/8, W/8) fp32; WanPipeline undoes the normalisation before
        decoding.
    """
    pixel_values = frames.to(vae.dtype).div(127.5).sub(1).permute(0, 2, 1, 3, 4)  # (B, 3, F, H, W) in [-1, 1]
    distribution = vae.encode(pixel_values).latent_dist
    shift, scale = (
        torch.tensor(statistic, device=frames.device, dtype=torch.float32).view(-1, 1, 1, 1)
        for statistic in (vae.config.latents_mean, vae.config.latents_std)
    )
    mean = (distribution.mean.float() - shift) / scale
    logvar = distribution.logvar.float() - 2 * scale.log()  # Var[z'] = Var[z] / latents_std²
    return mean, logvar


# -------------------------------------------------------------------------------------------------------- command line


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder or address with videos and metadata.csv")
    parser.add_argument("--domain", choices=("real", "cg"), default="real", help="cg: pairs, with control_name")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry_run",
        action="store_true",
        help="tell what would be encoded and how long it would take; write no latents",
    )
    instead.add_argument(
        "--preview",
        metavar="DIR",
        help="encode a few clips of each bucket, show there how they come back, and stop",
    )
    add_clip_options(parser)
    return parser


def main():
    args = build_parser().parse_args()
    check_clip_options(args)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    require_joined(accelerator)
    watchdog = Watchdog(accelerator, 60 * DEFAULT_TIMEOUT_MINUTES)

    def read():
        with watchdog.main_process_first():
            manifest = read_manifest(args.dataset, args.domain, args)
        if accelerator.is_main_process:
            manifest.report()
        return manifest

    manifest = read()
    if args.dry_run:
        if accelerator.is_main_process:
            for line in project(manifest.clips, args, accelerator):
                print(f"dry run: {line}", flush=True)
    else:
        while True:
            chosen = choose_clips(manifest.clips) if args.preview is not None else {None: manifest.clips}
            if not encode_missing(itertools.chain(*chosen.values()), args, accelerator, watchdog).failures:
                break
            manifest = read()  # without them
        if accelerator.is_main_process and args.preview is not None:
            for line in write_preview(chosen, args.preview, args, accelerator.device):
                print(line, flush=True)
        elif accelerator.is_main_process:
            # Looked through once more, which the start of training is then spared.
            there = len(manifest.clips) - find_missing(manifest.clips, args).count
            print(f"{there} of {len(manifest.clips)} clips are in {manifest.cache_dir}", flush=True)
    watchdog.wait_for_everyone()
    watchdog.close()
    accelerator.end_training()


def project(clips, options, accelerator):
    """Lines that tell what an encoding pass would do, from a few clips of each bucket that are encoded and not kept.

    Args:
        clips, options, accelerator: see `encode_missing`; to be called on one process.
    """
    missing = find_missing(clips, options)
    needed = sum(missing.room.values())
    yield f"{missing.count:,} clips and {len(missing.texts):,} captions to encode, {needed / 1e9:.3g} GB of latents"
    missing.require_room()
    if not missing.clips:
        return
    vae = load_pipeline_part(options.pretrained_model_name_or_path, "vae", torch_dtype=torch.float32)
    vae.to(accelerator.device)
    batches = _Batches(missing.clips, options)
    of_bucket, total = {}, 0.0
    for number, batch in enumerate(batches.batches):
        of_bucket.setdefault(batch[0][1].bucket, []).append(number)
    for bucket, numbers in of_bucket.items():
        seconds = [_time_batch(vae, batches, number, accelerator.device) for number in numbers[: 1 + MEASURED_BATCHES]]
        warm = seconds[1:] or seconds  # the first one pays for the start
        here = len(numbers) * sum(warm) / len(warm) / accelerator.num_processes
        total += here
        count = sum(len(batches.batches[number]) for number in numbers)
        yield f"{bucket}: {count:,} clips, {here / 60:.1f} min with no worker ahead ({len(warm)} batches measured)"
    yield f"{total / 60:.1f} min in all on {accelerator.num_processes} processes, and the captions"


def _time_batch(vae, batches, number, device):
    started = time.perf_counter()
    decoded = [frames for *_, frames in batches[number] if isinstance(frames, torch.Tensor)]
    if decoded:
        _encode_batch(vae, decoded, device)[0][0].cpu()
    return _since(started)


if __name__ == "__main__":
    run(main)
