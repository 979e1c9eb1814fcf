"""The local process, tiling, nearest neighbours, and T5: the samplers with an ideal network."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.core.diffusion import DiscreteVP
from stillhouse.core.testing import assert_gradcheck
from stillhouse.lidar.nearest import chamfer_distances, chamfer_loss, nearest
from stillhouse.lidar.process import LocalProcess, VPProcess, tile


def test_sigma_has_the_values_of_the_reference_schedule() -> None:
    process = LocalProcess()
    expected = {0: 0.0059, 100: 0.195, 250: 0.451, 500: 0.768, 750: 0.929, 999: 0.985}
    for t, sigma in expected.items():
        assert float(process.sigma(t)) == pytest.approx(sigma, abs=6e-4)
    vp = VPProcess().schedule
    assert isinstance(vp, DiscreteVP)
    assert float(vp.alpha_bar(999)) == pytest.approx(0.02943, abs=1e-5)
    assert 1 / math.sqrt(float(vp.alpha_bar(999))) == pytest.approx(5.83, abs=5e-3)


def test_points_are_not_shrunk_and_the_noise_can_be_taken_back() -> None:
    points, eps = (
        torch.full((2, 5, 3), 30.0),
        torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)),
    )
    t = torch.tensor([0, 999])
    for process in (LocalProcess(), VPProcess()):
        x_t = process.add_noise(points, eps, t)
        assert torch.allclose(process.clean(x_t, eps, t), points, atol=2e-4)
    local = LocalProcess().add_noise(points, eps, t)
    assert torch.allclose(local[1], points[1] + 0.98517 * eps[1], atol=1e-4)
    assert torch.equal(local[0].round(), points[0])


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [999]), (2, [999, 500]), (8, [999, 874, 749, 624, 500, 375, 250, 125])]
)
def test_the_visited_times_are_those_of_the_reference(steps: int, expected: list[int]) -> None:
    assert LocalProcess().times(steps) == expected


def test_impossible_times_are_refused() -> None:
    for steps in (0, 1000, 2.0):
        with pytest.raises(ValueError, match="steps"):
            LocalProcess().times(steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start"):
        LocalProcess().times(1, start=1000)
    with pytest.raises(ValueError, match="beta_start"):
        LocalProcess(0.1, 0.01)


def test_tiling_repeats_the_scan_in_order() -> None:
    partial = torch.arange(12.0).reshape(2, 2, 3)
    tiled = tile(partial, 5)
    assert torch.equal(tiled[:, :2], partial)
    assert torch.equal(tiled[:, 2:4], partial)
    assert torch.equal(tiled[:, 4], partial[:, 0])
    with pytest.raises(ValueError, match="count"):
        tile(partial, 1)
    with pytest.raises(ValueError, match="partial"):
        tile(partial[:, :0], 4)


def test_neighbours_and_chamfer_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 3, generator=generator), torch.randn(60, 3, generator=generator)
    distances = torch.cdist(a.double(), b.double())
    assert torch.equal(nearest(a, b), distances.argmin(1))
    expected = 0.5 * (distances.min(1).values.mean() + distances.min(0).values.mean())
    assert float(chamfer_loss(a, b)) == pytest.approx(float(expected), rel=1e-5)
    assert float(chamfer_distances(a[None], b[None])[0]) == pytest.approx(float(expected), rel=1e-5)
    squares = distances.square()
    expected = 0.5 * (squares.min(1).values.mean() + squares.min(0).values.mean())
    assert float(chamfer_loss(a, b, squared=True)) == pytest.approx(float(expected), rel=1e-5)
    one_sided = chamfer_loss(a, b, backward=0.0)
    assert float(one_sided) == pytest.approx(float(distances.min(1).values.mean()), rel=1e-5)


def test_chamfer_has_the_right_gradient_and_none_at_distance_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(1, 6, 3, generator=generator), torch.randn(1, 7, 3, generator=generator)
    for squared in (False, True):
        assert_gradcheck(lambda x, s=squared: chamfer_loss(x, b.double(), squared=s), a)
    same = b.clone().requires_grad_()
    loss = chamfer_loss(same, b)
    (gradient,) = torch.autograd.grad(loss, same)
    assert float(loss.detach()) == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_bad_clouds_are_refused() -> None:
    good = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="NaN"):
        nearest(good, good / 0)
    with pytest.raises(ValueError, match="empty"):
        nearest(good, good[:0])
    with pytest.raises(ValueError, match=r"\[N, 3\]"):
        nearest(good[:, :2], good)
    with pytest.raises(ValueError, match="not"):
        chamfer_loss(good[None], good[None].repeat(2, 1, 1))
