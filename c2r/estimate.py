"""Compute what a run takes before it runs: memory by stage and kind, FLOPs, disk, and time at a given rate.

    python -m c2r.estimate --model 1.3b --phase 2
    python -m c2r.estimate --model 14b --phase 1 --engine fsdp2 --num_processes 8
    python -m c2r.estimate --model 1.3b --phase 1 --fit 24GB

The models' own code and the training step run on tensors without memory, see `c2r.estimation`. No weights are read.
"""

import math
from argparse import Namespace
from functools import partial
from typing import Any

from c2r import InputError, cli
from c2r.data.buckets import Bucket
from c2r.options import ESTIMATE, PHASE1, PHASE2
from c2r.options.presets import option_words
from c2r.options.training_checks import check_modes, require_frozen_backbone
from c2r.units import GIB


def training_options(args: Namespace) -> Namespace:
    """Return the options of the phase's training script: those given here, and its defaults."""
    command = PHASE1 if args.phase == "1" else PHASE2
    values = {name: option.default for name, option in command.options.items()}
    given = {name: value for name, value in vars(args).items() if name in values and value is not None}
    return Namespace(**values | given)


def command_line(args: Namespace, changes: dict[str, Any]) -> str:
    """Return the command of a run: the training options that were given here, and changes to them."""
    defaults = {name: option.default for name, option in ESTIMATE.options.items()}
    trained = (PHASE1 if args.phase == "1" else PHASE2).options.keys() - {"preset"}  # whose options are given too
    given = {name: value for name, value in vars(args).items() if name in trained and value != defaults[name]}
    words = ["accelerate launch", f"--config_file accelerate_configs/{args.engine}.yaml"]
    if args.num_processes > 1:
        words.append(f"--num_processes {args.num_processes}")
    words.append(f"train_phase{args.phase}.py")
    return " ".join([*words, option_words(given | changes)]).rstrip()


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(ESTIMATE, argv)
    training = training_options(args)

    from c2r.estimation.configs import read_configs
    from c2r.estimation.fit import RESERVED, find_fit
    from c2r.estimation.measure import measure_step, require_gpu
    from c2r.estimation.report import estimate_run, flops_table, memory_table, other_lines
    from c2r.estimation.stages import STEP
    from c2r.training.engine import SHARDING, check_options

    def check(options):
        require_frozen_backbone(options)
        check_modes(options)
        check_options(options, SHARDING[args.engine], args.num_processes)

    check(training)
    if args.measure:
        require_gpu()
    configs = read_configs(args.model, args.dinov3)
    buckets = args.buckets or [Bucket(args.num_frames, args.height, args.width)]
    bucket = max(buckets, key=lambda bucket: math.prod(bucket.latent_grid))
    estimate_of = partial(
        estimate_run,
        configs=configs,
        bucket=bucket,
        engine=args.engine,
        num_processes=args.num_processes,
        cpu_offload=args.cpu_offload,
        vae_tiling=args.vae_tiling,
    )

    def supported(options):
        try:
            check(options)
        except InputError:
            return False
        return True

    if args.fit is None:
        estimate = estimate_of(training)
    else:
        # These options of c2r.generate cost little time beside the denoising steps.
        fit = find_fit(training, args.fit, partial(estimate_of, cpu_offload=True, vae_tiling=True), supported)
        estimate, training = fit.estimate, fit.args
        margin = args.fit - RESERVED - estimate.total(estimate.largest)
        print(
            f"fits {args.fit / GIB:g} GB with {margin / GIB:.1f} GiB to spare, if c2r.generate is given --cpu_offload "
            f"--vae_tiling: {command_line(args, fit.changes)}"
        )
    print(
        f"{args.model}, phase {args.phase}, {bucket}, batch {training.train_batch_size}, {args.engine} on "
        f"{args.num_processes}: computed, not measured"
    )
    for table in (memory_table(estimate), flops_table(estimate), other_lines(training, estimate, args.tflops)):
        print()
        print("\n".join(table), flush=True)
    if args.measure:
        measured, computed = measure_step(training, configs, bucket), estimate.total(STEP)
        print(
            f"\nmeasured: {measured.peak / GIB:.2f} GiB allocated at the peak of a training step, "
            f"{computed / GIB:.2f} computed; {measured.reserved / GIB:.2f} GiB reserved; {measured.seconds:.3g} s for "
            "a micro-step and the optimizer's step"
        )


if __name__ == "__main__":
    cli.run(main)
