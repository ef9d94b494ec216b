"""The endless order: nothing lost, nothing doubled, any step at once, any number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ip_adapter_trainer.feed.sampler import Pair, Sampler, share

BUCKETS = st.lists(st.sampled_from([0, 2, 3, 7]), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**31)
GROUPS = st.integers(1, 24)


def _steps(sampler: Sampler, steps: int) -> list[Pair]:
    return [pair for step in range(steps) for pair in sampler.step(step)]


@settings(max_examples=80, deadline=None)
@given(BUCKETS, SEEDS, GROUPS)
def test_every_row_comes_once_an_epoch_with_the_index_that_says_so(buckets: list[int], seed: int, group: int) -> None:
    rows, epochs = len(buckets), 3
    sampler = Sampler(buckets, seed=seed, batch_images=group)
    # A bucket's leftovers wait for its next batch, so look until the slowest has finished the epochs.
    pairs = _steps(sampler, sampler.steps_before(epochs + group))
    seen = [pair for pair in pairs if pair[0] < epochs * rows]
    assert sorted(index for index, _ in seen) == list(range(epochs * rows))
    for epoch in range(epochs):
        assert sorted(row for index, row in seen if index // rows == epoch) == list(range(rows))
    assert len({index for index, _ in pairs}) == len(pairs)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, SEEDS, GROUPS, st.integers(0, 200))
def test_any_step_at_once_equals_the_steps_in_turn(buckets: list[int], seed: int, group: int, step: int) -> None:
    used, fresh = (Sampler(buckets, seed=seed, batch_images=group) for _ in range(2))
    for before in range(max(0, step - 20), step):
        used.step(before)
    pairs = used.step(step)
    assert pairs == fresh.step(step) and len(pairs) == group
    assert len({buckets[row] for _, row in pairs}) == 1
    epoch = used.epoch_of(step)
    assert used.steps_before(epoch) <= step < used.steps_before(epoch + 1)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, SEEDS, GROUPS, GROUPS)
def test_the_row_of_an_index_knows_no_batch_size(buckets: list[int], seed: int, one: int, other: int) -> None:
    first, second = (dict(_steps(Sampler(buckets, seed=seed, batch_images=g), 10)) for g in (one, other))
    assert all(second[index] == row for index, row in first.items() if index in second)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, SEEDS, st.integers(0, 50), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_any_factorisation_trains_on_the_same_images(
    buckets: list[int], seed: int, step: int, micro: int, world: int, accumulation: int
) -> None:
    batch = Sampler(buckets, seed=seed, batch_images=micro * world * accumulation).step(step)
    parts = [share(batch, rank=rank, world=world, micro_images=micro) for rank in range(world)]
    assert all(len(part) == accumulation and all(len(m) == micro for m in part) for part in parts)
    assert Counter(pair for part in parts for m in part for pair in m) == Counter(batch)
    # What all processes do at one time is the same stretch of the batch, whichever way it is shared.
    together = [sorted(pair for part in parts for pair in part[turn]) for turn in range(accumulation)]
    stride = micro * world
    assert together == [sorted(batch[turn * stride :][:stride]) for turn in range(accumulation)]


def test_epochs_and_seeds_differ_and_buckets_are_mixed() -> None:
    buckets = [0] * 64 + [1] * 64
    sampler = Sampler(buckets, seed=0, batch_images=8)
    first, second = ([row for step in range(16) for _, row in sampler.step(step + 16 * e)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(128)) and first != second
    assert first != [row for step in range(16) for _, row in Sampler(buckets, seed=1, batch_images=8).step(step)]
    turns = [buckets[sampler.step(step)[0][1]] for step in range(16)]
    assert sorted(turns) != turns and sorted(turns, reverse=True) != turns


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1, 0, 2, 3]), min_size=1, max_size=40).filter(lambda b: max(b) >= 0), GROUPS)
def test_rows_in_no_bucket_are_not_trained_on(buckets: list[int], group: int) -> None:
    sampler, kept = Sampler(buckets, seed=0, batch_images=group), np.flatnonzero(np.array(buckets) >= 0)
    alone = Sampler([buckets[row] for row in kept], seed=0, batch_images=group)
    assert _steps(sampler, 9) == [(index, kept[row]) for index, row in _steps(alone, 9)]


@settings(max_examples=60, deadline=None)
@given(BUCKETS, SEEDS, GROUPS, st.integers(0, 30))
def test_rows_that_no_step_has_are_counted_beforehand(buckets: list[int], seed: int, group: int, steps: int) -> None:
    sampler = Sampler(buckets, seed=seed, batch_images=group)
    assert sampler.never_seen(steps) == len(buckets) - len({row for _, row in _steps(sampler, steps)})
    assert dict(sampler.slow_buckets()) == {b: n for b, n in Counter(buckets).items() if n < group}


def test_a_single_row_fills_any_batch() -> None:
    sampler = Sampler([0], seed=0, batch_images=4)
    assert sampler.step(2) == [(8, 0), (9, 0), (10, 0), (11, 0)]
    assert sampler.steps_before(3) == 0 and sampler.steps_before(4) == 1


def test_a_million_rows_and_far_steps_are_quick() -> None:
    sampler = Sampler(np.zeros(1_000_000, np.int16), seed=0, batch_images=64)
    assert len(sampler.step(10**7)) == 64 and sampler.epoch_of(10**7) == 640


def test_sharing_needs_a_whole_number_of_micro_batches() -> None:
    with pytest.raises(AssertionError):
        share(list(islice(count(), 10)), rank=0, world=3, micro_images=1)
