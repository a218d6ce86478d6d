"""The numbers of a training run: what a step logs, and the TensorBoard files."""

import time
from itertools import pairwise

import torch


def start_logs(accelerator, args, loop):
    """Open the logs, once everything that can be refused has been checked.

    What an earlier run that was killed has logged after the step from which this one goes on is taken back. So is that
    step itself if its validation is still to come: one that was killed in between may have logged it already.
    """
    config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
    again = loop.global_step == 0 or loop.validation_due(args)
    purge_step = loop.global_step if again else loop.global_step + 1
    accelerator.init_trackers("", config=config, init_kwargs={"tensorboard": {"purge_step": purge_step}})
    if again and loop.logs:
        accelerator.log(loop.logs, loop.global_step)


def tensorboard_writer(accelerator):
    """The run's `SummaryWriter`; None on other processes and with `--report_to none`."""
    return next((tracker.tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"), None)


# Edges of the noise levels that TensorBoard shows apart: low noise is detail, high noise is layout.
SIGMA_BINS = (0.0, 0.25, 0.5, 0.75, 1.0)

# Of the domain classifier.
ACCURACIES = ("domain_accuracy_real", "domain_accuracy_cg")


class StepLog:
    """The numbers of one optimizer step over all micro-batches and processes; losses by domain and noise level.

    Args:
        accelerator: the run's.
        before: what the last step before this run's first one has logged; running averages go on from it.
    """

    def __init__(self, accelerator, before=None):
        self.accelerator = accelerator
        self._accuracies = {name: (before or {}).get(f"train/{name}") for name in ACCURACIES}
        self._names = ["loss", "loss_real", "loss_cg"]
        self._names += [f"loss_sigma_{low}-{high}" for low, high in pairwise(SIGMA_BINS)]
        self._names += ["real_loss_share", "domain_loss", *ACCURACIES]
        self._reset()

    def _reset(self):
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64)  # losses (or hits), samples
        self._started = None

    def start(self):
        """Start the step's clock, unless it runs already: validation and saving between two steps do not count."""
        self._started = self._started or time.perf_counter()

    def add(self, losses, sigmas, domains):
        """Add one micro-batch: (B,) weighted losses, (B,) noise levels, (B,) domains, 0 real and 1 CG."""
        losses, sigmas = losses.detach().double().cpu(), sigmas.cpu()
        # The last bin includes 1.
        bins = torch.bucketize(sigmas, torch.tensor(SIGMA_BINS[1:-1]), right=True)
        for columns in (torch.zeros_like(bins), 1 + domains, 3 + bins):
            self._sums[0].index_add_(0, columns, losses)
            self._sums[1].index_add_(0, columns, torch.ones_like(losses))

    def add_weighted(self, losses, domains):
        """Add what one micro-batch is trained on, (B,) losses with the weights of their domains: real ones' share."""
        losses = losses.detach().double().cpu()
        column = self._names.index("real_loss_share")
        self._sums[:, column] += torch.stack([losses[domains == 0].sum(), losses.sum()])

    def add_domain_logits(self, losses, logits, domains, counted):
        """Add what the domain classifier said of one micro-batch: (B,) losses, logits, domains, and which count."""
        losses, hits, counted = losses.detach().double().cpu(), ((logits > 0).cpu() == domains).double(), counted.cpu()
        first = self._names.index("domain_loss")
        for columns, values in ((torch.zeros_like(domains), losses), (1 + domains, hits)):
            self._sums[0].index_add_(0, first + columns[counted], values[counted])
            self._sums[1].index_add_(0, first + columns[counted], torch.ones_like(values[counted]))

    def finish(self, **numbers):
        """The numbers by their TensorBoard names, with those given; starts the next step. Call on every process."""
        sums, samples = self.accelerator.reduce(self._sums.to(self.accelerator.device).float(), reduction="sum").cpu()
        logs = {f"train/{k}": (sums[i] / samples[i]).item() for i, k in enumerate(self._names) if samples[i]}
        # Also in a step without a sample that counts: a run that is resumed at it goes on from what is logged.
        if "train/domain_loss" in logs or None not in self._accuracies.values():
            logs |= self._running_accuracies(logs)
        logs["train/samples_per_second"] = samples[0].item() / (time.perf_counter() - self._started)
        if self.accelerator.device.type == "cuda":
            logs["train/gpu_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self._reset()
        return logs | {f"train/{k}": v for k, v in numbers.items()}

    def _running_accuracies(self, logs):
        """Accuracy over the last twenty or so steps in each domain, and the mean of the two: a step has too few."""
        for name, before in self._accuracies.items():
            before = 0.5 if before is None else before
            self._accuracies[name] = 0.95 * before + 0.05 * logs.get(f"train/{name}", before)
        accuracies = {f"train/{name}": value for name, value in self._accuracies.items()}
        return accuracies | {"train/domain_accuracy": sum(accuracies.values()) / 2}
