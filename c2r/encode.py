"""Fill the cache: VAE latents and UMT5 prompt embeddings of every clip that has none yet.

    accelerate launch -m c2r.encode --dataset data/real
    accelerate launch -m c2r.encode --dataset data/cg --domain cg

Each process takes its share. Killed and started again, it goes on where it was. The training scripts do the same for
whatever is missing when they start.
"""

import argparse
import gc
import itertools
import math
import shutil
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
from c2r.data.cache import (
    CLIP_TENSORS,
    PROMPT_TENSORS,
    CacheSettings,
    CheckedClips,
    cache_folder,
    clip_key,
    clip_path,
    is_complete,
    load_tensors,
    note_failure,
    prompt_path,
    save_tensors,
)
from c2r.data.folders import read_source
from c2r.data.manifest import read_manifest
from c2r.data.video import UnusableVideo
from c2r.engine import require_joined
from c2r.interruption import shield_worker
from c2r.models.parts import load_pipeline_part, resolve_model_folder
from c2r.models.weights import existing_parent, read_json
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


@dataclass
class Missing:
    """What the cache lacks.

    Batches are cut from all that there is, and so are the shares of the processes: one that looks a little later would
    see others' files and cut differently, and a clip's last bits may depend on its batch.
    """

    batches: list  #: of this process: list of (path, Clip) of one bucket, of which one at least is missing
    count: int  #: clips of all processes
    texts: dict  #: {path: text} of the missing clips' captions and of the empty one, of all processes
    room: dict  #: {cache folder: bytes of the missing latents}
    damaged: int  #: files that are there, but are not whole or not ours


def find_missing(clips, options, process_index=0, num_processes=1) -> Missing:
    """Look for what the cache lacks.

    Args:
        clips: iterable of `Clip`; those that come twice count once.
        options: see `encode_missing`.
        process_index, num_processes: whose share.
    """
    settings, cache_dir = CacheSettings.from_options(options), getattr(options, "cache_dir", None)
    found = Missing([], 0, {}, {}, 0)
    seen, open_batches, numbers, bytes_of = set(), {}, itertools.count(), _LatentBytes(options)
    caches = {}

    def close(batch):
        if next(numbers) % num_processes == process_index and any(missing for _, missing in batch):
            folders = [caches[clip.folder].cache_dir for clip, _ in batch]
            found.batches.append([(clip_path(f, clip, settings), clip) for f, (clip, _) in zip(folders, batch)])

    for clip in clips:
        if clip.folder not in caches:
            caches[clip.folder] = CheckedClips(cache_folder(clip.folder, cache_dir))
            found.texts[prompt_path(caches[clip.folder].cache_dir, "", settings)] = ""
        key = clip_key(clip, settings)
        if (number := int(key[:16], 16)) in seen:
            continue
        seen.add(number)
        missing = not caches[clip.folder].has(key)
        if missing:
            folder = caches[clip.folder].cache_dir
            found.count += 1
            found.damaged += clip_path(folder, clip, settings).exists()
            found.texts[prompt_path(folder, clip.text, settings)] = clip.text
            found.room[folder] = found.room.get(folder, 0) + bytes_of(clip.bucket)
        batch = open_batches.setdefault(clip.bucket, [])
        batch.append((clip, missing))
        if len(batch) == clips_at_once(clip.bucket):
            close(open_batches.pop(clip.bucket))
    for batch in open_batches.values():
        close(batch)
    for checked in caches.values():
        checked.save()
    found.damaged += sum(path.exists() and not is_complete(path, PROMPT_TENSORS) for path in found.texts)
    return found


