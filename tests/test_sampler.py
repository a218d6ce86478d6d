"""MixedCGRealSampler: exact shares, epochs without repeats, buckets, and resumes that change nothing."""

import hashlib
import itertools
import json
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from c2r import InputError
from c2r.sampler import MixedCGRealSampler

RATIOS = st.sampled_from([0.2, 0.25, 0.05, 0.5, 0.75, 0.0, 1.0, 0.001, 0.37]) | st.floats(0, 1)


def global_batches(count, *args, num_processes=1, **kwargs):
    """Return the first batches of all processes: a list of lists of each process's indices."""
    samplers = [
        MixedCGRealSampler(*args, **kwargs, num_processes=num_processes, process_index=process)
        for process in range(num_processes)
    ]
    iterators = [iter(sampler) for sampler in samplers]
    return [[next(iterator) for iterator in iterators] for _ in range(count)]


def flat(batch):
    return list(itertools.chain.from_iterable(batch))


@given(RATIOS, st.integers(1, 64), st.integers(1, 8), st.integers(0, 2**31))
def test_the_share_is_never_more_than_half_a_sample_off(ratio, batch_size, num_processes, seed):
    drawn = cg = 0
    batches = global_batches(12, 50, 7, cg_ratio=ratio, batch_size=batch_size, seed=seed, num_processes=num_processes)
    for batch in batches:
        assert [len(part) for part in batch] == [batch_size] * num_processes
        drawn += batch_size * num_processes
        cg += sum(index >= 50 for index in flat(batch))
        assert abs(cg - Fraction(str(ratio)) * drawn) <= Fraction(1, 2)


def test_a_decimal_ratio_is_exact_in_the_long_run():
    sampler = MixedCGRealSampler(11, 3, cg_ratio=0.1)
    cg = sum(sampler.sample_batch(1)[0] >= 11 for _ in range(10000))
    assert cg == 1000
    assert sampler.realised_cg_share == 0.1


def test_a_decimal_ratio_is_taken_as_written():
    sampler = MixedCGRealSampler(11, 3, cg_ratio=0.3)  # the float is a little below 3/10: half a sample would be lost
    assert sum(sampler.sample_batch(1)[0] >= 11 for _ in range(5)) == 2
    assert MixedCGRealSampler(11, 3, cg_ratio="1/3").cg_ratio == pytest.approx(1 / 3)


@given(RATIOS, st.lists(st.tuples(RATIOS, st.integers(1, 5)), max_size=8), st.integers(1, 5))
def test_the_share_is_exact_after_each_change_and_over_all_changes(first, changes, batch_size):
    sampler = MixedCGRealSampler(20, 20, cg_ratio=first, batch_size=batch_size)
    due, cg_total = Fraction(0), 0
    for ratio, count in [(first, 3), *changes]:
        sampler.set_cg_ratio(ratio)
        assert sampler.cg_ratio == ratio
        cg = 0
        for drawn in range(1, count + 1):
            cg += sum(index >= 20 for index in sampler.sample_batch(batch_size))
            assert abs(cg - Fraction(str(ratio)) * drawn * batch_size) <= 1
        cg_total += cg
        due += Fraction(str(ratio)) * count * batch_size
        assert abs(cg_total - due) <= Fraction(1, 2)


def test_setting_the_ratio_after_every_batch_keeps_the_share():
    sampler = MixedCGRealSampler(10, 10, cg_ratio=0.2)
    cg = 0
    for _ in range(100):
        cg += sampler.sample_batch(1)[0] >= 10
        sampler.set_cg_ratio(0.2)
    assert cg == 20


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_epochs_of_each_domain_have_no_repeats_over_all_processes(num_real, num_cg, batch_size, num_processes, seed):
    batches = global_batches(
        40, num_real, num_cg, cg_ratio=0.4, batch_size=batch_size, num_processes=num_processes, seed=seed
    )
    drawn = flat(flat(batches))
    for domain, length in [
        ([index for index in drawn if index < num_real], num_real),
        ([index - num_real for index in drawn if index >= num_real], num_cg),
    ]:
        # Places are shuffled within a global batch, so epochs are cut by count, not by order.
        counts = Counter(domain)
        epochs = len(domain) // length
        assert set(counts) <= set(range(length))
        assert all(epochs <= counts[index] <= epochs + 1 for index in range(length))


