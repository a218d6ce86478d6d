"""Which clips a step trains on: an exact mix of CG and real, the same after a resume as without one."""

import math
import random
from collections import deque
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

from c2r import InputError


@dataclass(frozen=True)
class _Position:
    """Where the global order stands: with the seed and the two lengths it determines every batch to come."""

    batches: int = 0
    real_samples: int = 0
    cg_samples: int = 0
    # What the ratios drawn with so far ask for. Exact: in floats, 0.2 is not a fifth and the account would drift.
    cg_due: Fraction = Fraction(0)


class MixedCGRealSampler:
    """Batch sampler over the concatenation [real, cg] with an exact share of CG at any batch size.

    The order is global: all processes compute the same batches of `batch_size * num_processes` samples, and each takes
    its slice, so nothing is communicated. How many of a global batch are CG follows from error diffusion: after every
    one, the number of CG samples drawn is what `cg_ratio` asks for, rounded. (`int(batch_size * cg_ratio)` would be 0
    for small batches, for ever.) Their places within the batch are shuffled, or one process would see all the CG. Each
    domain is walked in shuffled epochs without repeats, whichever process a sample goes to.

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

    Raises:
        InputError: if a domain that the ratio asks for is empty, or the ratio or the batch size is out of range.
    """

    def __init__(self, real_dataset, cg_dataset, cg_ratio=0.2, batch_size=1, seed=0, num_processes=1, process_index=0):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}: it must be in 0..{num_processes - 1}")
        self.num_real, self.num_cg = (d if isinstance(d, int) else len(d) for d in (real_dataset, cg_dataset))
        self.batch_size = _checked_batch_size(batch_size)
        self.seed = seed
        self.num_processes, self.process_index = num_processes, process_index

        self._consumed = _Position()
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
        samples = self._consumed.real_samples + self._consumed.cg_samples
        return self._consumed.cg_samples / samples if samples else 0.0

    def state_dict(self):
        """The state behind the last consumed batch, the same in every process, of ints and strings only."""
        position = asdict(self._consumed)
        return {
            "seed": self.seed,
            "num_real": self.num_real,
            "num_cg": self.num_cg,
            "position": position | {"cg_due": str(position["cg_due"])},
            "cg_ratios": [[first_batch, str(ratio)] for first_batch, ratio in sorted(self._ratios.items())],
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
        for name, option, value in [
            ("seed", "--seed", self.seed),
            ("num_real", "--real_dataset", self.num_real),
            ("num_cg", "--cg_dataset", self.num_cg),
        ]:
            if state[name] != value:
                raise InputError(
                    f"{option}: {name} is {value}, but the checkpoint was saved with {state[name]}: "
                    "resume with the same data and seed, or start a new run"
                )
        position = state["position"]
        self._consumed = _Position(**position | {"cg_due": Fraction(position["cg_due"])})
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
        global_batch_size = batch_size * self.num_processes
        cg_due = start.cg_due + self._ratio_of(start.batches) * global_batch_size
        cg_samples = math.floor(cg_due + Fraction(1, 2))  # over all batches; never more than 1/2 off what is due
        cg_count = cg_samples - start.cg_samples
        end = replace(
            start,
            batches=start.batches + 1,
            real_samples=start.real_samples + global_batch_size - cg_count,
            cg_samples=cg_samples,
            cg_due=cg_due,
        )
        indices = self._walk("real", self.num_real, start.real_samples, end.real_samples)
        indices += [self.num_real + i for i in self._walk("cg", self.num_cg, start.cg_samples, end.cg_samples)]
        # Seeded by what is drawn so far, not by the batch's number: so it holds for every batch size.
        self._random("batch", start.real_samples + start.cg_samples).shuffle(indices)
        return indices[self.process_index * batch_size : (self.process_index + 1) * batch_size], end

    def _walk(self, domain, length, start, stop):
        """Samples number `start` to `stop` of a domain's endless walk through shuffled epochs."""
        return [self._epoch_order(domain, length, i // length)[i % length] for i in range(start, stop)]

    def _epoch_order(self, domain, length, epoch):
        if self._epoch_orders.get(domain, (None,))[0] != epoch:
            order = list(range(length))
            self._random(domain, epoch).shuffle(order)
            self._epoch_orders[domain] = (epoch, order)
        return self._epoch_orders[domain][1]

    def _random(self, *stream):
        # Seeding with a string hashes it: nearby seeds and numbers give unrelated streams.
        return random.Random(f"{self.seed} {stream}")

    def _checked_ratio(self, cg_ratio):
        try:
            ratio = Fraction(str(cg_ratio))
        except ValueError:
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