def count_missing(clips, options) -> int:
    """How many of the clips `encode_missing` would encode."""
    return find_missing(clips, options).count


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
    settings = CacheSettings.from_options(options)
    missing = find_missing(clips, options, accelerator.process_index, accelerator.num_processes)
    _require_room(missing)
    if accelerator.is_main_process and missing.damaged:
        print(f"{missing.damaged} damaged files in the cache are encoded anew", flush=True)

    texts = list(missing.texts.items())[accelerator.process_index :: accelerator.num_processes]
    texts = [(path, text) for path, text in texts if not is_complete(path, PROMPT_TENSORS)]
    if texts:
        _encode_prompts(texts, options, settings, accelerator, watchdog)
    watchdog.wait_for_everyone()

    failures, seconds = [], 0.0
    if missing.batches:
        failures, seconds = _encode_clips(missing.batches, options, settings, accelerator, watchdog)
    watchdog.wait_for_everyone()
    if accelerator.num_processes > 1:
        failures = gather_object(failures)
        seconds = max(gather_object([seconds]))
    return Encoded(seconds / missing.count if missing.count else None, failures)


class _LatentBytes:
    """Bytes of a clip's latents in the cache: fp32 mean and fp16 log-variance of each number."""

    def __init__(self, options):
        folder = resolve_model_folder(options.pretrained_model_name_or_path, ["vae"])
        self.channels = read_json(folder / "vae/config.json")["z_dim"]

    def __call__(self, bucket):
        return 6 * self.channels * math.prod(bucket.latent_grid)


def _require_room(missing):
    """Raise InputError if a disk cannot hold the latents."""
    disks = {}  # datasets on one disk share its room
    for folder, needed in missing.room.items():
        there = existing_parent(folder)
        entry = disks.setdefault(there.stat().st_dev, [there, 0])
        entry[1] += needed
    for folder, needed in disks.values():
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"{folder}: {needed / 1e9:.2f} GB needed for the latents of {missing.count:,} clips, "
                f"{free / 1e9:.2f} GB free; make room, or give a --cache_dir on another disk"
            )


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
    """The batches' pixels; decoding runs in the data loader's workers while the VAE encodes."""

    def __init__(self, batches, options):
        self.batches = batches
        self.options = options

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        """(number, list of (F, 3, H, W) uint8, or of (Source, reason, detail) where a file fails)."""
        # Another pass may have been faster; and then this one decodes nothing.
        if all(is_complete(path, CLIP_TENSORS) for path, _ in self.batches[number]):
            return number, []
        return number, [self._frames(clip) for _, clip in self.batches[number]]

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
def _encode_clips(batches, options, settings, accelerator, watchdog):
    """Encode this process's batches; returns one line for each clip that failed, and the seconds that all took."""
    device = accelerator.device
    # fp32, as the pipeline decodes: in bf16 the latents lose more than the source's 8 bits.
    vae = load_pipeline_part(options.pretrained_model_name_or_path, "vae", torch_dtype=torch.float32).to(device)
    loader = DataLoader(
        _Batches(batches, options),
        batch_size=1,
        collate_fn=_one_item,
        num_workers=options.dataloader_num_workers,
        worker_init_fn=shield_worker,
        pin_memory=device.type == "cuda",
    )
    failures, not_finite, started, done = [], [], time.perf_counter(), 0
    total = sum(map(len, batches))
    with tqdm(total=total, desc="clips", unit="clip", disable=not accelerator.is_main_process) as bar:
        for number, frames in loader:
            batch = batches[number]
            watchdog.beat(f"encoding of {batch[0][1].name}")
            decoded = [(*entry, one) for entry, one in zip(batch, frames) if isinstance(one, torch.Tensor)]
            for source, reason, detail in (one for one in frames if not isinstance(one, torch.Tensor)):
                failures.append(detail)
                note_failure(_cache_of(source, options), source, reason, detail)
            if decoded:
                latents = encode_frames(vae, torch.stack([one for *_, one in decoded]).to(device))
                for (path, clip, _), mean, logvar in zip(decoded, *latents):
                    if not (mean.isfinite().all() and logvar.isfinite().all()):
                        not_finite.append(clip)
                    elif not is_complete(path, CLIP_TENSORS):
                        _save_clip(path, clip, mean, logvar, options, settings)
            done += len(batch)
            bar.set_postfix_str(f"all processes {accelerator.num_processes * done / _since(started):.2f} clips/s")
            bar.update(len(batch))
    if not_finite and len(not_finite) + len(failures) == total:
        raise InputError(
            f"{options.pretrained_model_name_or_path}: its VAE gives NaN for every clip, {not_finite[0].file} the "
            "first; check the VAE"
        )
    for clip in not_finite:
        failures.append(f"{clip.file}: the VAE gives latents that are not finite")
        note_failure(_cache_of(clip, options), clip.source, "non-finite latents", failures[-1])
    seconds = _since(started)
    del vae
    gc.collect()
    empty_device_cache()
    return failures, seconds


