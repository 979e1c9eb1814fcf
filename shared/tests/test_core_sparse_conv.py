"""Sparse convolutions: equal to dense ones, to brute force, to finite differences, and to spconv."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from stillhouse.core.sparse import (
    CoordinateSet,
    SparseTensor,
    StridedConv3d,
    SubmanifoldConv3d,
    TransposedConv3d,
    sparse_conv,
    spconv_available,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small for several threads to gain anything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_cells(count: int, *, seed: int = 0, batch: int = 2, low: int = -5, high: int = 6) -> Tensor:
    """Distinct cells in random order, negative ones among them."""
    rng = torch.Generator().manual_seed(seed)
    cells = torch.randint(low, high, (count, 3), generator=rng)
    cells = torch.cat((torch.randint(0, batch, (count, 1), generator=rng), cells), 1).unique(dim=0)
    return cells[torch.randperm(len(cells), generator=rng)]


def tensor(cells: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> SparseTensor:
    rng = torch.Generator().manual_seed(1)
    features = torch.randn(len(cells), channels, generator=rng, dtype=torch.float64).to(dtype)
    return SparseTensor(features, CoordinateSet(cells))


def at_cells(volume: Tensor, x: SparseTensor, low: Tensor) -> Tensor:
    b, (i, j, k) = x.coords.batch, (x.coords.coords[:, 1:] - low).unbind(1)
    return volume[b, :, i, j, k]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_submanifold_equals_dense_conv3d(kernel: int) -> None:
    x = tensor(random_cells(900), 6)
    conv = SubmanifoldConv3d(6, 7, kernel, bias=True)
    volume, low = x.dense()
    dense = F.conv3d(volume, conv.dense_weight(), conv.bias, padding=kernel // 2)
    assert (conv(x).features - at_cells(dense, x, low)).abs().max() < 1e-5


def test_full_box_equals_dense_everywhere() -> None:
    cells = torch.tensor(list(itertools.product([0, 1], range(-2, 3), range(4), range(-1, 5))))
    x = tensor(cells, 4)
    conv = SubmanifoldConv3d(4, 5)
    dense = F.conv3d(x.dense()[0], conv.dense_weight(), padding=1)
    assert (x.replace(conv(x).features).dense()[0] - dense).abs().max() < 1e-5


@pytest.mark.parametrize("stride", [2, 3])
def test_strided_equals_dense_and_the_parent_is_a_true_floor(stride: int) -> None:
    x = tensor(random_cells(300, batch=1, low=-7, high=8), 3)
    conv = StridedConv3d(3, 4, stride)
    y = conv(x)
    parents = {tuple(int(c // stride) for c in cell[1:]) for cell in x.coords.coords.tolist()}
    assert {tuple(cell[1:]) for cell in y.coords.coords.tolist()} == parents
    assert y.coords.stride == stride
    low, size = -9, 18  # a multiple of both strides
    volume = torch.zeros(1, 3, size, size, size)
    i, j, k = (x.coords.coords[:, 1:] - low).unbind(1)
    volume[0, :, i, j, k] = x.features.T
    if stride == 2:
        volume, low = F.pad(volume, (1, 1) * 3), low - 1
    weight = conv.weight.permute(2, 1, 0).reshape(4, 3, stride, stride, stride)
    dense = F.conv3d(volume, weight, stride=stride)
    a, b, c = (y.coords.coords[:, 1:] - low // stride).unbind(1)
    assert (dense[0, :, a, b, c].T - y.features).abs().max() < 1e-5


def test_odd_strided_kernel_equals_dense() -> None:
    x = tensor(random_cells(200, batch=1), 3)
    conv = StridedConv3d(3, 4, 2, kernel=3)
    y = conv(x)
    volume = torch.zeros(1, 3, 16, 16, 16)
    i, j, k = (x.coords.coords[:, 1:] + 8).unbind(1)
    volume[0, :, i, j, k] = x.features.T
    weight = conv.weight.permute(2, 1, 0).reshape(4, 3, 3, 3, 3)
    dense = F.conv3d(volume, weight, stride=2, padding=1)
    a, b, c = (y.coords.coords[:, 1:] + 4).unbind(1)
    assert (dense[0, :, a, b, c].T - y.features).abs().max() < 1e-5


@pytest.mark.parametrize("kernel", [2, 3])
def test_transposed_is_the_adjoint_over_one_shared_map(kernel: int) -> None:
    x = tensor(random_cells(200), 3, torch.float64)
    down = StridedConv3d(3, 4, 2, kernel=kernel).double()
    up = TransposedConv3d(4, 3, 2, kernel=kernel).double()
    with torch.no_grad():
        up.weight.copy_(down.weight.mT)
    y = down(x)
    g = y.replace(torch.randn(len(y.coords), 4, dtype=torch.float64))
    back = up(g, x.coords)
    assert back.coords is x.coords
    assert x.coords.coarser(2, kernel)[0] is y.coords
    torch.testing.assert_close((y.features * g.features).sum(), (x.features * back.features).sum())


def test_transposed_refuses_foreign_voxels() -> None:
    x, other = tensor(random_cells(50), 3), tensor(random_cells(50, seed=9), 3)
    with pytest.raises(ValueError, match="coarser set"):
        TransposedConv3d(3, 3)(StridedConv3d(3, 3)(other), x.coords)


def map_of(kind: str) -> tuple[CoordinateSet, object, int, int]:
    coords = CoordinateSet(random_cells(40, low=-2, high=3))
    if kind == "submanifold":
        return coords, coords.submanifold(3), len(coords), len(coords)
    coarse, kernel_map = coords.coarser(2, 2 if kind == "block" else 3)
    return coords, kernel_map, len(coords), len(coarse)


@pytest.mark.parametrize("kind", ["submanifold", "block", "window"])
@pytest.mark.parametrize("transposed", [False, True])
def test_first_and_second_gradients(kind: str, transposed: bool) -> None:
    _, kernel_map, n_in, n_out = map_of(kind)
    rows = n_out if transposed else n_in
    x = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kernel_map.size, 2, 3, dtype=torch.float64, requires_grad=True)

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return sparse_conv(x, weight, kernel_map, transposed=transposed)

    assert gradcheck(conv, (x, weight), fast_mode=True)
    assert gradgradcheck(conv, (x, weight), fast_mode=True)
    assert gradcheck(lambda x: conv(x, weight.detach()), (x,), fast_mode=True)
    assert gradcheck(lambda weight: conv(x.detach(), weight), (weight,), fast_mode=True)


def test_large_and_small_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs are summed offset by offset and gathered in parts: the same values and gradients."""
    from stillhouse.core.sparse import functional

    coords = CoordinateSet(random_cells(400))
    for kernel_map in (coords.submanifold(), coords.coarser()[1], coords.coarser(2, 3)[1]):
        results = []
        for limit in (2**30, 0):
            monkeypatch.setattr(functional, "_AT_ONCE", limit)
            monkeypatch.setattr(functional, "_MAPPED", limit)
            torch.manual_seed(0)
            x = torch.randn(len(coords), 3, dtype=torch.float64, requires_grad=True)
            weight = torch.randn(kernel_map.size, 3, 5, dtype=torch.float64, requires_grad=True)
            y = sparse_conv(x, weight, kernel_map)
            up = sparse_conv(y, weight.mT, kernel_map, transposed=True)
            half = sparse_conv(x.bfloat16(), weight.bfloat16(), kernel_map).double()
            results.append((y, up, half, *torch.autograd.grad((y.sin().sum() + up.cos().sum()), (x, weight))))
        for small, large in zip(*results, strict=True):
            torch.testing.assert_close(small, large, atol=0.1 if small is results[0][2] else 1e-9, rtol=1e-9)


