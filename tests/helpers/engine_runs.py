"""Run several training scripts one after another in the processes of one launch: imports take most of a short run.

The first argument is a JSON list of the arguments of `engine_probe.measure`, or an empty list. Each further argument
is a JSON list: a folder to copy first and its new parent, or an empty list; a script's name; its options.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch

from c2r import cli
from c2r.options import PHASE1, PHASE2
from c2r.training.engine import build_accelerator
from c2r.training.setup import start_run
from tests.helpers import engine_probe

COMMANDS = {"train_phase1": PHASE1, "train_phase2": PHASE2}


def main():
    probed, *runs = map(json.loads, sys.argv[1:])
    accelerator = None
    for number, (copied, script, *options) in enumerate(runs):
        module = importlib.import_module(script)
        args = cli.parse(COMMANDS[script], options)
        if accelerator is None:
            accelerator = build_accelerator(args)
            if probed:  # first, while these processes hold little memory
                torch.distributed.all_reduce(torch.ones(1))  # opens the connections
                engine_probe.measure(accelerator, *probed)
        accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
        if (plugin := getattr(accelerator.state, "deepspeed_plugin", None)) is not None:
            plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": args.train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
                # DeepSpeed counts processes that share clips one by one.
                "train_batch_size": args.train_batch_size
                * args.gradient_accumulation_steps
                * accelerator.num_processes,
            }
        accelerator.project_configuration.logging_dir = f"{args.output_dir}/logs"
        Path(args.output_dir).mkdir(exist_ok=True)
        if copied and accelerator.is_main_process:
            shutil.copytree(copied[0], Path(copied[1]) / Path(copied[0]).name)
        accelerator.wait_for_everyone()
        if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
            plugin.transformer_cls_names_to_wrap = None  # chosen again for each model, as in a launch of its own
        accelerator.print(f"== run {number}", flush=True)
        module.train(start_run(args, accelerator))
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []
        accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