def test_epochs_have_different_orders():
    sampler = MixedCGRealSampler(50, 0, cg_ratio=0)
    first, second = ([sampler.sample_batch(1)[0] for _ in range(50)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))


def test_seeds_give_different_orders_and_one_seed_the_same():
    def order(seed):
        return global_batches(5, 100, 30, batch_size=4, seed=seed)

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(
    ("arguments", "changes", "digest"),
    [
        ({"real_dataset": 50, "cg_dataset": 7}, {}, "a0f38acfd7031d77"),
        ({"real_dataset": 17, "cg_dataset": 5, "cg_ratio": 0.37, "batch_size": 4, "seed": 3}, {}, "abe1e97f187e7a69"),
        (
            {"real_dataset": 40, "cg_dataset": 9, "cg_ratio": 0.25, "batch_size": 2}
            | {"num_processes": 4, "process_index": 2},
            {},
            "dba9ed0171d9a60c",
        ),
        ({"real_dataset": 12, "cg_dataset": 0, "cg_ratio": 0, "batch_size": 5, "seed": 9}, {}, "a2b343df4caf0dff"),
        (
            {"real_dataset": 30, "cg_dataset": 12, "cg_ratio": 0.1, "batch_size": 3},
            {20: 0.8, 35: 0.05},
            "635baf05c75fbf5f",
        ),
    ],
)
@pytest.mark.parametrize("one_bucket", [False, True])
def test_orders_with_one_bucket_and_part_agree_with_recorded_ones(arguments, changes, digest, one_bucket):
    # The README's figures and every resume depend on these orders.
    if one_bucket:
        arguments = arguments | {"buckets": [4] * (arguments["real_dataset"] + arguments["cg_dataset"])}
    sampler = MixedCGRealSampler(**arguments)
    iterator, batches = iter(sampler), []
    for number in range(50):
        if number in changes:
            sampler.set_cg_ratio(changes[number])
        batches.append(next(iterator))
    assert hashlib.sha256(json.dumps(batches).encode()).hexdigest()[:16] == digest


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_processes_share_the_batch_of_one_process(batch_size, num_processes, seed):
    several = global_batches(10, 40, 9, batch_size=batch_size, num_processes=num_processes, seed=seed)
    one = global_batches(10, 40, 9, batch_size=batch_size * num_processes, seed=seed)
    assert [flat(batch) for batch in several] == [flat(batch) for batch in one]


@pytest.mark.parametrize(("ratio", "batch_size", "num_processes"), [(0.25, 1, 4), (0.5, 1, 2), (0.125, 2, 4)])
def test_cg_reaches_every_process_and_place_of_the_batch_equally(ratio, batch_size, num_processes):
    batches = global_batches(800, 90, 9, cg_ratio=ratio, batch_size=batch_size, num_processes=num_processes)
    places = Counter(place for batch in batches for place, index in enumerate(flat(batch)) if index >= 90)
    expected = 800 * ratio
    assert len(places) == batch_size * num_processes
    assert all(0.75 * expected < count < 1.25 * expected for count in places.values())


@pytest.mark.parametrize(
    ("num_real", "num_cg", "ratio", "drawn"),
    [(5, 3, 0, range(5)), (5, 3, 1, range(5, 8)), (5, 0, 0, range(5)), (0, 3, 1, range(3))],
)
def test_a_ratio_of_zero_or_one_draws_all_of_one_domain_alone(num_real, num_cg, ratio, drawn):
    assert set(flat(flat(global_batches(9, num_real, num_cg, cg_ratio=ratio)))) == set(drawn)


