"""The networks: shapes, symmetries, gates against the slow way, gradients, sizes, memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.core.sparse import SparseTensor, level_sizes, nearest_voxels, voxelize
from stillhouse.core.testing import assert_gradient
from stillhouse.lidar.networks import (
    NetworkConfig,
    NoiseNet,
    PartialEncoder,
    RefineNet,
    SinglePassNet,
    memory_estimate,
    tile_by_distance,
    time_embedding,
)

SMALL = NetworkConfig(channels=(8, 8, 12, 16, 16, 12, 8), voxel=0.3, point_offsets=True)
FAITHFUL = dataclasses.replace(SMALL, point_offsets=False)
LAYER = dataclasses.replace(SMALL, norm="layer")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small for several threads to gain anything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clouds(size: int, n: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(size, n, 3, generator=torch.Generator().manual_seed(seed))


def pair(
    config: NetworkConfig, size: int = 2, n: int = 60
) -> tuple[PartialEncoder, NoiseNet, Tensor, Tensor]:
    torch.manual_seed(0)
    encoder, net = PartialEncoder(config), NoiseNet(config)
    partial = clouds(size, n)
    noisy = partial.repeat(1, 5, 1) + 0.5 * clouds(size, 5 * n, 1, 1.0)
    settle(encoder, net)
    net(noisy, encoder(partial), torch.full((size,), 500))  # statistics of the norms as after training
    return encoder, net, partial, noisy


def settle(*modules: nn.Module) -> None:
    """Batch norms take the statistics of the next pass as they are."""
    for module in modules:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.momentum = 1.0


@pytest.mark.parametrize("stages", [1, 3, 4])
def test_any_number_of_stages(stages: int) -> None:
    channels = {1: (8, 12, 8), 3: SMALL.channels, 4: (8, 8, 12, 16, 16, 16, 12, 8, 8)}[stages]
    config = dataclasses.replace(SMALL, channels=channels)
    encoder, net, partial, noisy = pair(config)
    condition = encoder(partial)
    assert condition.tensor.coords.stride == 2**stages
    assert net(noisy, condition, torch.tensor([0, 999])).shape == noisy.shape


def test_time_embedding_is_the_sinusoid_of_the_reference() -> None:
    t = torch.tensor([0, 7, 999])
    embedding = time_embedding(t, 96)
    for row, time in zip(embedding, t.tolist(), strict=True):
        for i in (0, 1, 20, 47):
            angle = time * 10000 ** (-i / 47)
            assert row[i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert row[48 + i].item() == pytest.approx(math.cos(angle), abs=1e-4)


def test_gates_once_a_coarse_voxel_equal_gates_once_a_fine_voxel() -> None:
    """The order of the reference: match first, then the MLPs for every fine voxel."""
    encoder, net, partial, noisy = pair(FAITHFUL)
    encoder.eval(), net.eval()
    condition, t = encoder(partial), torch.tensor([3, 700])
    embedding = time_embedding(t, FAITHFUL.time_channels)
    batch = torch.arange(2).repeat_interleave(noisy.shape[1])
    voxels = voxelize(noisy.reshape(-1, 3), batch, FAITHFUL.voxel)

    def slow(stage: int, x: SparseTensor) -> SparseTensor:
        match = nearest_voxels(x.coords, condition.tensor.coords)
        gate = net.gates[stage]
        scan = gate.scan(condition.features[match])
        time = gate.time(embedding[x.coords.batch])
        return x.replace(x.features * gate.both(torch.cat((scan, time), 1)))

    y = net.unet(SparseTensor(voxels.mean(noisy.reshape(-1, 3)), voxels.coordinates), slow).features
    head = net.head.second(nn.functional.leaky_relu(net.head.first(y[voxels.inverse]), 0.1))
    torch.testing.assert_close(net(noisy, condition, t), head.reshape(noisy.shape), atol=1e-5, rtol=1e-4)


def test_points_of_a_voxel_share_one_answer_unless_offsets_are_shown() -> None:
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [3.0, 0.0, 0.0]]])
    for config, same in ((FAITHFUL, True), (SMALL, False)):
        torch.manual_seed(0)
        encoder, net = PartialEncoder(config).eval(), NoiseNet(config).eval()
        noise = net(points, encoder(points), torch.tensor([10]))[0]
        assert torch.equal(noise[0], noise[1]) == same
        assert not torch.equal(noise[0], noise[2])


@pytest.mark.parametrize("config", [SMALL, FAITHFUL, LAYER], ids=["offsets", "faithful", "layer"])
def test_permuted_points_permute_the_noise(config: NetworkConfig) -> None:
    encoder, net, partial, noisy = pair(config)
    encoder, net, partial, noisy = encoder.double(), net.double(), partial.double(), noisy.double()
    order, shuffle = torch.randperm(noisy.shape[1]), torch.randperm(partial.shape[1])
    t = torch.tensor([5, 500])
    encoder.eval()  # running statistics of the condition must not move between the calls
    first = net(noisy, encoder(partial), t)
    second = net(noisy[:, order], encoder(partial[:, shuffle]), t)
    torch.testing.assert_close(second, first[:, order])


@pytest.mark.parametrize(("config", "training"), [(SMALL, False), (LAYER, False), (LAYER, True)])
def test_clouds_of_a_batch_keep_apart(config: NetworkConfig, training: bool) -> None:
    encoder, net, partial, noisy = pair(config, size=3)
    refine, single = RefineNet(config), SinglePassNet(config)
    settle(refine, single)
    refine(partial), single(partial)
    for module in (encoder, net, refine, single):
        module.train(training)
    t, noise = torch.tensor([0, 400, 999]), clouds(3, 600, 5, 1.0)
    together = (
        net(noisy, encoder(partial), t),
        refine(partial),
        single(partial, noise=noise),
    )
    for i in range(3):
        one = slice(i, i + 1)
        alone = (
            net(noisy[one], encoder(partial[one]), t[one]),
            refine(partial[one]),
            single(partial[one], noise=noise[one]),
        )
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[one], b, atol=2e-5, rtol=1e-4)


def test_null_condition_is_the_cloud_of_zeros_and_leaves_the_statistics() -> None:
    encoder, net, partial, noisy = pair(SMALL)
    null = encoder(partial[:1]).null()
    assert (null.batch_size, len(null.features)) == (1, 1)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    null = encoder.null(2)
    assert encoder.training
    assert all(module.training for module in encoder.modules())
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert null.tensor.coords.coords.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(null.features, encoder.eval()(torch.zeros(2, 7, 3)).features)
    assert net(noisy, null, torch.tensor([1, 1])).isfinite().all()


def test_dropped_samples_get_the_null_condition_and_the_others_keep_theirs() -> None:
    encoder, net, partial, noisy = pair(LAYER, size=3)
    t = torch.tensor([10, 20, 30])
    condition = encoder(partial)
    dropped = condition.drop(torch.tensor([False, True, False]))
    expected = net(noisy, condition, t)
    expected[1] = net(noisy, condition.null(), t)[1]
    torch.testing.assert_close(net(noisy, dropped, t), expected, atol=2e-5, rtol=1e-4)
    assert condition.drop(torch.zeros(3, dtype=torch.bool)) is condition
    with pytest.raises(ValueError, match=r"bool \[3\]"):
        condition.drop(torch.tensor([True]))


def test_condition_and_time_change_the_answer() -> None:
    encoder, net, partial, noisy = pair(SMALL)
    encoder.eval(), net.eval()
    t = torch.tensor([500, 500])
    noise = net(noisy, encoder(partial), t)
    for other in (net(noisy, encoder.null(2), t), net(noisy, encoder(partial), t // 2)):
        assert (other - noise).abs().max() > 1e-4


@pytest.mark.parametrize("config", [SMALL, FAITHFUL], ids=["offsets", "faithful"])
def test_gradient_reaches_every_parameter_and_the_points(config: NetworkConfig) -> None:
    encoder, net, partial, noisy = pair(config)
    noisy = noisy.requires_grad_()
    weight = torch.randn(noisy.shape)
    loss = (net(noisy, encoder(partial), torch.tensor([10, 900])) * weight).sum()
    assert_gradient(loss, {"encoder": encoder_last(encoder), "points": noisy, **dict(net.named_parameters())})
    refine = RefineNet(config)
    assert_gradient((refine(partial) * torch.randn(2, 60, 6, 3)).sum(), refine)
    single = SinglePassNet(config)
    fine, coarse = single(partial, return_coarse=True)
    assert_gradient((fine * torch.randn(fine.shape)).sum() + coarse.square().sum(), single)


def encoder_last(encoder: PartialEncoder) -> Tensor:
    return encoder.encoder.stages[-1].blocks[-1].second[0].weight


def test_detached_condition_keeps_the_gradient_from_the_encoder() -> None:
    encoder, net, partial, noisy = pair(SMALL)
    net(noisy, encoder(partial).detach(), torch.tensor([1, 2])).square().sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_refined_points_stay_within_reach() -> None:
    net = RefineNet(dataclasses.replace(SMALL, offsets=4, reach=0.5))
    nn.init.normal_(net.head.second.weight, std=10.0)
    points = clouds(2, 50)
    refined = net(points)
    moves = refined - points[:, :, None]
    assert refined.shape == (2, 50, 4, 3)
    assert 0.4 < moves.abs().max() <= 0.5 + 1e-6


def test_single_pass_is_reproducible_and_equivariant() -> None:
    torch.manual_seed(0)
    net = SinglePassNet(SMALL).eval()
    partial = clouds(2, 40, 3, 5.0)
    first, second = (net(partial, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 400, 3)
    assert net(partial, total=123).shape == (2, 123, 3)
    order = torch.randperm(40)
    tiling, shuffled = (tile_by_distance(cloud, 400) for cloud in (partial, partial[:, order]))
    noise = torch.randn(2, 400, 3)
    rows = torch.stack(  # where each copy of the shuffled cloud stands among those of the original
        [torch.argsort(torch.argsort(order)[tiling.index[b]], stable=True) for b in range(2)]
    )
    moved = noise.gather(1, rows[..., None].expand(-1, -1, 3))
    assert torch.equal(shuffled.points, tiling.points.gather(1, rows[..., None].expand(-1, -1, 3)))
    expected = net(partial, noise=noise).gather(1, rows[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(net(partial[:, order], noise=moved), expected, atol=1e-4, rtol=1e-4)


def test_single_pass_learns_in_a_few_steps() -> None:
    """Move the scattered copies back to the scan: a task that a network with broken slicing cannot learn."""
    torch.manual_seed(0)
    net = SinglePassNet(dataclasses.replace(SMALL, channels=(16, 16, 16), factor=4, reach=0.3, spread=0.1))
    partial = torch.rand(4, 80, 3) * torch.tensor([8.0, 8.0, 0.1]) - torch.tensor([4.0, 4.0, 1.7])
    tiled = tile_by_distance(partial, 320, spread=0.1).points
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (net(partial) - tiled).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.35 * sum(losses[:5])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 100), st.floats(0, 4), st.integers(0, 99))
def test_tiling_gives_every_point_its_share(n: int, more: int, crowding: float, seed: int) -> None:
    partial = clouds(3, n, seed, 10.0)
    total = n + more
    tiling = tile_by_distance(partial, total, crowding=crowding)
    distance = partial.norm(dim=2)
    assert torch.equal(tiling.points, partial.gather(1, tiling.index[..., None].expand(-1, -1, 3)))
    for b in range(3):
        copies = torch.bincount(tiling.index[b], minlength=n)
        assert copies.sum() == total
        assert copies.min() >= 1
        share = distance[b].double().clamp_min(0.1) ** crowding
        assert ((copies - 1) - more * share / share.sum()).abs().max() < 1 + 1e-6
        torch.testing.assert_close(tiling.scale[b], (0.05 * distance[b]).clamp_min(0.1)[tiling.index[b]])


def test_tiling_needs_enough_points() -> None:
    with pytest.raises(ValueError, match="total is 3, with 4"):
        tile_by_distance(torch.ones(1, 4, 3), 3)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_at_full_width() -> None:
    full = NetworkConfig()
    teacher = parameters(NoiseNet(full)), parameters(PartialEncoder(full))
    assert teacher == (24_354_003, 8_497_952)
    assert parameters(RefineNet(full)) == 21_722_926
    assert 0.055 < parameters(SinglePassNet(NetworkConfig.single())) / sum(teacher) < 0.065


@pytest.mark.parametrize("config", [NetworkConfig.reduced(), NetworkConfig(), SMALL, NetworkConfig.single()])
def test_estimated_parameters_are_exact(config: NetworkConfig) -> None:
    for kind, build in (("noise", NoiseNet), ("encoder", PartialEncoder), ("refine", RefineNet)):
        assert memory_estimate(config, 1000, kind=kind).parameters == parameters(build(config))


@pytest.mark.parametrize("config", [SMALL, FAITHFUL, NetworkConfig.reduced()])
def test_estimated_activations_are_near_what_autograd_keeps(config: NetworkConfig) -> None:
    encoder, net, partial, noisy = pair(config, n=400)
    condition = encoder(partial).detach()
    batch = torch.arange(2).repeat_interleave(noisy.shape[1])
    voxels = voxelize(noisy.reshape(-1, 3), batch, config.voxel).coordinates
    weights = {parameter.data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = net(noisy, condition, torch.tensor([1, 2]))
    estimate = memory_estimate(config, noisy.shape[1], batch=2, voxels=level_sizes(voxels, config.stages))
    assert 0.8 < estimate.activations / sum(kept.values()) < 1.25
    assert answer.requires_grad


def test_memory_estimate_grows_and_reads_well() -> None:
    config = NetworkConfig()
    training, inference = (memory_estimate(config, 180_000, training=flag) for flag in (True, False))
    assert inference.total < training.total
    assert memory_estimate(config, 18_000).total < training.total
    assert memory_estimate(config, 180_000, batch=2).activations == pytest.approx(
        2 * training.activations, rel=0.01
    )
    assert memory_estimate(config, 180_000, value_bytes=2).activations * 2 == training.activations
    assert "24,354,003 parameters" in str(training)
    with pytest.raises(ValueError, match="needs 5"):
        memory_estimate(config, 100, voxels=[1, 2])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"channels": (8, 8)}, "channels"),
        ({"norm": "none"}, "norm"),
        ({"time_channels": 5}, "time_channels"),
        ({"voxel": 0.0}, "voxel"),
        ({"reach": float("nan")}, "reach"),
        ({"offsets": 0}, "offsets"),
        ({"crowding": -1.0}, "crowding"),
    ],
)
def test_wrong_configurations_are_named(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NetworkConfig(**change)


def test_wrong_clouds_are_named() -> None:
    encoder, net, partial, noisy = pair(SMALL)
    condition = encoder(partial)
    for bad in (torch.zeros(3, 3), torch.zeros(1, 0, 3), torch.zeros(1, 4, 2), torch.zeros(1, 4, 3).long()):
        with pytest.raises(ValueError, match=r"\[B, N, 3\]"):
            encoder(bad)
    with pytest.raises(ValueError, match="one for each cloud"):
        net(noisy[:1], condition, torch.tensor([1]))
    with pytest.raises(ValueError, match="one for each cloud"):
        net(noisy, condition, torch.tensor(1))
    noisy[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        net(noisy, condition, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="noise is"):
        SinglePassNet(SMALL)(partial, noise=torch.zeros(1, 2, 3))