def _cache_of(source, options):
    return cache_folder(source.folder, getattr(options, "cache_dir", None))


def _since(started):
    return max(time.perf_counter() - started, 1e-9)


def _save_clip(path, clip, mean, logvar, options, settings):
    prompt, _ = load_tensors(prompt_path(_cache_of(clip, options), clip.text, settings))
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
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="tell what would be encoded and how long it would take; write no latents",
    )
    parser.add_argument(
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
    elif args.preview is not None:
        chosen = choose_clips(manifest.clips)
        encode_missing(itertools.chain(*chosen.values()), args, accelerator, watchdog)
        if accelerator.is_main_process:
            for line in write_preview(chosen, args.preview, args, accelerator.device):
                print(line, flush=True)
    else:
        encoded = encode_missing(manifest.clips, args, accelerator, watchdog)
        if encoded.failures:
            accelerator.print(f"{len(encoded.failures)} clips could not be encoded, the first: {encoded.failures[0]}")
            manifest = read()
        accelerator.print(f"all {len(manifest.clips)} clips are in {manifest.cache_dir}")
    watchdog.close()
    accelerator.end_training()


def project(clips, options, accelerator):
    """Lines that tell what an encoding pass would do, from a few clips of each bucket that are encoded and not kept.

    Args:
        clips, options, accelerator: see `encode_missing`; to be called on one process.
    """
    missing = find_missing(clips, options)
    texts = sum(not is_complete(path, PROMPT_TENSORS) for path in missing.texts)
    needed = sum(missing.room.values())
    yield f"{missing.count:,} clips and {texts:,} captions to encode, {needed / 1e9:.3g} GB of latents"
    _require_room(missing)
    if not missing.batches:
        return
    vae = load_pipeline_part(options.pretrained_model_name_or_path, "vae", torch_dtype=torch.float32)
    vae.to(accelerator.device)
    of_bucket = {}
    for batch in missing.batches:
        of_bucket.setdefault(batch[0][1].bucket, []).append(batch)
    total = 0.0
    for bucket, batches in of_bucket.items():
        seconds = [_time_batch(vae, batch, options, accelerator.device) for batch in batches[: 1 + MEASURED_BATCHES]]
        warm = seconds[1:] or seconds  # the first one pays for the start
        here = sum(map(len, batches)) / len(batches[0]) * sum(warm) / len(warm) / accelerator.num_processes
        total += here
        yield (
            f"{bucket}: {sum(map(len, batches)):,} clips, {sum(warm) / len(warm) / len(batches[0]):.3f} s each on one "
            f"process with no worker ahead (measured on {len(warm) * len(batches[0])}): {here / 60:.1f} min"
        )
    yield f"{total / 60:.1f} min in all on {accelerator.num_processes} processes, and the captions"


def _time_batch(vae, batch, options, device):
    started = time.perf_counter()
    _, frames = _Batches([batch], options)[0]
    decoded = [one for one in frames if isinstance(one, torch.Tensor)]
    if decoded:
        with torch.no_grad():
            encode_frames(vae, torch.stack(decoded).to(device))[0].cpu()
    return _since(started)


if __name__ == "__main__":
    run(main)