class Run:
    """A training loop that draws batches ahead as a DataLoader does."""

    def __init__(self, state=None, **options):
        self.sampler = MixedCGRealSampler(17, 5, **options)
        if state is not None:
            self.sampler.load_state_dict(json.loads(json.dumps(state)))
        self.iterator = iter(self.sampler)
        self.queue = []

    def step(self, prefetch):
        while len(self.queue) <= prefetch:
            self.queue.append(next(self.iterator))
        self.sampler.mark_consumed()
        return self.queue.pop(0)


@given(
    st.integers(1, 3),
    st.integers(0, 6),
    st.dictionaries(st.integers(0, 14), RATIOS, max_size=4),
    st.integers(0, 15),
    st.integers(0, 99),
)
@settings(max_examples=200)
def test_resume_at_any_step_gives_the_uninterrupted_batches(batch_size, prefetch, changes, saved_at, seed):
    options = {"batch_size": batch_size, "seed": seed}
    run, batches, states = Run(**options), [], []
    for step in range(16):
        states.append(run.sampler.state_dict())
        batches.append(run.step(prefetch))
        if step in changes:
            run.sampler.set_cg_ratio(changes[step])
    state = states[saved_at]
    # For another number of prefetched batches, and with changes in flight when the state was saved.
    for resumed_prefetch in {0, prefetch}:
        run = Run(state, **options)
        again = []
        for step in range(saved_at, 16):
            again.append(run.step(resumed_prefetch))
            if step in changes and resumed_prefetch == prefetch:
                run.sampler.set_cg_ratio(changes[step])
            elif step in changes:
                break  # the next change would come after fewer drawn batches than it did in the first run
        assert again == batches[saved_at : saved_at + len(again)]
        if resumed_prefetch == prefetch:
            assert run.sampler.state_dict()["position"]["batches"] == 16


def test_the_state_includes_a_change_that_is_not_reached_yet():
    run = Run(batch_size=2, cg_ratio=0.0)
    for _ in range(3):
        run.step(prefetch=4)
    run.sampler.set_cg_ratio(1.0)
    state = run.sampler.state_dict()
    resumed = Run(state, batch_size=2, cg_ratio=0.0)
    batches = [resumed.step(prefetch=0) for _ in range(8)]
    assert [sum(index >= 17 for index in batch) for batch in batches] == [0, 0, 0, 0, 2, 2, 2, 2]
    assert batches == [run.step(prefetch=4) for _ in range(8)]


def test_a_change_ahead_does_not_depend_on_the_batches_in_flight():
    batches = []
    for prefetch in range(5):
        run = Run(batch_size=2, cg_ratio=0.0)
        for _ in range(3):
            run.step(prefetch)
        run.sampler.set_cg_ratio(1.0, ahead=4)
        batches.append([run.step(prefetch) for _ in range(8)])
    assert [sum(index >= 17 for index in batch) for batch in batches[0]] == [0, 0, 0, 0, 2, 2, 2, 2]
    assert all(other == batches[0] for other in batches)


def test_share_and_state_count_only_consumed_batches():
    run = Run(cg_ratio=0.5, batch_size=2)
    assert run.sampler.realised_cg_share == 0
    start = run.sampler.state_dict()
    iterator = iter(run.sampler)
    for _ in range(5):
        next(iterator)
    assert run.sampler.state_dict() == start
    run.sampler.mark_consumed()
    assert run.sampler.realised_cg_share == 0.5
    assert run.sampler.state_dict()["position"]["batches"] == 1


def test_a_new_iterator_starts_after_the_last_consumed_batch():
    run = Run(batch_size=3)
    first = [run.step(prefetch=3) for _ in range(2)]
    rest = [*run.queue]
    run.iterator, run.queue = iter(run.sampler), []
    assert [run.step(prefetch=1) for _ in range(3)] == rest
    assert first != rest[:2]


