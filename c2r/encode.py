"""Fill the cache: VAE latents and UMT5 prompt embeddings of every clip that has none yet.

    accelerate launch -m c2r.encode --dataset data/real
    accelerate launch -m c2r.encode --dataset data/cg --domain cg

Each process takes its share. Killed and started again, it goes on where it was. The training scripts do the same for
whatever is missing when they start. With --control_only it makes the DINOv3 features of the control instead, for
train_phase2.py --cache_control_features.
"""

import argparse
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator

from c2r import InputError
from c2r.cli import HelpFormatter, run
from c2r.data.buckets import buckets_of
from c2r.data.manifest import read_manifest
from c2r.data.mixture import read_on_all
from c2r.encoding.encoders import ControlEncoder, LatentEncoder
from c2r.encoding.encoding_pass import encode_control, encode_missing, project
from c2r.encoding.missing import find_missing, find_missing_control
from c2r.encoding.preview import choose_clips, write_preview
from c2r.models.dinov3 import check_dinov3
from c2r.options import (
    add_clip_options,
    add_dinov3_option,
    add_timeout_option,
    check_clip_options,
    check_timeout_option,
)
from c2r.training.engine import require_joined
from c2r.training.watchdog import Watchdog

# What DINOv3 runs in by phase 2's default --mixed_precision.
CONTROL_DTYPE = torch.bfloat16


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder or address with videos and metadata.csv")
    parser.add_argument("--domain", choices=("real", "cg"), default="real", help="cg: pairs, with control_name")
    parser.add_argument(
        "--control_only",
        action="store_true",
        help="make no latents, but the DINOv3 features of the control (in bf16, as by default in phase 2) of what is "
        "trained on",
    )
    add_dinov3_option(parser)
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
    add_timeout_option(parser)
    return parser


def main():
    args = build_parser().parse_args()
    check_clip_options(args)
    check_timeout_option(args)
    if args.preview is not None and Path(args.preview).exists() and not Path(args.preview).is_dir():
        raise InputError(f"--preview {args.preview}: is a file; give a folder")
    if args.control_only:
        if args.preview is not None:
            raise InputError("--preview: shows latents, which --control_only does not make; leave one out")
        check_dinov3(args.dinov3, [bucket[1:] for bucket in buckets_of(args)])
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    require_joined(accelerator)
    watchdog = Watchdog(accelerator, 60 * args.distributed_timeout_minutes)

    def read():
        return read_on_all(lambda: [read_manifest(args.dataset, args.domain, args)], accelerator, watchdog)[0]

    def look():
        if args.control_only:
            return find_missing_control(manifest.train, args, CONTROL_DTYPE)
        return find_missing(manifest.clips, args)

    def encode():
        if args.control_only:
            return encode_control(manifest.train, args, CONTROL_DTYPE, accelerator, watchdog)
        clips = chain(*chosen.values()) if args.preview is not None else manifest.clips
        return encode_missing(clips, args, accelerator, watchdog)

    manifest = read()
    if args.dry_run:
        load_encoder = partial(ControlEncoder, dtype=CONTROL_DTYPE) if args.control_only else LatentEncoder
        with watchdog.main_process_first():
            for line in project(look(), load_encoder, args, accelerator) if accelerator.is_main_process else ():
                print(f"dry run: {line}", flush=True)
    else:
        chosen = choose_clips(manifest.clips)
        while encode().failures:
            manifest = read()  # without them
            chosen = choose_clips(manifest.clips)
        with watchdog.main_process_first():
            if accelerator.is_main_process and args.preview is not None:
                for line in write_preview(chosen, args.preview, args, accelerator.device):
                    print(line, flush=True)
            elif accelerator.is_main_process:
                missing = look()  # which the start of training is then spared
                there = f"{missing.total - missing.count} of {missing.total} clips"
                print(f"{missing.kind} of {there} are in {manifest.cache_dir}", flush=True)
    watchdog.close()
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