def brute_force(cells: Tensor, x: Tensor, weight: Tensor, kernel: int) -> Tensor:
    """Cell by cell through a dictionary."""
    places = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    y = torch.zeros(len(cells), weight.shape[2], dtype=x.dtype)
    around = range(-(kernel // 2), kernel // 2 + 1)
    for (b, i, j, k), row in places.items():
        for slot, (di, dj, dk) in enumerate(itertools.product(around, repeat=3)):
            other = places.get((b, i + di, j + dj, k + dk))
            if other is not None:
                y[row] += x[other] @ weight[slot]
    return y


cell = st.tuples(st.integers(0, 2), *[st.one_of(st.integers(-3, 3), st.integers(-32759, 32759))] * 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(cell, min_size=1, max_size=40, unique=True), st.sampled_from([1, 3, 5]))
def test_submanifold_equals_brute_force(cells: list[tuple[int, ...]], kernel: int) -> None:
    """Any order, any batch, cells at the very end of the range."""
    coords = torch.tensor(cells)
    x = torch.randn(len(cells), 2, dtype=torch.float64)
    weight = torch.randn(kernel**3, 2, 3, dtype=torch.float64)
    y = sparse_conv(x, weight, CoordinateSet(coords).submanifold(kernel))
    torch.testing.assert_close(y, brute_force(coords, x, weight, kernel))


@settings(max_examples=40, deadline=None)
@given(st.lists(cell, min_size=1, max_size=40, unique=True), st.randoms())
def test_permuted_voxels_permute_the_output(cells: list[tuple[int, ...]], random: object) -> None:
    order = list(range(len(cells)))
    random.shuffle(order)
    coords, order = torch.tensor(cells), torch.tensor(order)
    x = torch.randn(len(cells), 2, dtype=torch.float64)
    weight = torch.randn(27, 2, 3, dtype=torch.float64)
    y = sparse_conv(x, weight, CoordinateSet(coords).submanifold())
    permuted = sparse_conv(x[order], weight, CoordinateSet(coords[order]).submanifold())
    torch.testing.assert_close(permuted, y[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    """27 products of about 1 each, plus a tiny one that a running half-precision sum would lose."""
    cells = torch.tensor(list(itertools.product([0], range(-1, 2), range(-1, 2), range(-1, 2))))
    coords = CoordinateSet(cells)
    x = torch.ones(27, 1, dtype=dtype)
    weight = torch.full((27, 1, 1), 2.0**-9, dtype=dtype)
    weight[0] = 1.0
    y = sparse_conv(x, weight, coords.submanifold())
    centre = (cells == 0).all(1)
    exact = torch.tensor(1.0 + 26 * 2.0**-9)
    assert y.dtype == dtype
    assert y[centre].item() == exact.to(dtype).item()  # a running bfloat16 sum stays at 1


def test_autocast_casts_and_float_weights_are_trained() -> None:
    x = tensor(random_cells(100), 4)
    conv = SubmanifoldConv3d(4, 5, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x).features
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), conv(x).features, atol=0.05, rtol=0.05)


def test_one_voxel_and_voxels_without_neighbours() -> None:
    for cells in ([[0, 0, 0, 0]], [[0, 0, 0, 0], [0, 5, 5, 5], [3, 0, 0, 1]]):
        x = tensor(torch.tensor(cells), 3)
        conv = SubmanifoldConv3d(3, 2)
        torch.testing.assert_close(conv(x).features, x.features @ conv.weight[13])


def test_wrong_shapes_and_types_are_named() -> None:
    coords = CoordinateSet(random_cells(30))
    kernel_map = coords.submanifold()
    with pytest.raises(ValueError, match=r"weight \[27, C, D\]"):
        sparse_conv(torch.zeros(len(coords), 3), torch.zeros(8, 3, 3), kernel_map)
    with pytest.raises(ValueError, match="autocast"):
        sparse_conv(torch.zeros(len(coords), 3), torch.zeros(27, 3, 3).double(), kernel_map)
    with pytest.raises(ValueError, match="odd"):
        SubmanifoldConv3d(3, 3, 2)
    with pytest.raises(ValueError, match="backend"):
        SubmanifoldConv3d(3, 3, backend="minkowski")


@pytest.mark.oracle
def test_spconv_on_cpu_equals_ours() -> None:
    pytest.importorskip("spconv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own import
        if not spconv_available("cpu"):
            pytest.skip("spconv has no CPU backend here")
    x = tensor(random_cells(900), 8)
    for kernel in (3, 5):
        conv = SubmanifoldConv3d(8, 6, kernel, bias=True)
        fast = SubmanifoldConv3d(8, 6, kernel, bias=True, backend="spconv")
        fast.load_state_dict(conv.state_dict())
        with torch.no_grad():
            for _ in range(2):  # the second time from the cached pairs
                assert (fast(x).features - conv(x).features).abs().max() < 1e-5
    with pytest.raises(ValueError, match="no gradient on CPU"):
        fast(x)


@pytest.mark.gpu
def test_spconv_on_cuda_equals_ours() -> None:
    if not spconv_available("cuda"):
        pytest.skip("neither spconv-triton nor spconv is installed")
    cells = random_cells(900).cuda()
    x = SparseTensor(torch.randn(len(cells), 16, device="cuda"), CoordinateSet(cells))
    conv = SubmanifoldConv3d(16, 32).cuda()
    fast = SubmanifoldConv3d(16, 32, backend="spconv").cuda()
    fast.load_state_dict(conv.state_dict())
    ours, theirs = conv(x).features, fast(x).features
    torch.testing.assert_close(theirs, ours, atol=2e-2, rtol=2e-2)  # tensor cores in TF32
    grads = [
        torch.autograd.grad(y.square().mean(), layer.weight)[0] for y, layer in ((ours, conv), (theirs, fast))
    ]
    torch.testing.assert_close(grads[1], grads[0], atol=2e-2, rtol=2e-2)
