"""Voxels and coordinate sets: keys, rounding, means, ranges, matching."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from stillhouse.core.sparse import (
    Bags,
    CoordinateSet,
    devoxelize,
    gather_rows,
    level_sizes,
    nearest_voxels,
    voxelize,
)
from stillhouse.core.sparse._keys import pack, unpack

cell = st.tuples(st.integers(0, 32767), *[st.integers(-32759, 32759)] * 3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small for several threads to gain anything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@settings(max_examples=100, deadline=None)
@given(st.lists(cell, min_size=1, max_size=20))
def test_keys_keep_the_coordinates_and_their_order(cells: list[tuple[int, ...]]) -> None:
    coords = torch.tensor(cells)
    keys = pack(coords)
    assert torch.equal(unpack(keys), coords)
    assert [cells[i] for i in torch.argsort(keys, stable=True).tolist()] == sorted(cells)


def test_mean_equals_numpy_and_slicing_gives_it_back() -> None:
    rng = torch.Generator().manual_seed(0)
    points = 2 * torch.randn(500, 3, generator=rng, dtype=torch.float64)
    batch = torch.randint(0, 3, (500,), generator=rng)
    voxels = voxelize(points, batch, 0.5, batch_size=3)
    cells = np.column_stack((batch.numpy(), np.rint(points.numpy() / 0.5).astype(int)))
    unique, inverse = np.unique(cells, axis=0, return_inverse=True)
    assert np.array_equal(voxels.coords.numpy(), unique)
    assert np.array_equal(voxels.inverse.numpy(), inverse.reshape(-1))
    mean = voxels.mean(points)
    for i in range(0, len(unique), 17):
        mine = points[torch.from_numpy(inverse.reshape(-1) == i)]
        torch.testing.assert_close(mean[i], mine.mean(0))
        assert voxels.counts[i] == len(mine)
    assert ((devoxelize(mean, voxels) - points).abs() <= 0.5).all()
    assert ((points - voxels.centres()[voxels.inverse]).abs() <= 0.25 + 1e-12).all()


def test_slice_of_voxelise_is_the_identity_for_one_point_voxels() -> None:
    points = torch.cartesian_prod(*[torch.arange(-3.0, 4.0)] * 3)[torch.randperm(343)]
    points = points + 0.3 * torch.rand(343, 3)
    voxels = voxelize(points, size=1.0, rounding="floor")
    assert len(voxels) == 343
    assert torch.equal(devoxelize(voxels.mean(points), voxels), points)


def test_permuted_points_give_the_same_voxels() -> None:
    points = torch.randn(300, 3)
    order = torch.randperm(300)
    first, second = voxelize(points, size=0.4), voxelize(points[order], size=0.4)
    assert torch.equal(first.coords, second.coords)
    assert torch.equal(first.inverse[order], second.inverse)
    torch.testing.assert_close(first.mean(points), second.mean(points[order]))


def test_rounding_and_floor() -> None:
    points = torch.tensor([[-0.6, -0.4, 0.4], [0.6, 1.4, -1.6]])
    assert voxelize(points, size=1.0).coords[:, 1:].tolist() == [[-1, 0, 0], [1, 1, -2]]
    floor = voxelize(points, size=1.0, rounding="floor")
    assert floor.coords[:, 1:].tolist() == [[-1, -1, 0], [0, 1, -2]]
    assert floor.centres().tolist() == [[-0.5, -0.5, 0.5], [0.5, 1.5, -1.5]]


def test_gradients_of_mean_and_slice() -> None:
    points = torch.randn(30, 3, dtype=torch.float64)
    voxels = voxelize(points, size=1.5)
    values = torch.randn(30, 2, dtype=torch.float64, requires_grad=True)
    features = torch.randn(len(voxels), 2, dtype=torch.float64, requires_grad=True)
    for function, argument in ((voxels.mean, values), (lambda f: devoxelize(f, voxels), features)):
        assert gradcheck(function, (argument,))
        assert gradgradcheck(function, (argument,))
    index = torch.tensor([2, 0, 2, 2])
    assert gradcheck(lambda f: gather_rows(f, index), (features,))


def test_half_precision_mean_is_summed_in_float32() -> None:
    values = torch.ones(4096, 1, dtype=torch.float16)
    voxels = voxelize(torch.zeros(4096, 3), size=1.0)
    assert voxels.sum(values).item() == 4096.0  # a running float16 sum ends at 2048


def test_bags_list_the_rows_of_each_destination() -> None:
    bags = Bags.of(torch.tensor([1, 3, 1, 0]), 5)
    assert bags.offsets.tolist() == [0, 1, 3, 3, 4, 4]
    assert bags.order.tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize(
    ("points", "match"),
    [
        (torch.zeros(0, 3), "at least one row"),
        (torch.zeros(4, 2), r"\[N, 3\]"),
        (torch.zeros(4, 3, dtype=torch.int64), "floating point"),
        (torch.tensor([[0.0, float("nan"), 0.0], [1.0, 1.0, 1.0]]), "1 rows with NaN"),
        (torch.tensor([[0.0, float("inf"), 0.0]]), "NaN or infinity"),
        (torch.tensor([[0.0, 5000.0, 0.0]]), "take larger voxels"),
    ],
)
def test_bad_points_are_refused(points: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        voxelize(points, size=0.05)


def test_bad_arguments_are_refused() -> None:
    points = torch.zeros(4, 3)
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="size is"):
            voxelize(points, size=size)
    with pytest.raises(ValueError, match="int64"):
        voxelize(points, torch.zeros(4), 1.0)
    with pytest.raises(ValueError, match="batch reaches"):
        voxelize(points, torch.full((4,), 2), 1.0, batch_size=2)
    with pytest.raises(ValueError, match="rounding"):
        voxelize(points, size=1.0, rounding="up")
    voxels = voxelize(points, size=1.0)
    with pytest.raises(ValueError, match="one row a voxel"):
        devoxelize(torch.zeros(3, 2), voxels)
    with pytest.raises(ValueError, match=r"\[4, C\]"):
        voxels.mean(torch.zeros(3, 2))


def test_coordinate_sets_refuse_what_they_cannot_hold() -> None:
    for coords, match in (
        (torch.zeros(0, 4, dtype=torch.int64), "empty"),
        (torch.zeros(2, 4, dtype=torch.int64), "twice"),
        (torch.zeros(2, 3, dtype=torch.int64), r"\[M, 4\]"),
        (torch.zeros(2, 4), "int64"),
        (torch.tensor([[0, 0, 32760, 0]]), "larger"),
        (torch.tensor([[-1, 0, 0, 0]]), "batch"),
        (torch.tensor([[40000, 0, 0, 0]]), "batch"),
    ):
        with pytest.raises(ValueError, match=match):
            CoordinateSet(coords)
    with pytest.raises(ValueError, match="batch index 1"):
        CoordinateSet(torch.tensor([[1, 0, 0, 0]]), batch_size=1)
    with pytest.raises(ValueError, match="stride is 1"):
        CoordinateSet(torch.tensor([[0, 0, 0, 0]])).coarser(1)
    with pytest.raises(ValueError, match="kernel is 4"):
        CoordinateSet(torch.tensor([[0, 0, 0, 0]])).coarser(2, 4)


def test_levels_of_a_chain_have_true_floors() -> None:
    coords = CoordinateSet(torch.tensor([[0, -9, -1, 0], [0, -8, 7, 3], [0, 7, 8, -16]]))
    sizes = level_sizes(coords, 3)
    coarse = coords.coarser()[0].coarser()[0].coarser()[0]
    assert coarse.coords.tolist() == [[0, -2, -1, 0], [0, -1, 0, 0], [0, 0, 1, -2]]
    assert (sizes, coarse.stride) == ([3, 3, 3, 3], 8)


def brute_nearest(queries: CoordinateSet, keys: CoordinateSet) -> torch.Tensor:
    distance = torch.cdist(queries.centres(), keys.centres())
    return distance.masked_fill(queries.batch[:, None] != keys.batch, float("inf"))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 4, 8]))
def test_matching_finds_the_nearest_centre_of_the_same_sample(seed: int, stride: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    fine = voxelize(
        8 * torch.randn(120, 3, generator=rng), torch.arange(120) % 3, 1.0, batch_size=3
    ).coordinates
    other = voxelize(8 * torch.randn(30, 3, generator=rng), torch.arange(30) % 3, 1.0, batch_size=3)
    coarse = other.coordinates.coarser(stride)[0]
    match = nearest_voxels(fine, coarse)
    distance = brute_nearest(fine, coarse)
    torch.testing.assert_close(distance.gather(1, match[:, None])[:, 0], distance.amin(1))
    assert torch.equal(coarse.batch[match], fine.batch)


def test_matching_breaks_ties_by_place_alone() -> None:
    """Shuffled, alone, among others, or by all distances instead of a tree: the same answer."""
    from stillhouse.core.sparse import matching

    cells = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *[torch.arange(-4, 4)] * 3)
    fine = CoordinateSet(cells)
    around = torch.tensor([[0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, -2, 0, 0], [0, 0, 0, -2]])
    answer = around[nearest_voxels(fine, CoordinateSet(around))]
    shuffled = around[torch.tensor([3, 1, 4, 0, 2])]
    assert torch.equal(shuffled[nearest_voxels(fine, CoordinateSet(shuffled))], answer)
    crowd = torch.cat((shuffled, torch.tensor([[1, 0, 0, 0], [0, 50, 50, 50]])))
    both = CoordinateSet(torch.cat((cells, torch.tensor([[1, 0, 0, 0]]))))
    assert torch.equal(crowd[nearest_voxels(both, CoordinateSet(crowd))][:-1], answer)
    query = fine.centres() + torch.tensor(matching._NUDGE)
    target = CoordinateSet(shuffled).centres()
    every = (query[:, None] - target[None]).square().sum(-1).argmin(1)
    assert torch.equal(shuffled[every], answer)


def test_matching_needs_a_voxel_in_every_sample() -> None:
    queries = CoordinateSet(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]))
    keys = CoordinateSet(torch.tensor([[0, 0, 0, 0]]), batch_size=2)
    with pytest.raises(ValueError, match="no voxel of sample 1"):
        nearest_voxels(queries, keys)