def test_resume_with_another_batch_size_continues_the_epoch():
    sampler = MixedCGRealSampler(12, 0, cg_ratio=0)
    seen = flat(sampler.sample_batch(2) for _ in range(3))
    resumed = MixedCGRealSampler(12, 0, cg_ratio=0, batch_size=3, num_processes=2)
    resumed.load_state_dict(sampler.state_dict())
    other = MixedCGRealSampler(12, 0, cg_ratio=0, batch_size=3, num_processes=2, process_index=1)
    other.load_state_dict(sampler.state_dict())
    assert sorted(seen + resumed.sample_batch(3) + other.sample_batch(3)) == list(range(12))


def loaded_batches(sampler, num_batches, change_at=None, states=None):
    """Yield batches of a DataLoader with two workers; the share is raised after batch `change_at`."""
    dataset = TensorDataset(torch.arange(sampler.num_real + sampler.num_cg))
    iterator = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=2))
    for step in range(num_batches):
        (indices,) = next(iterator)
        sampler.mark_consumed()
        if step == change_at:
            sampler.set_cg_ratio(0.8)
        if states is not None:
            states.append(sampler.state_dict())
        yield indices.tolist()


def test_a_resume_with_prefetching_workers_keeps_a_changed_share():
    states = []
    batches = list(loaded_batches(MixedCGRealSampler(30, 12, 0.25, 4), 14, change_at=5, states=states))
    assert sum(index >= 30 for index in flat(batches[10:])) == pytest.approx(0.8 * 16, abs=1)
    for saved_at in (6, 7, 11):  # the first two with batches in flight that have the old share
        sampler = MixedCGRealSampler(30, 12, 0.25, 4)
        sampler.load_state_dict(states[saved_at - 1])
        assert list(loaded_batches(sampler, 14 - saved_at)) == batches[saved_at:]


def test_a_resume_before_a_change_repeats_it_at_the_same_batch():
    states = []
    batches = list(loaded_batches(MixedCGRealSampler(30, 12, 0.25, 4), 14, change_at=5, states=states))
    sampler = MixedCGRealSampler(30, 12, 0.25, 4)
    sampler.load_state_dict(states[3])
    assert list(loaded_batches(sampler, 10, change_at=1)) == batches[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cg_dataset": 0}, r"^--cg_ratio 0.2: --cg_dataset has no clips"),
        ({"real_dataset": 0}, r"^--cg_ratio 0.2: --real_dataset has no clips"),
        ({"cg_ratio": 1.01}, r"^--cg_ratio 1.01: must be from 0 to 1"),
        ({"cg_ratio": -0.1}, r"^--cg_ratio -0.1"),
        ({"cg_ratio": float("nan")}, r"^--cg_ratio nan"),
        ({"cg_ratio": "a fifth"}, r"^--cg_ratio a fifth"),
        ({"cg_ratio": "1/0"}, r"^--cg_ratio 1/0"),
        ({"batch_size": 0}, r"^--train_batch_size 0"),
    ],
)
def test_bad_options_are_named_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        MixedCGRealSampler(**{"real_dataset": [1, 2], "cg_dataset": [1]} | arguments)
    assert "\n" not in str(error.value)


def test_a_ratio_that_needs_an_empty_domain_is_refused_also_later():
    sampler = MixedCGRealSampler(5, 0, cg_ratio=0)
    with pytest.raises(InputError, match="--cg_dataset"):
        sampler.set_cg_ratio(0.1)
    assert sampler.cg_ratio == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"seed": 1}, "^--seed"), ({"real_dataset": 6}, "^--real_dataset"), ({"cg_dataset": 4}, "^--cg_dataset")],
)
def test_a_state_of_other_data_is_refused(changed, message):
    arguments = {"real_dataset": 5, "cg_dataset": 3}
    with pytest.raises(InputError, match=message):
        MixedCGRealSampler(**arguments | changed).load_state_dict(MixedCGRealSampler(**arguments).state_dict())


