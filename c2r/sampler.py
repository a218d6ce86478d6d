"""Which clips a step trains on: an exact mix of CG and real, the same after a resume as without one."""

import hashlib
import math
import random
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from c2r import InputError


@dataclass(frozen=True)
class _Position:
    """Where the global order stands: with the seed and the datasets it determines every batch to come."""

    drawn: tuple  # samples of each source that the stream has given so far
    queues: dict  # {bucket: indices that wait for their batch, the oldest first}
    batches: int = 0
    # What the ratios drawn with so far ask for. Exact: in floats, 0.2 is not a fifth and the account would drift.
    cg_due: Fraction = Fraction(0)

    @property
    def emitted(self):
        """Samples in all batches so far."""
        return sum(self.drawn) - sum(map(len, self.queues.values()))


@dataclass(frozen=True)
class _Source:
    """A part of a domain that is walked in epochs of its own."""

    name: str  # of its random stream
    first: int  # index of its first sample in the concatenation
    length: int
    weight: int  # its domain's samples are shared as weight / weights
    weights: int  # the sum over the domain
    is_cg: bool


class MixedCGRealSampler:
    """Batch sampler over the concatenation [real, cg] with an exact share of CG at any batch size.

    The order is global: all processes compute the same batches of `batch_size * num_processes` samples, and each takes
    its slice, so nothing is communicated. It begins with one endless stream of samples. Which of them are CG follows
    from error diffusion: after every one, the number of CG samples drawn is what `cg_ratio` asks for, rounded.
    (`int(batch_size * cg_ratio)` would be 0 for small batches, for ever.) Within a domain the source that is furthest
    behind its weight comes next, and each source is walked in shuffled epochs without repeats.

    Each sample of the stream waits in the queue of its bucket; a queue that is long enough is the next batch, so all
    processes have the same bucket at the same step. Nothing is skipped or put in the place of anything else. With one
    bucket no sample ever waits, and the CG share is exact at every batch; with several, it is exact over the stream,
    and the batches are off that by what waits. Places in a batch are shuffled, or one process would see all the CG.

    Iterating it never ends, and starts behind the last consumed batch. A DataLoader draws batches ahead of the loop
    that trains on them. So that the saved state does not count batches no step has seen, the loop calls
    `mark_consumed()` once per batch it took. Use it as `DataLoader(dataset, batch_sampler=sampler)`, and do not pass
    that DataLoader to `accelerator.prepare`, which would split the batches once more.

    Args:
        real_dataset, cg_dataset: the two datasets, or their lengths. Indices from `len(real_dataset)` on are CG.
        cg_ratio: share of CG samples in [0, 1]. A decimal number is taken as written: 0.2 is 1/5.
        batch_size: samples per batch of one process.
        seed: of the epochs' order and of the places within the batches.
        num_processes, process_index: this process among all.
        buckets: bucket number of each sample of the concatenation; None: all are of one.
        real_sources, cg_sources: [(length, weight), …] of the parts that the domain consists of, one after the other.
            Weights are shares of its samples, whatever the lengths: 2 and 1 are two thirds and one third. None: one.

    Raises:
        InputError: if a domain that the ratio asks for is empty, or the ratio, a weight or the batch size is out of
            range.
    """

    def __init__(
        self,
        real_dataset,
        cg_dataset,
        cg_ratio=0.2,
        batch_size=1,
        seed=0,
        num_processes=1,
        process_index=0,
        buckets=None,
        real_sources=None,
        cg_sources=None,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}: it must be in 0..{num_processes - 1}")
        self.num_real, self.num_cg = (d if isinstance(d, int) else len(d) for d in (real_dataset, cg_dataset))
        self.batch_size = _checked_batch_size(batch_size)
        self.seed = seed
        self.num_processes, self.process_index = num_processes, process_index
        self._sources = _sources("real", 0, self.num_real, real_sources)
        self._sources += _sources("cg", self.num_real, self.num_cg, cg_sources)
        self._buckets = None if buckets is None else np.asarray(buckets)
        if buckets is not None and len(self._buckets) != self.num_real + self.num_cg:
            raise ValueError(f"{len(self._buckets)} buckets for {self.num_real} real and {self.num_cg} CG samples")

        self._consumed = _Position(drawn=(0,) * len(self._sources), queues={})
        self._in_flight = deque()  # positions after the batches that were drawn but not yet consumed, oldest first
        # The share of CG by the number of the first batch it holds for. A change while batches are in flight must be
        # remembered with that number: a resume draws these batches again, and they had the old share.
        self._ratios = {0: self._checked_ratio(cg_ratio)}
        self._epoch_orders = {}

    def __iter__(self):
        self._in_flight.clear()
        while True:
            indices, position = self._draw(self.batch_size)
            self._in_flight.append(position)
            yield indices

    def sample_batch(self, batch_size):
        """Draw one batch and count it as consumed: for loops without a DataLoader.

        Args:
            batch_size: samples for each process; it may differ from call to call.

        Returns:
            This process's indices, a list of `batch_size` ints.

        Raises:
            RuntimeError: if a DataLoader has drawn batches that are not consumed yet.
        """
        if self._in_flight:
            raise RuntimeError(
                f"{len(self._in_flight)} batches are in flight: do not mix sample_batch and a DataLoader"
            )
        indices, position = self._draw(_checked_batch_size(batch_size))
        self._set_consumed(position)
        return indices

    def mark_consumed(self):
        """Say that the training loop has taken the next batch from its DataLoader.

        Raises:
            RuntimeError: if no drawn batch is left to consume.
        """
        if not self._in_flight:
            raise RuntimeError("mark_consumed was called more often than batches were drawn")
        self._set_consumed(self._in_flight.popleft())

    def set_cg_ratio(self, cg_ratio, ahead=0):
        """Change the share of CG from the next drawn batch on; batches in flight keep theirs.

        The account goes on over the change, so often as it may change, the share stays exact. Call it on every process
        at the same step.

        Args:
            cg_ratio: share in [0, 1].
            ahead: so many batches after the last consumed one keep their share, drawn already or not. As many as can
                be in flight make the order independent of how many are: a run that is resumed at this very step has
                drawn none.

        Raises:
            InputError: as the constructor.
        """
        ratio, first_batch = self._checked_ratio(cg_ratio), max(self._drawn.batches, self._consumed.batches + ahead)
        earlier = {batch: before for batch, before in self._ratios.items() if batch < first_batch}
        self._ratios = earlier | {first_batch: ratio}

    @property
    def cg_ratio(self):
        """The share that the next drawn batch will have, a float in [0, 1]."""
        return float(self._ratio_of(self._drawn.batches))

    @property
    def realised_cg_share(self):
        """CG samples among all that the processes have consumed, a float in [0, 1]; 0 before the first."""
        samples = self._consumed.emitted
        waiting = sum(index >= self.num_real for queue in self._consumed.queues.values() for index in queue)
        drawn = sum(count for source, count in zip(self._sources, self._consumed.drawn) if source.is_cg)
        return (drawn - waiting) / samples if samples else 0.0

    def small_buckets(self):
        """{bucket: samples} of those with fewer samples than a global batch: it holds some of them twice."""
        numbers, counts = np.unique([] if self._buckets is None else self._buckets, return_counts=True)
        needed = self.batch_size * self.num_processes
        return {int(number): int(count) for number, count in zip(numbers, counts) if count < needed}

    def state_dict(self):
        """The state behind the last consumed batch, the same in every process, of ints and strings only."""
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
        """What the order depends on besides the position."""
        buckets = None
        if self._buckets is not None and len(np.unique(self._buckets)) > 1:
            buckets = hashlib.sha256(self._buckets.astype(np.int64).tobytes()).hexdigest()
        sources = {
            is_cg: [[s.length, str(Fraction(s.weight, s.weights))] for s in self._sources if s.is_cg == is_cg]
            for is_cg in (0, 1)
        }
        return {
            "seed": self.seed,
            "num_real": self.num_real,
            "num_cg": self.num_cg,
            "real_sources": sources[0],
            "cg_sources": sources[1],
            "buckets": buckets,
        }

    def load_state_dict(self, state):
        """Go on behind the batch that `state` was saved after, with its CG share (changed since the start or not).

        Batch size and number of processes may differ from those of the saving run: the position counts samples.
        Make a new DataLoader iterator afterwards.

        Args:
            state: what `state_dict` gave.

        Raises:
            InputError: if seed or datasets are not those of the saving run, so that the order would be another.
        """
        options = {"seed": "--seed", "num_real": "--real_dataset", "num_cg": "--cg_dataset", "buckets": "--buckets"}
        options |= {"real_sources": "--real_dataset", "cg_sources": "--cg_dataset"}
        for name, value in self._identity().items():
            if state[name] != value:
                raise InputError(
                    f"{options[name]}: {name} is {value}, but the checkpoint was saved with {state[name]}: "
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
        return self._in_flight[-1] if self._in_flight else self._consumed

    def _set_consumed(self, position):
        self._consumed = position
        # What held only for batches now consumed is history.
        current = self._ratio_of(position.batches)
        later = {first_batch: ratio for first_batch, ratio in self._ratios.items() if first_batch > position.batches}
        self._ratios = {position.batches: current} | later

    def _ratio_of(self, batch):
        return self._ratios[max(first_batch for first_batch in self._ratios if first_batch <= batch)]

    def _draw(self, batch_size):
        """The next global batch's slice for this process, and the position after it."""
        start = self._drawn
        needed, ratio = batch_size * self.num_processes, self._ratio_of(start.batches)
        drawn, queues = list(start.drawn), {bucket: list(queue) for bucket, queue in start.queues.items()}
        cg_drawn = sum(count for source, count in zip(self._sources, drawn) if source.is_cg)
        # In units of 1 / unit, all whole numbers.
        unit = math.lcm(ratio.denominator, start.cg_due.denominator)
        step, due = int(ratio * unit), int(start.cg_due * unit)
        # More than one is full only after a resume with smaller batches.
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
        indices, queues[full] = queues[full][:needed], queues[full][needed:]
        indices.sort(key=lambda index: index >= self.num_real)
        # Seeded by what is in earlier batches, not by the batch's number: so it holds for every batch size.
        self._random("batch", start.emitted).shuffle(indices)
        waiting = {bucket: tuple(queue) for bucket, queue in queues.items() if queue}
        end = _Position(tuple(drawn), waiting, start.batches + 1, Fraction(due, unit))
        return indices[self.process_index * batch_size : (self.process_index + 1) * batch_size], end

    def _next_sample(self, drawn, is_cg):
        """The stream's next sample of a domain; counts it in `drawn`."""
        candidates = [i for i, source in enumerate(self._sources) if source.is_cg == is_cg]
        chosen = candidates[0]
        if len(candidates) > 1:
            total = 1 + sum(drawn[i] for i in candidates)
            # What is due less what is drawn, times the sum of the weights: whole numbers.
            chosen = max(
                candidates, key=lambda i: self._sources[i].weight * total - self._sources[i].weights * drawn[i]
            )
        source, number = self._sources[chosen], drawn[chosen]
        drawn[chosen] += 1
        return source.first + self._epoch_order(source, number // source.length)[number % source.length]

    def _epoch_order(self, source, epoch):
        if self._epoch_orders.get(source.name, (None,))[0] != epoch:
            order = list(range(source.length))
            self._random(source.name, epoch).shuffle(order)
            self._epoch_orders[source.name] = (epoch, order)
        return self._epoch_orders[source.name][1]

    def _random(self, *stream):
        # Seeding with a string hashes it: nearby seeds and numbers give unrelated streams.
        return random.Random(f"{self.seed} {stream}")

    def _checked_ratio(self, cg_ratio):
        try:
            ratio = Fraction(str(cg_ratio))
        except (ValueError, ZeroDivisionError):
            ratio = None
        if ratio is None or not 0 <= ratio <= 1:
            raise InputError(f"--cg_ratio is {cg_ratio}: it must be a number in [0, 1]")
        if ratio > 0 and self.num_cg == 0:
            raise InputError(f"--cg_dataset has no clips, but --cg_ratio is {cg_ratio}: add CG pairs or set it to 0")
        if ratio < 1 and self.num_real == 0:
            raise InputError(f"--real_dataset has no clips, but --cg_ratio is {cg_ratio}: add clips or set it to 1")
        return ratio


def _checked_batch_size(batch_size):
    if batch_size < 1:
        raise InputError(f"--train_batch_size is {batch_size}: it must be at least 1")
    return batch_size


def _sources(domain, first, length, parts):
    """The `_Source`s of a domain from its (length, weight) pairs."""
    parts = [(length, 1)] * (length > 0) if parts is None else parts
    if sum(count for count, _ in parts) != length:
        raise ValueError(f"the {domain} sources have {[count for count, _ in parts]} of {length} samples")
    try:
        weights = [Fraction(str(weight)) for _, weight in parts]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) < len(parts) or not all(weight > 0 for weight in weights):
        raise InputError(f"--{domain}_dataset: the weights {[w for _, w in parts]} must be numbers above 0")
    unit, sources = math.lcm(*(weight.denominator for weight in weights)), []
    weights = [int(weight * unit) for weight in weights]
    for number, ((count, _), weight) in enumerate(zip(parts, weights)):
        count = int(count)  # a NumPy integer would not go into the state's JSON
        if count == 0:
            raise InputError(f"--{domain}_dataset: its dataset {number + 1} has no clips; leave it out")
        name = f"{domain} {number}" if number else domain
        sources.append(_Source(name, first, count, weight, sum(weights), domain == "cg"))
        first += count
    return sources
