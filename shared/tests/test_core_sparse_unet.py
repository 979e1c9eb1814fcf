"""Blocks and the UNet: permutation, determinism, no state, batches that keep apart, gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.sparse import (
    ResidualBlock,
    SparseBatchNorm,
    SparseEncoder,
    SparseLinear,
    SparseTensor,
    SparseUNet,
    devoxelize,
    split_channels,
    voxelize,
)
from stillhouse.core.testing import assert_gradient

CHANNELS = (8, 8, 12, 12, 8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small for several threads to gain anything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cloud(count: int, seed: int) -> Tensor:
    return 3 * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def make(norm: str = "batch") -> SparseUNet:
    torch.manual_seed(0)
    return SparseUNet(3, CHANNELS, norm=norm)


def answer(net: nn.Module, points: Tensor, batch: Tensor | None = None) -> Tensor:
    voxels = voxelize(points, batch, 0.5)
    return devoxelize(net(SparseTensor(voxels.mean(points), voxels.coordinates)).features, voxels)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_any_number_of_stages(stages: int) -> None:
    widths = tuple(range(4, 5 + 2 * stages))
    points = cloud(200, 0)
    assert answer(SparseUNet(3, widths), points).shape == (200, widths[-1])
    encoder = SparseEncoder(3, 4, widths[1 : 1 + stages])
    voxels = voxelize(points, size=0.5)
    levels = encoder(SparseTensor(voxels.mean(points), voxels.coordinates))
    assert [level.coords.stride for level in levels] == [2**i for i in range(stages + 1)]
    assert [level.features.shape[1] for level in levels] == list(widths[: stages + 1])


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_permuted_points_permute_the_answer(norm: str) -> None:
    net = make(norm).double()
    points = cloud(300, 1).double()
    order = torch.randperm(300)
    torch.testing.assert_close(answer(net, points[order]), answer(net, points)[order])


def test_the_same_twice_is_bit_identical_also_in_the_gradient() -> None:
    points = cloud(400, 2)
    results = []
    for _ in range(2):
        net = make()
        y = answer(net, points)
        y.square().mean().backward()
        results.append((y.detach(), [p.grad for p in net.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_alternating_inputs_leave_no_trace_and_maps_are_freed() -> None:
    net = make().eval()
    first, second = cloud(300, 3), cloud(250, 4)
    with torch.no_grad():
        once = answer(net, first), answer(net, second)
        for _ in range(3):
            assert torch.equal(answer(net, first), once[0])
            assert torch.equal(answer(net, second), once[1])
    voxels = voxelize(first, size=0.5)
    net(SparseTensor(voxels.mean(first), voxels.coordinates)).features.sum().backward()
    gone = [weakref.ref(voxels.coordinates), weakref.ref(voxels.coordinates.coarser()[0])]
    gc.disable()  # no cycles: the sets go with their last reference
    try:
        del voxels
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(("norm", "training"), [("batch", False), ("layer", False), ("layer", True)])
def test_samples_of_a_batch_keep_apart(norm: str, training: bool) -> None:
    net = make(norm)
    clouds = [cloud(200, 5), cloud(300, 6)]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0
    answer(net, torch.cat(clouds))  # statistics as after training
    net.train(training)
    batch = torch.tensor([0] * 200 + [1] * 300)
    together = answer(net, torch.cat(clouds), batch)
    alone = torch.cat([answer(net, points) for points in clouds])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    shuffle = torch.randperm(500)
    torch.testing.assert_close(answer(net, torch.cat(clouds)[shuffle], batch[shuffle]), together[shuffle])


def test_every_parameter_gets_a_gradient() -> None:
    net = make()
    points = cloud(400, 7)
    loss = (answer(net, points) * torch.randn(400, CHANNELS[-1])).sum()
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_reaches_the_points() -> None:
    points = cloud(100, 8).requires_grad_()
    assert_gradient(answer(make("layer"), points).square().sum(), points)


def test_residual_block_is_its_shortcut_when_the_last_norm_is_zero() -> None:
    block = ResidualBlock(4, 4)
    nn.init.zeros_(block.second[1].weight)
    points = cloud(100, 9)
    voxels = voxelize(points, size=0.5)
    x = SparseTensor(torch.randn(len(voxels), 4), voxels.coordinates)
    torch.testing.assert_close(block(x).features, x.features.relu())


def test_modulate_sees_every_stage_once() -> None:
    net = make()
    seen = []

    def modulate(stage: int, x: SparseTensor) -> SparseTensor:
        seen.append((stage, x.coords.stride, x.features.shape[1]))
        return x

    points = cloud(200, 10)
    voxels = voxelize(points, size=0.5)
    x = SparseTensor(voxels.mean(points), voxels.coordinates)
    torch.testing.assert_close(net.eval()(x, modulate).features, net(x).features)
    assert seen == list(zip(range(4), (1, 2, 4, 2), net.input_widths, strict=True))


def test_one_voxel_trains_with_batch_norm_and_leaves_its_statistics() -> None:
    norm = SparseBatchNorm(3)
    voxels = voxelize(torch.zeros(5, 3), size=1.0)
    y = norm(SparseTensor(torch.full((1, 3), 2.0), voxels.coordinates))
    torch.testing.assert_close(y.features, torch.full((1, 3), 2.0), atol=1e-4, rtol=0)
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_autocast_runs_the_whole_network() -> None:
    net, points = make().eval(), cloud(300, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = answer(net, points)
    torch.testing.assert_close(y.float(), answer(net, points), atol=0.1, rtol=0.1)


def test_linear_is_a_convolution_of_side_one() -> None:
    voxels = voxelize(cloud(50, 12), size=0.5)
    x = SparseTensor(torch.randn(len(voxels), 3), voxels.coordinates)
    layer = SparseLinear(3, 5)
    torch.testing.assert_close(layer(x).features, x.features @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("channels", [(8,), (8, 8), (8, 8, 8, 8), (8, 0, 8)])
def test_wrong_channels_are_refused(channels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="channels is"):
        split_channels(channels)