def test_mark_consumed_sample_batch_and_process_index_are_checked():
    sampler = MixedCGRealSampler(5, 3)
    with pytest.raises(RuntimeError, match="more often"):
        sampler.mark_consumed()
    next(iter(sampler))
    with pytest.raises(RuntimeError, match="in flight"):
        sampler.sample_batch(1)
    with pytest.raises(ValueError, match="process_index is 2"):
        MixedCGRealSampler(5, 3, num_processes=2, process_index=2)
    with pytest.raises(InputError, match="--train_batch_size"):
        MixedCGRealSampler(5, 3).sample_batch(0)


# -------------------------------------------------------------------------------------------------- buckets and parts


@st.composite
def mixes(draw):
    """Draw arguments of a sampler with several buckets and parts."""
    real, cg = (draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)) for _ in range(2))
    weights = st.sampled_from(["1", "2", "0.5", "1/3"])
    count = sum(real) + sum(cg)
    return {
        "real_dataset": sum(real),
        "cg_dataset": sum(cg),
        "cg_ratio": draw(st.sampled_from([0.2, 0.5, 0.37])),
        "batch_size": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 99)),
        "buckets": draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)),
        "real_parts": [(length, draw(weights)) for length in real],
        "cg_parts": [(length, draw(weights)) for length in cg],
    }


def part_ranges(mix):
    """Return (first index, length, share of its domain, is CG) of each part."""
    first, ranges = 0, []
    for name in ("real_parts", "cg_parts"):
        total = sum(Fraction(weight) for _, weight in mix[name])
        for length, weight in mix[name]:
            ranges.append((first, length, Fraction(weight) / total, name == "cg_parts"))
            first += length
    return ranges


@settings(deadline=None)
@given(mixes(), st.integers(1, 4))
def test_all_processes_have_the_same_bucket_at_a_step(mix, num_processes):
    for batch in global_batches(60, num_processes=num_processes, **mix):
        assert [len(part) for part in batch] == [mix["batch_size"]] * num_processes
        assert len({mix["buckets"][index] for index in flat(batch)}) == 1


@settings(deadline=None)
@given(mixes(), st.integers(1, 4), st.integers(1, 60))
def test_shares_and_epochs_are_exact_except_for_waiting_samples(mix, num_processes, count):
    sampler = MixedCGRealSampler(num_processes=num_processes, **mix)
    for _ in range(count):
        sampler.sample_batch(mix["batch_size"])
    position = sampler.state_dict()["position"]
    waiting = flat(queue for _, queue in position["queues"])
    # Fewer than a global batch wait in each bucket.
    assert all(len(queue) < mix["batch_size"] * num_processes for _, queue in position["queues"])
    emitted = flat(flat(global_batches(count, num_processes=num_processes, **mix)))
    stream = Counter([*emitted, *waiting])
    total = sum(stream.values())
    cg_drawn = sum(n for index, n in stream.items() if index >= mix["real_dataset"])
    assert abs(cg_drawn - Fraction(str(mix["cg_ratio"])) * total) <= Fraction(1, 2)
    cg_emitted = sum(index >= mix["real_dataset"] for index in emitted)
    assert sampler.realised_cg_share == pytest.approx(cg_emitted / len(emitted))
    for first, length, share, is_cg in part_ranges(mix):
        counts = [stream[index] for index in range(first, first + length)]
        assert max(counts) - min(counts) <= 1  # epochs have no repeats
        due = share * (cg_drawn if is_cg else total - cg_drawn)
        assert abs(sum(counts) - due) <= len(mix["cg_parts" if is_cg else "real_parts"])


