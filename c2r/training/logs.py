"""The numbers that a training run logs in each step, and the start of its logs."""

import time
from argparse import Namespace
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator

from c2r.training.progress import Progress
from c2r.training.trackers import build_trackers
from c2r.units import GIB


def start_logs(accelerator: Accelerator, args: Namespace, progress: Progress, repeat_step: bool):
    """Open the logs, and remove what a killed run has logged after the step that this run resumes from.

    Args:
        accelerator: the run's.
        args: logged as the run's configuration.
        progress: from the checkpoint.
        repeat_step: also remove the numbers of that step and log them again, because its validation is still to come.
    """
    config = {name: _as_text(value) for name, value in vars(args).items()}
    purge_step = progress.global_step if repeat_step else progress.global_step + 1
    for tracker in accelerator.trackers:  # of the first leg of a dry run
        tracker.finish()
    accelerator.trackers.clear()
    # Built only now, because they must know the step: `Accelerator.init_trackers` would build each by its name.
    accelerator.log_with = build_trackers(accelerator, args, purge_step, resumed=progress.global_step > 0)
    accelerator.init_trackers("", config=config)
    if repeat_step and progress.logs:
        accelerator.log(progress.logs, progress.global_step)


def _as_text(value):
    """Return an option's value as trackers take it: a number or text."""
    if isinstance(value, int | float | str):
        return value
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


#: Bounds of the noise levels whose losses are logged apart: low noise is detail, high noise is layout.
SIGMA_BINS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Logged accuracies of the domain classifier.
ACCURACIES = ("domain_accuracy_real", "domain_accuracy_cg")


class StepLog:
    """Collects the numbers of one optimizer step over all micro-batches and processes.

    Args:
        accelerator: the run's.
        previous: numbers logged at the last step before this run; running averages continue from them.
        copies: processes that collect the numbers of the same clips.
    """

    def __init__(self, accelerator: Accelerator, previous: dict[str, float] | None = None, copies: int = 1):
        self.accelerator, self.copies = accelerator, copies
        self._accuracies = {name: (previous or {}).get(f"train/{name}") for name in ACCURACIES}
        self._names = ["loss", "loss_real", "loss_cg"]
        self._names += [f"loss_sigma_{low}-{high}" for low, high in pairwise(SIGMA_BINS)]
        self._names += ["real_loss_share", "domain_loss", *ACCURACIES]
        self._reset()

    def _reset(self) -> None:
        # Kept on the device: reading them in each micro-step would make the host wait for it.
        self._losses: list[tuple[torch.Tensor, ...]] = []  # losses, sigmas, domains
        self._weighted_losses: list[tuple[torch.Tensor, ...]] = []  # losses, domains
        self._domain_logits: list[tuple[torch.Tensor, ...]] = []  # losses, logits, domains, counted
        self._started: float | None = None

    def start(self):
        """Start the step's clock, unless it is running. Validation and saving between two steps are not timed."""
        self._started = self._started or time.perf_counter()

    def add(self, losses: torch.Tensor, sigmas: torch.Tensor, domains: torch.Tensor):
        """Add one micro-batch.

        Args:
            losses: (B,) weighted by noise level.
            sigmas: (B,) in [0, 1].
            domains: (B,) on CPU, 0 real and 1 CG.
        """
        self._losses.append((losses.detach(), sigmas, domains))

    def add_weighted(self, losses: torch.Tensor, domains: torch.Tensor):
        """Add the losses that one micro-batch is trained on, to log the share of the real samples in them.

        Args:
            losses: (B,) weighted by domain too.
            domains: (B,) on CPU.
        """
        self._weighted_losses.append((losses.detach(), domains))

    def add_domain_logits(
        self, losses: torch.Tensor, logits: torch.Tensor, domains: torch.Tensor, counted: torch.Tensor
    ):
        """Add the domain classifier's answers to one micro-batch.

        Args:
            losses, logits: (B,) of the classifier.
            domains: (B,) on CPU.
            counted: (B,) bool, samples that the classifier is trained on.
        """
        self._domain_logits.append((losses.detach(), logits.detach(), domains, counted))

    def finish(self, **numbers: Any) -> dict[str, float]:
        """Return the step's numbers and those given, by their TensorBoard names. Call it on every process."""
        sums = self._sums().to(self.accelerator.device).float()
        sums, samples = self.accelerator.reduce(sums, reduction="sum").cpu()
        logs = {f"train/{k}": (sums[i] / samples[i]).item() for i, k in enumerate(self._names) if samples[i]}
        # Also in a step without a counted sample: a run that resumes there continues from the logged numbers.
        if "train/domain_loss" in logs or None not in self._accuracies.values():
            logs |= self._running_accuracies(logs)
        assert self._started is not None
        clips = samples[0].item() / self.copies
        logs["train/samples_per_second"] = clips / (time.perf_counter() - self._started)
        if self.accelerator.device.type == "cuda":
            logs["train/gpu_memory_gib"] = torch.cuda.max_memory_reserved() / GIB
        self._reset()
        return logs | {f"train/{k}": v for k, v in numbers.items()}

    def _sums(self):
        """Return the sums of this process's losses (or hits) and their numbers, (2, names) float64 on CPU."""
        sums = torch.zeros(2, len(self._names), dtype=torch.float64)

        def add(columns, values):
            sums[0].index_add_(0, columns, values)
            sums[1].index_add_(0, columns, torch.ones_like(values))

        if self._losses:
            losses, sigmas, domains = _on_cpu(self._losses)
            # The last bin includes 1.
            bins = torch.bucketize(sigmas, torch.tensor(SIGMA_BINS[1:-1]), right=True)
            # Columns in the order of `_names`: the loss, those of the two domains, those of the noise levels.
            for columns in (torch.zeros_like(bins), 1 + domains, 3 + bins):
                add(columns, losses.double())
        if self._weighted_losses:
            losses, domains = _on_cpu(self._weighted_losses)
            losses = losses.double()
            sums[:, self._names.index("real_loss_share")] = torch.stack([losses[domains == 0].sum(), losses.sum()])
        if self._domain_logits:
            losses, logits, domains, counted = _on_cpu(self._domain_logits)
            first, hits = self._names.index("domain_loss"), ((logits > 0) == domains).double()
            for columns, values in ((torch.zeros_like(domains), losses.double()), (1 + domains, hits)):
                add(first + columns[counted], values[counted])
        return sums

    def _running_accuracies(self, logs):
        """Return each domain's accuracy over about twenty steps, and their mean: one step has too few samples."""
        for name, average in self._accuracies.items():
            average = 0.5 if average is None else average
            self._accuracies[name] = 0.95 * average + 0.05 * logs.get(f"train/{name}", average)
        accuracies = {f"train/{name}": value for name, value in self._accuracies.items()}
        return accuracies | {"train/domain_accuracy": sum(accuracies.values()) / 2}


def _on_cpu(micro_batches):
    """Return each column of the micro-batches' tensors as one tensor on the CPU."""
    return [torch.cat(column).cpu() for column in zip(*micro_batches)]
