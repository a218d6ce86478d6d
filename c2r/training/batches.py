"""The endless stream of training batches."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from c2r.data.workers import shield_worker, usable_workers
from c2r.sampler import MixedCGRealSampler
from c2r.training.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """The samples of the run that a micro-batch of this process holds: all its randomness follows from their numbers.

    One GPU with two micro-batches and two GPUs with one draw the same: they have the same numbers.
    """

    numbers: list[int]  #: of its samples, counted from the start of training over all processes
    first_of_step: int  #: lowest number in the optimizer step
    samples_per_step: int  #: over all processes and micro-batches


class TrainBatches:
    """Loads the batches that the sampler chooses, and counts those that a step has taken.

    Args:
        run: the script's run.
        dataset: the dataset that the sampler's indices refer to.
        sampler: chooses the batches. It gives each process its share already, so Accelerate must not prepare the
            loader.
    """

    def __init__(self, run: Run, dataset: Dataset, sampler: MixedCGRealSampler):
        self._run, self._sampler = run, sampler
        micro_steps = run.args.max_train_steps * run.args.gradient_accumulation_steps
        num_workers = usable_workers(run.settings.num_workers, micro_steps)
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            # A worker that fails while it sends a batch drops it and goes on, and the loop would wait without end.
            timeout=run.watchdog.timeout_seconds if num_workers else 0,
            worker_init_fn=shield_worker,
            pin_memory=run.device.type == "cuda",
        )
        self._batches: Iterator[dict] | None = None
        _log_small_buckets(sampler, run.settings.buckets)

    def of_one_step(self) -> Iterator[tuple[Draw, dict]]:
        """Yield each micro-batch of the next optimizer step and which samples it holds."""
        if self._batches is None:  # not earlier: a resumed sampler must be at its position when loading starts
            self._batches = iter(self._loader)
        step = self._run.progress.global_step + 1
        first = self._sampler.num_consumed
        for _ in range(self._run.args.gradient_accumulation_steps):
            self._run.watchdog.beat(f"step {step}: data")
            with self._run.timings.measure("waiting for data"):
                batch = next(self._batches)
            numbers = self._sampler.mark_consumed()
            self._run.watchdog.beat(f"step {step}: forward and backward")
            yield Draw(numbers, first, self._run.samples_per_step), batch


def _log_small_buckets(sampler, buckets):
    """Log the buckets whose clips are fewer than a global batch."""
    for number, count in sampler.small_buckets().items():
        logger.info(
            f"bucket {buckets[number]}: its {count} clips are fewer than a batch over all processes, "
            f"{sampler.batch_size * sampler.num_processes}, so batches repeat them; add clips, or leave the bucket out"
        )
