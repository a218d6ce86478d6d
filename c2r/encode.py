"""Fill the cache: VAE latents and UMT5 prompt embeddings of every clip that has none yet.

    accelerate launch -m c2r.encode --dataset data/real
    accelerate launch -m c2r.encode --dataset data/cg --domain cg

Each process takes its share. Killed and started again, it goes on where it was. The training scripts do the same for
whatever is missing when they start.
"""

import argparse
import gc
import json
import shutil
import time

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
    cache_folder,
    clip_path,
    is_complete,
    load_tensors,
    prompt_path,
    save_tensors,
    undecodable_path,
    write_atomic,
)
from c2r.data.manifest import Source, read_manifest
from c2r.data.video import read_window
from c2r.engine import require_joined
from c2r.interruption import shield_worker
from c2r.models.parts import load_pipeline_part, resolve_model_folder
from c2r.models.weights import existing_parent, read_json
from c2r.options import HelpFormatter, add_clip_options, run
from c2r.pipeline import max_sequence_length
from c2r.watchdog import DEFAULT_TIMEOUT_MINUTES, Watchdog


def encode_missing(clips, options, accelerator, watchdog=None):
    """Encode the clips that the cache lacks; returns when every process has done its share. Call it on every process.

    The text encoder is loaded only if a prompt is missing, the VAE only if latents are, and each is freed again.

    Args:
        clips: list of `Clip`, the same on every process.
        options: has height, width, num_frames, fps, pretrained_model_name_or_path, dataloader_num_workers, and
            perhaps cache_dir.
        accelerator: an `Accelerator`: whose device, and which share.
        watchdog: the run's `Watchdog`, through which a process that is done waits for the others, for any time; None:
            one of its own.

    Returns:
        seconds that a clip took, by all processes together; None if none was missing.

    Raises:
        InputError: no room for the latents; or files failed to decode. All others are encoded by then, and the
            failures noted: the next `read_manifest` drops them with their reasons.
    """
    watchdog = watchdog or Watchdog(accelerator, 60 * DEFAULT_TIMEOUT_MINUTES)
    settings = CacheSettings.from_options(options)
    folder_of = {clip.folder: cache_folder(clip.folder, getattr(options, "cache_dir", None)) for clip in clips}
    # Shares are cut from all that there is, not from what is missing: a process that looks a little later would see
    # others' files and cut differently.
    by_path = paths_of(clips, options, settings)
    missing = {path: clip for path, clip in by_path.items() if not is_complete(path, CLIP_TENSORS)}
    _require_room(missing, options)
    texts = {prompt_path(cache_dir, "", settings): "" for cache_dir in folder_of.values()}
    texts |= {prompt_path(folder_of[clip.folder], clip.text, settings): clip.text for clip in missing.values()}
    if accelerator.is_main_process:
        damaged = [path for path in missing if path.exists()]
        damaged += [path for path in texts if path.exists() and not is_complete(path, PROMPT_TENSORS)]
        if damaged:
            print(f"{len(damaged)} damaged files in the cache are encoded anew", flush=True)

    my_texts = [item for item in _share(texts, accelerator) if not is_complete(item[0], PROMPT_TENSORS)]
    if my_texts:
        _encode_prompts(my_texts, options, settings, accelerator, watchdog)
    watchdog.wait_for_everyone()

    my_clips = [item for item in _share(by_path, accelerator) if item[0] in missing]
    failures, seconds = [], 0.0
    if my_clips:
        failures, seconds = _encode_clips(my_clips, options, settings, folder_of, accelerator, watchdog)
    watchdog.wait_for_everyone()
    if accelerator.num_processes > 1:
        failures = gather_object(failures)
    if failures:
        raise InputError(
            f"{len(failures)} of {len(by_path)} clips cannot be decoded, the first: {failures[0]}; they are noted in "
            "the cache: run the same command again to go on without these files"
        )
    return seconds / len(my_clips) / accelerator.num_processes if my_clips else None


def paths_of(clips, options, settings):
    """{path in the cache: clip}, whether it is there or not."""
    return {
        clip_path(cache_folder(clip.folder, getattr(options, "cache_dir", None)), clip, settings): clip
        for clip in clips
    }


def count_missing(clips, options):
    """How many of the clips `encode_missing` would encode."""
    paths = paths_of(clips, options, CacheSettings.from_options(options))
    return sum(not is_complete(path, CLIP_TENSORS) for path in paths)


