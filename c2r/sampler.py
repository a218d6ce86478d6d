"""Choose the clips of every training step: an exact mix of CG and real that a resumed run continues exactly."""

import hashlib
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from c2r import InputError


@dataclass(frozen=True)
class _Position:
    """A position in the global order: with the seed and the datasets it determines every batch to come."""

    drawn: tuple  # samples of each part that the stream has given
    queues: dict  # {bucket: indices that wait for their batch, the oldest first}
    batches: int = 0
    # Number of CG samples that the ratios have asked for. Exact: as a float, 0.2 is not a fifth, and errors add up.
    cg_due: Fraction = Fraction(0)

    @property
    def emitted(self):
        """Samples in all batches up to this position."""
        return sum(self.drawn) - sum(map(len, self.queues.values()))


@dataclass(frozen=True)
class _Part:
    """A dataset of a domain, walked in epochs of its own."""

    name: str  # seeds its random stream
    first_index: int  # index of its first sample in the concatenation
    length: int
    weight: int  # it gives weight / total_weight of its domain's samples
    total_weight: int  # sum over the domain
    is_cg: bool


class MixedCGRealSampler:
    """Batch sampler over the concatenation [real, cg] with an exact share of CG at any batch size.

    The order is global: all processes compute the same batches of `batch_size * num_processes` samples, and each takes
    its slice, so nothing is communicated. The order begins with one endless stream of samples. Error diffusion decides
    which of them are CG: after every sample, the number of CG samples drawn is the number that `cg_ratio` asks for,
    rounded. (`int(batch_size * cg_ratio)` would always be 0 for small batches.) Within a domain the part that is
    furthest behind its weight comes next, and each part is walked in shuffled epochs without repeats.

    Each sample of the stream waits in the queue of its bucket. A queue that is long enough becomes the next batch, so
    all processes have the same bucket at the same step. No sample is skipped or replaced. With one bucket no sample
    ever waits, and the CG share is exact at every batch; with several, it is exact over the stream, and batches differ
    from it by the samples that wait. Places in a batch are shuffled; otherwise one process would see all the CG.

    Iteration never ends, and starts after the last consumed batch. A DataLoader draws batches ahead of the loop that
    trains on them. To keep batches that no step has seen out of the saved state, the loop calls `mark_consumed()` once
    per batch that it takes. Use it as `DataLoader(dataset, batch_sampler=sampler)`, and do not pass that DataLoader to
    `accelerator.prepare`, which would split the batches once more.

    Args:
        real_dataset, cg_dataset: the two datasets, or their lengths. Indices from `len(real_dataset)` on are CG.
        cg_ratio: share of CG samples in [0, 1]. A decimal number is taken as written: 0.2 is 1/5.
        batch_size: samples per batch of one process.
        seed: determines the order of the epochs and the places within the batches.
        num_processes, process_index: number of processes, and index of this one.
        buckets: bucket number of each sample of the concatenation; None: all samples have the same bucket.
        real_parts, cg_parts: [(length, weight), …] of the datasets that the domain consists of, one after the other.
            Weights are shares of the domain's samples, independent of the lengths: 2 and 1 are two thirds and one
            third. None: a single part.

    Raises:
        InputError: if a domain that the ratio asks for is empty, or the ratio, a weight or the batch size is out of
            range.
        ValueError: if process_index is out of range, or buckets or parts do not fit the lengths of the datasets.
    """

    def __init__(
        self,
        real_dataset: Sized | int,
        cg_dataset: Sized | int,
        cg_ratio: float | str = 0.2,
        batch_size: int = 1,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        buckets: Sequence[int] | np.ndarray | None = None,
        real_parts: Iterable[tuple[int, float | str]] | None = None,
        cg_parts: Iterable[tuple[int, float | str]] | None = None,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}: it must be in 0..{num_processes - 1}")
        self.num_real, self.num_cg = (d if isinstance(d, int) else len(d) for d in (real_dataset, cg_dataset))
        self.batch_size = _checked_batch_size(batch_size)
        self.seed = seed
        self.num_processes, self.process_index = num_processes, process_index
        self._parts = _parts("real", 0, self.num_real, real_parts)
        self._parts += _parts("cg", self.num_real, self.num_cg, cg_parts)
        self._buckets = None if buckets is None else np.asarray(buckets)
        if buckets is not None and len(self._buckets) != self.num_real + self.num_cg:
            raise ValueError(f"{len(self._buckets)} buckets for {self.num_real} real and {self.num_cg} CG samples")

        self._consumed = _Position(drawn=(0,) * len(self._parts), queues={})
        # Batches that were drawn but not yet consumed, oldest first: their samples' numbers, and the position after.
        self._in_flight: deque[tuple[list[int], _Position]] = deque()
        # {first batch: share of CG from it on}. A change while batches are in flight must keep its number: a resume
        # draws these batches again, and they had the old share.
        self._ratios = {0: self._checked_ratio(cg_ratio)}
        self._epoch_orders: dict[str, tuple[int, list[int]]] = {}  # {part: (epoch, order)}

    def __iter__(self) -> Iterator[list[int]]:
        self._in_flight.clear()
        while True:
            indices, numbers, position = self._draw(self.batch_size)
            self._in_flight.append((numbers, position))
            yield indices

    def sample_batch(self, batch_size: int) -> list[int]:
        """Draw one batch and count it as consumed, for loops without a DataLoader.

        Args:
            batch_size: samples for each process; may differ from call to call.

        Returns:
            This process's indices.

        Raises:
            RuntimeError: if a DataLoader has drawn batches that are not consumed yet.
        """
        if self._in_flight:
            raise RuntimeError(
                f"{len(self._in_flight)} batches are in flight: do not mix sample_batch and a DataLoader"
            )
        indices, _, position = self._draw(_checked_batch_size(batch_size))
        self._set_consumed(position)
        return indices

    def mark_consumed(self) -> list[int]:
        """Record that the training loop has taken the next batch from its DataLoader.

        Returns:
            The numbers of the batch's samples, counted from the start of training over all processes. The batches of
            an optimizer step hold consecutive numbers. With one bucket a number names the same sample for every
            batch size and number of processes.

        Raises:
            RuntimeError: if no drawn batch is left to consume.
        """
        if not self._in_flight:
            raise RuntimeError("mark_consumed was called more often than batches were drawn")
        numbers, position = self._in_flight.popleft()
        self._set_consumed(position)
        return numbers

    def set_cg_ratio(self, cg_ratio: float | str, ahead: int = 0):
        """Change the share of CG from the next drawn batch on; batches in flight keep theirs.

        Error diffusion continues over the change, so the share stays exact after any number of changes. Call it on
        every process at the same step.

        Args:
            cg_ratio: share in [0, 1].
            ahead: number of batches after the last consumed one that keep their share, drawn already or not. Give the
                largest number that can be in flight: then the order does not depend on how many are, and a run that is
                resumed at this step, with none in flight, continues it.

        Raises:
            InputError: if the ratio is out of range or asks for an empty domain.
        """
        ratio, first_batch = self._checked_ratio(cg_ratio), max(self._drawn.batches, self._consumed.batches + ahead)
        earlier = {batch: before for batch, before in self._ratios.items() if batch < first_batch}
        self._ratios = earlier | {first_batch: ratio}

    @property
    def cg_ratio(self) -> float:
        """The share of CG in the next drawn batch, in [0, 1]."""
        return float(self._ratio_of(self._drawn.batches))

    @property
    def num_consumed(self) -> int:
        """Number of samples that all processes have consumed."""
        return self._consumed.emitted

    @property
    def realised_cg_share(self) -> float:
        """The share of CG in all samples that the processes have consumed, in [0, 1]; 0 before the first."""
        samples = self.num_consumed
        waiting = sum(index >= self.num_real for queue in self._consumed.queues.values() for index in queue)
        drawn = sum(count for part, count in zip(self._parts, self._consumed.drawn) if part.is_cg)
        return (drawn - waiting) / samples if samples else 0.0

    def small_buckets(self) -> dict[int, int]:
        """Return {bucket: samples} of buckets smaller than a global batch, which therefore repeats samples."""
        numbers, counts = np.unique([] if self._buckets is None else self._buckets, return_counts=True)
        needed = self.batch_size * self.num_processes
        return {int(number): int(count) for number, count in zip(numbers, counts) if count < needed}

    def state_dict(self) -> dict:
        """Return the state after the last consumed batch: the same in every process, ints and strings only."""
        position = self._consumed
        return {
            **self._identity(),
            "position": {
                "drawn": list(position.drawn),
                "queues": [[bucket, list(queue)] for bucket, queue in sorted(position.queues.items())],
                "batches": position.batches,
                "cg_due": str(position.cg_due),
            },
            "cg_ratios": [[first_batch, str(ratio)] for first_batch, ratio in sorted(self._ratios.items())],
        }

    def _identity(self):
        """Return everything but the position that the order depends on."""
        buckets = None
        if self._buckets is not None and len(np.unique(self._buckets)) > 1:
            buckets = hashlib.sha256(self._buckets.astype(np.int64).tobytes()).hexdigest()
        real_parts, cg_parts = (
            [
                [part.length, str(Fraction(part.weight, part.total_weight))]
                for part in self._parts
                if part.is_cg == is_cg
            ]
            for is_cg in (False, True)
        )
        return {
            "seed": self.seed,
            "num_real": self.num_real,
            "num_cg": self.num_cg,
            "real_parts": real_parts,
            "cg_parts": cg_parts,
            "buckets": buckets,
        }

    def load_state_dict(self, state: dict):
        """Continue after the batch at which `state` was saved, with the CG share of that time.

        Batch size and number of processes may differ from those of the saving run: the position counts samples.
        Make a new DataLoader iterator afterwards.

        Args:
            state: result of `state_dict`.

        Raises:
            InputError: if seed or datasets differ from those of the saving run, which would change the order.
        """
        options = {"seed": "--seed", "num_real": "--real_dataset", "num_cg": "--cg_dataset", "buckets": "--buckets"}
        options |= {"real_parts": "--real_dataset", "cg_parts": "--cg_dataset"}
        for name, value in self._identity().items():
            if state[name] != value:
                raise InputError(
                    f"{options[name]}: {name} is {value}, but the checkpoint was saved with {state[name]}; "
                    "resume with the same data and seed, or start a new run"
                )
        position = state["position"]
        self._consumed = _Position(
            drawn=tuple(position["drawn"]),
            queues={bucket: tuple(queue) for bucket, queue in position["queues"]},
            batches=position["batches"],
            cg_due=Fraction(position["cg_due"]),
        )
        self._in_flight.clear()
        self._ratios = {first_batch: Fraction(ratio) for first_batch, ratio in state["cg_ratios"]}

    @property
    def _drawn(self):
        return self._in_flight[-1][1] if self._in_flight else self._consumed

    def _set_consumed(self, position):
        self._consumed = position
        # Drop ratios that applied only to batches now consumed.
        current = self._ratio_of(position.batches)
        later = {first_batch: ratio for first_batch, ratio in self._ratios.items() if first_batch > position.batches}
        self._ratios = {position.batches: current} | later

    def _ratio_of(self, batch):
        return self._ratios[max(first_batch for first_batch in self._ratios if first_batch <= batch)]

    def _draw(self, batch_size):
        """Return this process's slice of the next global batch, its samples' numbers, and the position after it."""
        start = self._drawn
        needed, ratio = batch_size * self.num_processes, self._ratio_of(start.batches)
        drawn, queues = list(start.drawn), {bucket: list(queue) for bucket, queue in start.queues.items()}
        cg_drawn = sum(count for part, count in zip(self._parts, drawn) if part.is_cg)
        # Whole numbers, in units of 1 / unit.
        unit = math.lcm(ratio.denominator, start.cg_due.denominator)
        step, due = int(ratio * unit), int(start.cg_due * unit)
        # Several queues can be full only after a resume with smaller batches.
        full = next((bucket for bucket in sorted(queues) if len(queues[bucket]) >= needed), None)
        while full is None:
            due += step
            is_cg = (2 * due + unit) // (2 * unit) > cg_drawn  # due + 1/2, rounded down: never more than 1/2 off
            cg_drawn += is_cg
            index = self._next_sample(drawn, is_cg)
            bucket = 0 if self._buckets is None else int(self._buckets[index])
            queue = queues.setdefault(bucket, [])
            queue.append(index)
            full = bucket if len(queue) == needed else None
        samples = list(zip(queues[full], range(start.emitted, start.emitted + needed)))  # (index, number)
        queues[full] = queues[full][needed:]
        samples.sort(key=lambda sample: sample[0] >= self.num_real)
        # Seeded by the number of samples in earlier batches, not of batches: the same for every batch size.
        self._random("batch", start.emitted).shuffle(samples)
        own = samples[self.process_index * batch_size : (self.process_index + 1) * batch_size]
        waiting = {bucket: tuple(queue) for bucket, queue in queues.items() if queue}
        end = _Position(tuple(drawn), waiting, start.batches + 1, Fraction(due, unit))
        return [index for index, _ in own], [number for _, number in own], end

    def _next_sample(self, drawn, is_cg):
        """Return the index of the stream's next sample of a domain, and count it in `drawn`."""
        candidates = [i for i, part in enumerate(self._parts) if part.is_cg == is_cg]
        chosen = candidates[0]
        if len(candidates) > 1:
            total = 1 + sum(drawn[i] for i in candidates)

            def deficit(i):
                """Return samples due minus samples drawn, times the sum of the weights: a whole number."""
                return self._parts[i].weight * total - self._parts[i].total_weight * drawn[i]

            chosen = max(candidates, key=deficit)
        part, number = self._parts[chosen], drawn[chosen]
        drawn[chosen] += 1
        return part.first_index + self._epoch_order(part, number // part.length)[number % part.length]

    def _epoch_order(self, part, epoch):
        known_epoch, order = self._epoch_orders.get(part.name, (-1, []))
        if known_epoch != epoch:
            order = list(range(part.length))
            self._random(part.name, epoch).shuffle(order)
            self._epoch_orders[part.name] = (epoch, order)
        return order

    def _random(self, *stream):
        # Seeding with a string hashes it: nearby seeds and numbers give unrelated streams.
        return random.Random(f"{self.seed} {stream}")

    def _checked_ratio(self, cg_ratio):
        try:
            ratio = Fraction(str(cg_ratio))
        except (ValueError, ZeroDivisionError):
            ratio = None
        if ratio is None or not 0 <= ratio <= 1:
            raise InputError(f"--cg_ratio {cg_ratio}: must be from 0 to 1; try 0.2")
        if ratio > 0 and self.num_cg == 0:
            raise InputError(f"--cg_ratio {cg_ratio}: --cg_dataset has no clips; add CG pairs, or set it to 0")
        if ratio < 1 and self.num_real == 0:
            raise InputError(f"--cg_ratio {cg_ratio}: --real_dataset has no clips; add clips, or set it to 1")
        return ratio


def _checked_batch_size(batch_size):
    if batch_size < 1:
        raise InputError(f"--train_batch_size {batch_size}: must be at least 1; try 1")
    return batch_size


def _parts(domain, first, length, lengths_and_weights):
    """Return the `_Part`s of a domain."""
    if lengths_and_weights is None:
        lengths_and_weights = [(length, 1)] if length else []
    lengths_and_weights = list(lengths_and_weights)
    lengths = [int(count) for count, _ in lengths_and_weights]  # a NumPy integer would not go into the state's JSON
    if sum(lengths) != length:
        raise ValueError(f"the {domain} parts have {lengths} of {length} samples")
    try:
        weights = [Fraction(str(weight)) for _, weight in lengths_and_weights]
    except (ValueError, ZeroDivisionError):
        weights = [Fraction(0)]
    if not all(weight > 0 for weight in weights):
        raise InputError(
            f"--{domain}_dataset: weights are {[weight for _, weight in lengths_and_weights]}; give numbers above 0"
        )
    unit, parts = math.lcm(*(weight.denominator for weight in weights)), []
    weights = [int(weight * unit) for weight in weights]
    for number, (count, weight) in enumerate(zip(lengths, weights)):
        if count == 0:
            raise InputError(f"--{domain}_dataset: its dataset {number + 1} has no clips; leave it out")
        name = f"{domain} {number}" if number else domain
        parts.append(_Part(name, first, count, weight, sum(weights), domain == "cg"))
        first += count
    return parts
