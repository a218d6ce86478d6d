"""One start of a training script: its options, its progress, and the models that train."""

import logging
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from c2r import cli
from c2r.bars import bar_settings
from c2r.data.settings import ClipSettings
from c2r.models.adversary import DomainClassifier
from c2r.models.context_parallel import ContextParallel
from c2r.options.training_checks import chosen_trackers
from c2r.training.background import BackgroundWrite
from c2r.training.backward_step import StepInBackward
from c2r.training.failing_together import failing_together
from c2r.training.interruption import Interruption
from c2r.training.launched import launch_command, next_commands, resume_command
from c2r.training.logs import start_logs
from c2r.training.precision import frozen_dtype
from c2r.training.progress import Progress
from c2r.training.record import write_start
from c2r.training.timings import Timings
from c2r.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """The models and the optimizer of a run, from `c2r.training.setup.build_train_state`."""

    model: torch.nn.Module  #: prepared for the training engine: call this one
    trainable: ModelMixin  #: the part of it that trains, unwrapped
    optimizer: Any  #: prepared
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel | None
    domain_classifier: DomainClassifier | None = None
    step_in_backward: StepInBackward | None = None
    context_parallel: ContextParallel | None = None


class _TrainingBar(tqdm):
    """The bar of the training loop, whose remaining time includes evaluations and checkpoints to come."""

    def __init__(self, run: "Run", title: str):
        self._run = run
        super().__init__(
            total=run.args.max_train_steps,
            initial=run.progress.global_step,
            desc=title,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]",
            **bar_settings(run.accelerator.is_local_main_process),
        )

    @property
    def format_dict(self):
        return super().format_dict | {"left": self._run.time_left()}


