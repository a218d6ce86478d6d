"""Fill the cache: VAE latents and UMT5 prompt embeddings of every clip that has none yet.

    accelerate launch -m c2r.encode --dataset data/real
    accelerate launch -m c2r.encode --dataset data/cg --domain cg

Each process encodes a share of the clips. A killed command continues when it is started again. The training scripts
encode missing clips themselves when they start. With --control_only the command makes DINOv3 features of the controls
instead, for train_phase2.py --cache_control_features.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

import logging
import shlex
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from c2r import InputError, cli
from c2r.data.settings import ClipSettings
from c2r.options import ENCODE
from c2r.options.shared import clip_option_words, clip_settings

logger = logging.getLogger("c2r.encode")  # under python -m, __name__ is "__main__"

if TYPE_CHECKING:
    from accelerate import Accelerator

    from c2r.data.manifest import Manifest
    from c2r.encoding.encoding_pass import EncodingJob
    from c2r.training.watchdog import Watchdog


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(ENCODE, argv)
    check_options(args)

    import torch
    from accelerate import Accelerator

    from c2r.encoding.encoding_pass import control_job, latent_job
    from c2r.models.dinov3 import check_dinov3
    from c2r.models.parts import check_pipeline_parts
    from c2r.training.engine import require_joined, require_known_settings
    from c2r.training.watchdog import Watchdog, joining

    settings = clip_settings(args)
    if args.control_only:
        check_dinov3(args.dinov3, [(bucket.height, bucket.width) for bucket in settings.buckets])
        job = control_job(settings, args.dinov3, torch.bfloat16)  # the dtype of phase 2's default --mixed_precision
    else:
        check_pipeline_parts(settings.base_model)
        job = latent_job(settings)
    require_known_settings()
    with joining(60 * args.distributed_timeout_minutes):
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        accelerator.wait_for_everyone()  # NCCL connects at the first collective
    require_joined(accelerator)
    watchdog = Watchdog(accelerator, 60 * args.distributed_timeout_minutes)
    read = partial(read_dataset, args.dataset, args.domain, settings, accelerator, watchdog)

    if args.dry_run:
        print_estimate(read(), job, accelerator, watchdog)
    elif args.preview is not None:
        make_preview(read, job, args, accelerator, watchdog)
    else:
        fill_cache(read, job, args.control_only, accelerator, watchdog)
        if accelerator.is_main_process:
            print(f"next: {next_command(args)}", flush=True)
    watchdog.close()
    accelerator.end_training()


def next_command(args: Namespace) -> str:
    """Return the line that trains on the encoded clips."""
    launch = ["accelerate", "launch", "--config_file", "accelerate_configs/single_gpu.yaml"]
    if args.domain == "real" and not args.control_only:
        words = ["train_phase1.py", "--real_dataset", args.dataset, "--output_dir", "outputs/phase1"]
    else:
        real, cg = (args.dataset, "data/cg") if args.domain == "real" else ("data/real", args.dataset)
        words = ["train_phase2.py", "--resume_backbone_from", "outputs/phase1/best", "--real_dataset", real]
        words += ["--cg_dataset", cg, "--output_dir", "outputs/phase2"]
        words += ["--cache_control_features"] if args.control_only else []
    return shlex.join([*launch, *words, *clip_option_words(args)])


def check_options(args: Namespace) -> None:
    """Raise InputError for options that exclude each other, and if --preview names a file."""
    if args.preview is None:
        return
    if args.dry_run:
        raise InputError(f"--preview {args.preview}: needs latents, which --dry_run does not write; leave one out")
    if args.control_only:
        raise InputError(f"--preview {args.preview}: shows latents, which --control_only does not make; leave one out")
    if Path(args.preview).exists() and not Path(args.preview).is_dir():
        raise InputError(f"--preview {args.preview}: is a file; give a folder")


def read_dataset(
    address: str, domain: str, settings: ClipSettings, accelerator: "Accelerator", watchdog: "Watchdog"
) -> "Manifest":
    """Read a dataset on every process."""
    from c2r.data.manifest import read_manifest
    from c2r.data.mixture import read_on_all
    from c2r.encoding.cache import current_encoders

    def read():
        return [read_manifest(address, domain, settings, current_encoders(settings))]

    (manifest,) = read_on_all(read, accelerator, watchdog)
    if domain == "real" and manifest.clips.tables[0].control_names.null_count == 0:
        logger.warning(
            f"{address}: every row names a control_name, as CG pairs do; if this is CG, give --domain cg: real clips "
            "are their own control in training"
        )
    return manifest


def print_estimate(manifest: "Manifest", job: "EncodingJob", accelerator: "Accelerator", watchdog: "Watchdog") -> None:
    """Print what would be encoded and how long it would take."""
    from c2r.encoding.encoding_pass import estimate_encoding

    with watchdog.main_process_first():
        if accelerator.is_main_process:
            missing = job.find_missing(job.clips_of(manifest))
            for line in estimate_encoding(missing, job, accelerator):
                print(f"dry run: {line}", flush=True)


def make_preview(
    read: Callable[[], "Manifest"],
    job: "EncodingJob",
    args: Namespace,
    accelerator: "Accelerator",
    watchdog: "Watchdog",
) -> None:
    """Encode a few clips of each bucket and write contact sheets of them.

    Raises:
        InputError: no clip's file matches --preview_files.
    """
    from c2r.encoding.encoding_pass import encode
    from c2r.encoding.preview import choose_clips, write_preview

    def choose():
        return choose_clips(job.clips_of(read()), args.preview_count, args.preview_files)

    chosen = choose()
    while encode(chain(*chosen.values()), job, accelerator, watchdog).failures:
        chosen = choose()  # the files that failed are dropped
    if not chosen:
        raise InputError(f"--preview_files {args.preview_files}: no clip's file matches it; see the list of clips")
    with watchdog.main_process_first():
        if accelerator.is_main_process:
            for line in write_preview(chosen, args.preview, job.settings, accelerator.device):
                print(line, flush=True)


def fill_cache(
    read: Callable[[], "Manifest"],
    job: "EncodingJob",
    control_only: bool,
    accelerator: "Accelerator",
    watchdog: "Watchdog",
) -> None:
    """Encode the clips that are not cached and print how many are cached now."""
    from c2r.encoding.encoding_pass import encode

    manifest = read()
    while encode(job.clips_of(manifest), job, accelerator, watchdog).failures:
        manifest = read()  # the files that failed are dropped
    with watchdog.main_process_first():
        if accelerator.is_main_process:
            missing = job.find_missing(job.clips_of(manifest))  # also records checked files: training starts faster
            cached = missing.total - missing.count
            print(f"{missing.kind} of {cached} of {missing.total} clips are in {manifest.cache_dir}", flush=True)
            if not control_only:
                list_long_captions(manifest, job)


def list_long_captions(manifest: "Manifest", job: "EncodingJob") -> None:
    """Write into the list of clips which captions are longer than the text encoder sees."""
    from c2r.models.parts import load_pipeline_part, long_prompts, max_sequence_length

    tokenizer = load_pipeline_part(job.settings.base_model, "tokenizer")
    limit = max_sequence_length(tokenizer)
    captions = manifest.clips.tables[0].texts.unique().to_pylist()
    long = long_prompts(tokenizer, captions)
    if long:
        manifest.write({text: f"caption of {count} tokens, {limit} are used" for text, count in long.items()})


if __name__ == "__main__":
    cli.run(main)