def _require_room(missing, options):
    """Raise InputError if the disk cannot hold the latents: fp32 mean and fp16 log-variance of each number."""
    folder = resolve_model_folder(options.pretrained_model_name_or_path, ["vae"])
    channels = read_json(folder / "vae/config.json")["z_dim"]
    latent_frames = (options.num_frames - 1) // 4 + 1
    one = 6 * channels * latent_frames * (options.height // 8) * (options.width // 8)
    disks = {}  # datasets on one disk share its room
    for clip in missing.values():
        folder = existing_parent(cache_folder(clip.folder, getattr(options, "cache_dir", None)))
        disks.setdefault(folder.stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed, free = one * len(folders), shutil.disk_usage(folders[0]).free
        if free < needed:
            raise InputError(
                f"{folders[0]}: {needed / 1e9:.2f} GB needed for the latents of {len(folders):,} clips, "
                f"{free / 1e9:.2f} GB free; make room, or give a --cache_dir on another disk"
            )


def _share(items, accelerator):
    return list(items.items())[accelerator.process_index :: accelerator.num_processes]


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


class _Windows(Dataset):
    """The clips' pixels; decoding runs in the data loader's workers while the VAE encodes."""

    def __init__(self, clips, settings):
        self.clips = clips
        self.settings = settings

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        """(index, (F, 3, H, W) uint8, None), or (index, None, (which of the two files failed, why))."""
        clip, shape = self.clips[index], self.settings
        # The coarse video is not encoded, but a pair whose control fails must not be found out in the midst of
        # training, nor a real clip whose coarse version does in the midst of validation.
        for file in filter(None, (clip.coarse_file, clip.file)):
            try:
                frames = read_window(file, clip.start, shape.num_frames, shape.fps, shape.height, shape.width)
            except InputError as error:
                return index, None, (file == clip.coarse_file, str(error))
        return index, frames, None


def _one_item(items):
    return items[0]


@torch.no_grad()
def _encode_clips(items, options, settings, folder_of, accelerator, watchdog):
    """Encode this process's clips; returns one line for each that failed, and the seconds that all took."""
    device = accelerator.device
    # fp32, as the pipeline decodes: in bf16 the latents lose more than the source's 8 bits.
    vae = load_pipeline_part(options.pretrained_model_name_or_path, "vae", torch_dtype=torch.float32).to(device)
    loader = DataLoader(
        _Windows([clip for _, clip in items], settings),
        batch_size=1,
        collate_fn=_one_item,
        num_workers=options.dataloader_num_workers,
        worker_init_fn=shield_worker,
        pin_memory=device.type == "cuda",
    )
    failures, started = [], time.perf_counter()
    with tqdm(total=len(items), desc="clips", unit="clip", disable=not accelerator.is_main_process) as bar:
        for done, (index, frames, failure) in enumerate(loader, start=1):
            path, clip = items[index]
            watchdog.beat(f"encoding of {clip.name}")
            if failure is None:
                _encode_clip(vae, path, clip, frames.to(device), options, settings, folder_of[clip.folder])
            else:
                failures.append(failure[1])
                _note_undecodable(clip, *failure, folder_of[clip.folder])
            bar.set_postfix_str(f"all processes {accelerator.num_processes * done / _since(started):.2f} clips/s")
            bar.update()
    seconds = _since(started)
    del vae
    gc.collect()
    empty_device_cache()
    return failures, seconds


def _since(started):
    return max(time.perf_counter() - started, 1e-9)


def _encode_clip(vae, path, clip, frames, options, settings, cache_dir):
    mean, logvar = encode_frames(vae, frames)
    if not (mean.isfinite().all() and logvar.isfinite().all()):
        raise InputError(f"{options.pretrained_model_name_or_path}: its VAE gives NaN for {clip.file}; check the VAE")
    prompt, _ = load_tensors(prompt_path(cache_dir, clip.text, settings))
    metadata = _provenance(
        options,
        file=clip.name,
        size=clip.size,
        mtime_ns=clip.mtime_ns,
        window=clip.window,
        start=clip.start,
        text=clip.text,
        settings=vars(settings),
    )
    # The log-variance says how much noise to add: half precision is plenty.
    save_tensors(path, {"latents_mean": mean, "latents_logvar": logvar.half(), **prompt}, metadata)


def encode_frames(vae, frames):
    """The distribution of a clip's normalised latents, z' = (z − latents_mean) / latents_std per channel.

    Args:
        vae: AutoencoderKLWan.
        frames: (F, 3, H, W) uint8 RGB on the VAE's device; F = 4k + 1.

    Returns:
        mean and log-variance of z', each (C, T, H/8, W/8) fp32; WanPipeline undoes the normalisation before decoding.
    """
    pixel_values = frames.to(vae.dtype).div(127.5).sub(1).permute(1, 0, 2, 3)[None]  # (1, 3, F, H, W) in [-1, 1]
    distribution = vae.encode(pixel_values).latent_dist
    shift, scale = (
        torch.tensor(statistic, device=frames.device, dtype=torch.float32).view(-1, 1, 1, 1)
        for statistic in (vae.config.latents_mean, vae.config.latents_std)
    )
    mean = (distribution.mean[0].float() - shift) / scale
    logvar = distribution.logvar[0].float() - 2 * scale.log()  # Var[z'] = Var[z] / latents_std²
    return mean, logvar


def _note_undecodable(clip, in_control, reason, cache_dir):
    if in_control:
        source = Source(clip.folder, clip.control_name, clip.control_size, clip.control_mtime_ns)
    else:
        source = Source(clip.folder, clip.name, clip.size, clip.mtime_ns)
    note = {"file": source.name, "reason": reason}
    write_atomic(undecodable_path(cache_dir, source), json.dumps(note).encode())


# -------------------------------------------------------------------------------------------------------- command line


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder with videos and metadata.csv")
    parser.add_argument("--domain", choices=("real", "cg"), default="real", help="cg: pairs, with control_name")
    add_clip_options(parser)
    return parser


def main():
    args = build_parser().parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    require_joined(accelerator)
    watchdog = Watchdog(accelerator, 60 * DEFAULT_TIMEOUT_MINUTES)
    with watchdog.main_process_first():
        manifest = read_manifest(args.dataset, args.domain, args)
    if accelerator.is_main_process:
        manifest.report()
    encode_missing(manifest.clips, args, accelerator, watchdog)
    accelerator.print(f"all {len(manifest.clips)} clips are in {manifest.cache_dir}")
    watchdog.close()
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