@settings(deadline=None)
@given(mixes())
def test_no_sample_of_any_bucket_is_left_out(mix):
    needed = 4 * mix["batch_size"] * len(mix["buckets"]) * 40
    batches = global_batches(needed // mix["batch_size"] // 4, num_processes=1, **mix)
    assert set(flat(flat(batches))) == set(range(len(mix["buckets"])))


@settings(deadline=None)
@given(mixes(), st.integers(1, 3))
def test_processes_share_the_batch_of_one_process_in_every_bucket(mix, num_processes):
    several = global_batches(30, num_processes=num_processes, **mix)
    one = global_batches(30, **mix | {"batch_size": mix["batch_size"] * num_processes})
    assert [flat(batch) for batch in several] == [flat(batch) for batch in one]


@settings(deadline=None)
@given(mixes(), st.integers(0, 30), st.integers(0, 6), RATIOS)
def test_a_resume_with_batches_in_flight_continues_exactly(mix, consumed, in_flight, ratio):
    sampler = MixedCGRealSampler(**mix)
    iterator = iter(sampler)
    batches = [next(iterator) for _ in range(consumed + in_flight)]
    for _ in range(consumed):
        sampler.mark_consumed()
    sampler.set_cg_ratio(ratio)
    batches += [next(iterator) for _ in range(20)]
    resumed = MixedCGRealSampler(**mix)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    again = iter(resumed)
    assert [next(again) for _ in range(in_flight + 20)] == batches[consumed:]


@settings(deadline=None)
@given(mixes(), st.integers(1, 30), st.integers(1, 4), st.integers(1, 3))
def test_a_resume_with_other_batches_and_processes_loses_no_sample(mix, consumed, batch_size, num_processes):
    before = MixedCGRealSampler(**mix)
    drawn = [before.sample_batch(mix["batch_size"]) for _ in range(consumed)]
    samplers = []
    for process in range(num_processes):
        samplers.append(
            MixedCGRealSampler(**mix | {"batch_size": batch_size}, num_processes=num_processes, process_index=process)
        )
        samplers[-1].load_state_dict(before.state_dict())
    for _ in range(40):
        parts = [sampler.sample_batch(batch_size) for sampler in samplers]
        assert len({mix["buckets"][index] for index in flat(parts)}) == 1
        drawn += parts
    stream = Counter(flat(drawn)) + Counter(flat(queue for _, queue in samplers[0].state_dict()["position"]["queues"]))
    for first, length, _, _ in part_ranges(mix):
        counts = [stream[index] for index in range(first, first + length)]
        assert max(counts) - min(counts) <= 1
    cg_drawn = sum(count for index, count in stream.items() if index >= mix["real_dataset"])
    assert abs(cg_drawn - Fraction(str(mix["cg_ratio"])) * sum(stream.values())) <= Fraction(1, 2)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_a_number_names_the_same_sample_for_every_batch_size(batch_size, num_processes, batches):
    def named(batch_size, num_processes, batches):
        found = {}
        for process in range(num_processes):
            sampler = MixedCGRealSampler(
                17, 5, 0.3, batch_size, num_processes=num_processes, process_index=process, seed=3
            )
            for indices in itertools.islice(sampler, batches):
                found |= dict(zip(sampler.mark_consumed(), indices, strict=True))
        return found

    count = batch_size * num_processes * batches
    alone = named(1, 1, count)
    assert sorted(alone) == list(range(count))
    assert named(batch_size, num_processes, batches) == alone


@settings(deadline=None)
@given(mixes(), st.integers(1, 3), st.integers(0, 20))
def test_the_numbers_of_a_global_batch_are_consecutive(mix, num_processes, skipped):
    samplers = [MixedCGRealSampler(num_processes=num_processes, process_index=p, **mix) for p in range(num_processes)]
    iterators, size = [iter(sampler) for sampler in samplers], mix["batch_size"] * num_processes
    for batch in range(skipped + 1):
        assert {sampler.num_consumed for sampler in samplers} == {batch * size}
        for iterator in iterators:
            next(iterator)
        numbers = flat(sampler.mark_consumed() for sampler in samplers)
    assert sorted(numbers) == list(range(skipped * size, (skipped + 1) * size))


def test_queues_that_are_full_for_smaller_batches_come_before_new_draws():
    mix = {"real_dataset": 40, "cg_dataset": 0, "cg_ratio": 0, "buckets": [0, 1] * 20}
    before = MixedCGRealSampler(**mix, batch_size=8)
    before.sample_batch(8)
    state = before.state_dict()["position"]
    ((_, waiting),) = state["queues"]
    assert len(waiting) >= 2
    after = MixedCGRealSampler(**mix, batch_size=2)
    after.load_state_dict(before.state_dict())
    for start in range(0, len(waiting) - 1, 2):
        assert sorted(after.sample_batch(2)) == sorted(waiting[start : start + 2])  # the oldest first
        assert after.state_dict()["position"]["drawn"] == state["drawn"]


def test_weights_are_shares_independent_of_the_lengths():
    sampler = MixedCGRealSampler(103, 0, cg_ratio=0, real_parts=[(3, 2), (100, 1)])
    first = sum(sampler.sample_batch(1)[0] < 3 for _ in range(3000))
    assert first == 2000
    sampler = MixedCGRealSampler(20, 0, cg_ratio=0, real_parts=[(10, 0.1), (10, 0.2)])  # as written: a third
    assert sum(sampler.sample_batch(1)[0] < 10 for _ in range(3000)) == 1000
    sampler = MixedCGRealSampler(20, 0, cg_ratio=0, real_parts=[(10, 1), (10, 1)])  # a tie goes to the first
    assert [sampler.sample_batch(1)[0] < 10 for _ in range(4)] == [True, False, True, False]


def test_a_state_of_numpy_lengths_and_buckets_goes_into_json():
    parts = [(length, 1) for length in np.array([4, 2])]
    sampler = MixedCGRealSampler(6, 2, batch_size=3, buckets=np.array([0, 1] * 4), real_parts=parts)
    sampler.sample_batch(3)
    state = sampler.state_dict()
    assert json.loads(json.dumps(state)) == state


def test_a_million_samples_in_buckets_are_drawn_in_milliseconds():
    parts = [(250_000, weight) for weight in ("2", "1", "0.5", "0.333")]
    start = time.process_time()
    sampler = MixedCGRealSampler(10**6, 0, cg_ratio=0, buckets=np.arange(10**6) % 4, real_parts=parts)
    sampler.sample_batch(512)
    assert time.process_time() - start < 3
    start = time.process_time()
    for _ in range(20):
        sampler.sample_batch(512)
    assert (time.process_time() - start) / 20 < 0.05
    assert len(json.dumps(sampler.state_dict())) < 20_000  # fewer samples wait than four batches hold


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"buckets": [0, 0, 1, 1, 1, 0]}, "--buckets: buckets is "),
        ({"real_parts": [(2, 1), (2, 1)]}, "--real_dataset: real_parts is "),
        ({"real_parts": [(1, 2), (3, 1)]}, "--real_dataset: real_parts is "),
    ],
)
def test_a_resume_with_other_buckets_or_parts_is_refused(change, option):
    mix = {"real_dataset": 4, "cg_dataset": 2, "buckets": [0, 1, 0, 1, 1, 0], "real_parts": [(2, 2), (2, 1)]}
    state = MixedCGRealSampler(**mix).state_dict()
    with pytest.raises(InputError, match=option):
        MixedCGRealSampler(**mix | change).load_state_dict(state)


def test_buckets_smaller_than_a_global_batch_are_found():
    buckets = [0, 0, 0, 0, 1, 1, 0]
    sampler = MixedCGRealSampler(6, 1, batch_size=2, num_processes=2, buckets=buckets)
    assert sampler.small_buckets() == {1: 2}
    assert MixedCGRealSampler(6, 1, batch_size=2, buckets=buckets).small_buckets() == {}


@pytest.mark.parametrize(
    "parts", [[(3, 0)], [(3, -1)], [(3, "much")], [(3, "nan")], [(3, "1/0")], [(3, float("inf"))], [(3, 1), (0, 1)]]
)
def test_bad_weights_are_named(parts):
    with pytest.raises(InputError, match="--real_dataset: "):
        MixedCGRealSampler(3, 1, real_parts=parts)