@dataclass
class Run:
    """One start of a training script."""

    args: Namespace
    planned: Namespace  #: options of the run that a dry run rehearses; `args` itself otherwise
    accelerator: Accelerator
    settings: ClipSettings
    watchdog: Watchdog
    lock: TextIO | None  #: keeps other runs out of output_dir while this process lives
    checkpoint: Path | None  #: checkpoint to resume from
    progress: Progress
    timings: Timings
    interruption: Interruption | None = None  #: from `start_training` on
    saving: BackgroundWrite | None = None  #: the checkpoint that is being written; None when none is
    bar: tqdm | None = None

    @cached_property
    def command(self) -> list[str]:
        """The words that started the run, as far as they are known."""
        return launch_command()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def weight_dtype(self) -> torch.dtype:
        """dtype of frozen models."""
        return frozen_dtype(self.args.mixed_precision)

    @property
    def num_groups(self) -> int:
        """Groups of processes that draw the same clips; without context parallelism each process is one."""
        return self.accelerator.num_processes // self.args.context_parallel_degree

    @property
    def group_index(self) -> int:
        """Index of this process's group; neighbours form one, so that their connection is the fastest."""
        return self.accelerator.process_index // self.args.context_parallel_degree

    @property
    def samples_per_step(self) -> int:
        """Clips in one optimizer step, over all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.num_groups

    def start_training(self):
        """Open the logs and take over signals, once everything that can be refused has been checked."""
        # A run that was killed may have logged this step's validation without saving it.
        repeat_step = self.progress.global_step == 0 or self.validation_is_due()
        with failing_together(self.accelerator, self.args.output_dir):
            start_logs(self.accelerator, self.args, self.progress, repeat_step)
            if self.accelerator.is_main_process:
                write_start(self.accelerator, self.args, self.command)
        self.interruption = Interruption(self.args.save_every_minutes, self.args.save_before_timeout)
        self.timings.start()

    def steps(self, title: str) -> Iterator[int]:
        """Yield optimizer steps up to --max_train_steps; end early after a signal or before the Slurm slot ends."""
        self.bar = _TrainingBar(self, title)
        while self.progress.global_step < self.args.max_train_steps and not self.is_stopping():
            # A dry run times steps: none of them runs beside a write.
            if self.saving is not None and (self.args.dry_run or self.saving.has_ended()):
                self.finish_saving()
            yield self.progress.global_step

    def time_left(self) -> str:
        """Return the time that the run still takes, with "+" if a part has not been measured yet."""
        args = self.args
        intervals = {"validation": args.validation_steps, "checkpoint": args.checkpointing_steps}
        if getattr(args, "num_samples", 0) > 0:  # phase 1 has no samples
            intervals["sampling"] = args.sample_steps
        seconds, complete = self.timings.remaining(self.progress.global_step, args.max_train_steps, intervals)
        return "?" if math.isnan(seconds) else tqdm.format_interval(seconds) + "+" * (not complete)

    def finish_saving(self):
        """Wait for the checkpoint that is being written, if there is one. Call it on every process.

        Raises:
            InputError: it could not be written. The last checkpoint still exists.
        """
        if self.saving is not None:
            saving, self.saving = self.saving, None
            self.watchdog.beat(f"step {self.progress.global_step}: checkpoint")
            with self.timings.measure("checkpoint", part=True):
                saving.finish()
            self.timings.last["writing"] = saving.seconds

    def is_due(self, interval: int) -> bool:
        """Return True every `interval` steps and at the last step."""
        step = self.progress.global_step
        return step % interval == 0 or step == self.args.max_train_steps

    def validation_is_due(self) -> bool:
        """Return True if this step is to be validated; a resumed run catches up on a validation that was cut off."""
        done = self.progress.validated_step == self.progress.global_step
        return self.is_due(self.args.validation_steps) and not done and not self.is_stopping()

    def sampling_is_due(self) -> bool:
        """Return True if sample videos are to be made at this step; at step 0 the control has no effect yet."""
        done = self.progress.sampled_step == self.progress.global_step
        wanted = self.args.num_samples > 0 and self.progress.global_step > 0
        return wanted and self.is_due(self.args.sample_steps) and not done and not self.is_stopping()

    def checkpoint_is_due(self) -> bool:
        """Return True if a checkpoint is to be saved at this step."""
        return self.is_due(self.args.checkpointing_steps) or self.interruption.save

    def is_stopping(self) -> bool:
        """Return True if the run is to save and stop; the same on every process."""
        return self.interruption is not None and self.interruption.stop is not None

    def go_on(self, doing: str) -> bool:
        """Report this work to the watchdog, and return False if the run is to stop. Call it on every process."""
        self.watchdog.beat(f"step {self.progress.global_step}: {doing}")
        return self.interruption.agree(self.accelerator)

    def info(self, line: str):
        """Print a line that begins with the step."""
        logger.info("step %d: %s", self.progress.global_step, line)

    def log(self, prefix: str, numbers: dict[str, float]):
        """Log numbers at this step as `prefix/name`."""
        self.accelerator.log({f"{prefix}/{name}": n for name, n in numbers.items()}, self.progress.global_step)

    def end_training(self):
        """Close the progress bar and print the shares of time; a stopped run ends here with EXIT_STOPPED."""
        self.bar.close()
        self.finish_saving()
        logger.info("time: %s", self.timings.shares())
        if self.interruption.stop is not None:
            then = "a dry run keeps nothing" if self.args.dry_run else "continue with --resume_from_checkpoint latest"
            self.info(f"stopped: {self.interruption.stop}; {then}")
            if not self.args.dry_run:
                logger.info("checkpoints are in %s; to continue:", self.args.output_dir)
                logger.info("  %s", resume_command(self.command, self.args))
            self.watchdog.close()
            self.accelerator.end_training()
            sys.exit(cli.EXIT_STOPPED)

    def close(self):
        """Stop the watchdog, unlock the output folder, and print where the results are and what to type next."""
        self.watchdog.close()
        if self.lock is not None:
            self.lock.close()
        logger.info("final/ and best/ (%s) are in %s", self.progress.best_text, self.args.output_dir)
        if self.accelerator.is_main_process and not self.args.dry_run:
            for line in self._whereabouts():
                logger.info("  %s", line)

    def _whereabouts(self):
        """Yield lines that say what lies where, and the commands to type next."""
        out = Path(self.args.output_dir)
        folders = {
            "best": out / "best",
            "final": out / "final",
            "samples": out / "samples",
            "curves": out / "validation.png",
        }
        for name, path in folders.items():
            if path.exists():
                yield f"{name:8s} {path}"
        if "tensorboard" in chosen_trackers(self.args.report_to):
            yield f"{'logs':8s} tensorboard --logdir {shlex.quote(str(out))}"
        for name, command in zip(("next", ""), next_commands(self.command, self.args)):
            yield f"{name:8s} {command}"
