"""Several runs of the training scripts, one after another in the processes of one launch: most of a short run's time
is imports. Run by test_engines.py.

Each argument is a JSON list: a folder to copy first and its new parent, or an empty list; a script's name; options.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

from c2r.cli import run
from c2r.options import parse_options
from c2r.training.dry_run import RunRecord
from c2r.training.engine import build_accelerator


def main():
    accelerator = None
    for number, (copied, script, *options) in enumerate(map(json.loads, sys.argv[1:])):
        module = importlib.import_module(script)
        args = parse_options(module.build_parser(), options)
        accelerator = accelerator or build_accelerator(args)
        accelerator.project_configuration.logging_dir = f"{args.output_dir}/logs"
        Path(args.output_dir).mkdir(exist_ok=True)
        if copied and accelerator.is_main_process:
            shutil.copytree(copied[0], Path(copied[1]) / Path(copied[0]).name)
        accelerator.wait_for_everyone()
        accelerator.print(f"== run {number}", flush=True)
        module.train(args, accelerator, RunRecord())
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []
        accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
