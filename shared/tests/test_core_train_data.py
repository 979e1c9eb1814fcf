from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.train import SeededLoader, sample_seed
from stillhouse.core.train.data import Feed


class Seeded:
    """Returns its key, so that a batch shows what was asked for."""

    seeded = True

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


class MPerClass:
    """Batches of two neighbours, in an order that depends on the epoch."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // 2

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.count, 2):
            first = (start + 2 * self.epoch) % self.count
            yield [first, first + 1]


def take(loader: SeededLoader, count: int) -> list:
    return [[part.tolist() for part in batch] for batch in islice(iter(loader), count)]


def test_epochs_are_permutations_that_differ() -> None:
    batches = take(SeededLoader(Seeded(12), batch_size=4, seed=5), 6)
    first, second = ([i for b in batches[start : start + 3] for i in b[0]] for start in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != list(range(12))


def test_sample_seeds_follow_seed_epoch_and_position_alone() -> None:
    batches = take(SeededLoader(Seeded(10), batch_size=4, drop_last=False, seed=2), 6)
    for number, (_, seeds) in enumerate(batches):
        epoch, start = divmod(number, 3)
        assert seeds == [sample_seed(2, epoch, 4 * start + i) for i in range(len(seeds))]
    assert [len(b[0]) for b in batches] == [4, 4, 2, 4, 4, 2]


def test_seeds_are_spread_evenly() -> None:
    seeds = {sample_seed(s, e, p) for s in range(4) for e in range(5) for p in range(500)}
    assert len(seeds) >= 9_990  # 10⁴ draws from 2³² collide about 0.01 times
    mean = sum(seeds) / len(seeds) / 2**32
    assert abs(mean - 0.5) < 5 / (12 * len(seeds)) ** 0.5  # five standard errors


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with fewer cores
@pytest.mark.parametrize("workers", [1, 3])
def test_worker_count_changes_nothing(workers: int) -> None:
    alone = take(SeededLoader(Seeded(20), batch_size=4, seed=1), 8)
    assert take(SeededLoader(Seeded(20), batch_size=4, seed=1, workers=workers), 8) == alone


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 30),
    size=st.integers(1, 8),
    drop=st.booleans(),
    used=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_resume_goes_on_where_it_stopped(count: int, size: int, drop: bool, used: int, seed: int) -> None:
    if drop and count < size:
        with pytest.raises(ValueError, match="no batch"):
            SeededLoader(Seeded(count), batch_size=size, drop_last=drop, seed=seed)
        return

    def make() -> SeededLoader:
        return SeededLoader(Seeded(count), batch_size=size, drop_last=drop, seed=seed)

    whole = take(make(), used + 7)
    stopped, resumed = make(), make()
    assert take(stopped, used) == whole[:used]
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 7) == whole[used:]


def test_two_ranks_see_what_one_sees() -> None:
    whole = take(SeededLoader(Seeded(24), batch_size=6, seed=4), 7)
    parts = []
    for rank in range(2):
        loader = SeededLoader(Seeded(24), batch_size=6, seed=4)
        loader.shard(rank, 2)
        parts.append(take(loader, 7))
    joined = [[a + b for a, b in zip(left, right, strict=True)] for left, right in zip(*parts, strict=True)]
    assert joined == whole


def test_batch_sampler_gets_its_epoch_and_resumes() -> None:
    def make() -> SeededLoader:
        return SeededLoader(Seeded(6), batch_sampler=MPerClass(6))

    indices = [b[0] for b in take(make(), 6)]
    assert indices == [[0, 1], [2, 3], [4, 5], [2, 3], [4, 5], [0, 1]]
    stopped, resumed = make(), make()
    take(stopped, 4)
    assert (stopped.epoch, stopped.position) == (1, 1)
    resumed.load_state_dict(stopped.state_dict())
    assert [b[0] for b in take(resumed, 2)] == indices[4:]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    take(SeededLoader(Seeded(8), batch_size=2), 9)
    assert torch.equal(before, torch.get_rng_state())


def test_errors_name_what_is_wrong() -> None:
    data = Seeded(8)
    with pytest.raises(ValueError, match="exactly one"):
        SeededLoader(data)
    with pytest.raises(ValueError, match="empty"):
        SeededLoader(Seeded(0), batch_size=1)
    with pytest.raises(ValueError, match="divide by the 3 ranks"):
        SeededLoader(data, batch_size=4).shard(0, 3)
    ragged = SeededLoader(data, batch_sampler=[[0, 1], [2]])
    ragged.shard(0, 2)
    with pytest.raises(ValueError, match="batch 1 holds 1 samples"):
        take(ragged, 2)
    with pytest.raises(ValueError, match="samples = 8, this one 6"):
        SeededLoader(Seeded(6), batch_size=2).load_state_dict(SeededLoader(data, batch_size=2).state_dict())

    class Liar(list):
        def __len__(self) -> int:
            return 3

    with pytest.raises(ValueError, match="both must agree"):
        take(SeededLoader(data, batch_sampler=Liar([[0], [1]])), 3)


def test_feed_starts_plain_iterables_over_and_skips_what_was_used() -> None:
    feed = Feed([1, 2, 3], 0, 1, pin_memory=False)
    assert [feed.next() for _ in range(5)] == [1, 2, 3, 1, 2]
    assert feed.epoch == 1
    resumed = Feed([1, 2, 3], 0, 1, pin_memory=False)
    resumed.load_state_dict(feed.state_dict())
    assert [resumed.next() for _ in range(3)] == [3, 1, 2]
    once = Feed(iter([1, 2]), 0, 1, pin_memory=False)
    assert [once.next(), once.next()] == [1, 2]
    with pytest.raises(ValueError, match="ended after 2 batches"):
        once.next()
