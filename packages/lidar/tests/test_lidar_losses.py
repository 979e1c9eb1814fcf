"""T1–T4 of the distillation's objectives, and the closed forms of the others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.testing import assert_gradcheck, assert_gradient
from stillhouse.lidar.losses import (
    diffusion_dpo_loss,
    distillation_dpo_loss,
    fisher_weight,
    keypoints,
    noise_loss,
    point_loss,
    scene_loss,
    vsd_loss,
)
from stillhouse.lidar.process import LocalProcess

PROCESS = LocalProcess()


def points(seed: int, batch: int = 2, count: int = 5) -> Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Generator(nn.Module):
    """x = z·A + b, a stand-in for the student."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z)


# -- T1, T2, T3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loser_weight", [0.0, 0.25, 1.0])
def test_t1_the_gradient_is_the_finite_difference_with_frozen_scores(loser_weight: float) -> None:
    torch.manual_seed(0)
    student, z, g_w, g_l = Generator(), points(0), points(1), points(2)

    @torch.no_grad()
    def value(weight: Tensor) -> Tensor:
        x_w, x_l = z @ weight.T + student.linear.bias, 1.1 * z @ weight.T + student.linear.bias
        return (g_w * x_w).mean() - loser_weight * (g_l * x_l).mean()

    loss = distillation_dpo_loss(student(z), student(1.1 * z), g_w, g_l, loser_weight=loser_weight)
    assert_gradient(loss, student, minimum=1e-3)
    (gradient,) = torch.autograd.grad(loss, student.linear.weight)
    weight, h = student.linear.weight.detach(), 1e-6
    for i in range(3):
        for j in range(3):
            step = torch.zeros_like(weight)
            step[i, j] = h
            slope = (value(weight + step) - value(weight - step)) / (2 * h)
            assert float(gradient[i, j]) == pytest.approx(float(slope), abs=1e-8)


def test_t1_the_released_expression_has_exactly_no_gradient() -> None:
    """It multiplies the scores by noised − generated, in which the generator cancels."""
    torch.manual_seed(0)
    student, z, g_w, g_l, offset = Generator(), points(0), points(1), points(2), points(3)
    x_w, x_l = student(z), student(1.1 * z)
    loss = distillation_dpo_loss(
        x_w,
        x_l,
        g_w,
        g_l,
        loser_weight=1.0,
        anchor=0.0,
        compat="reference",
        noised_w=x_w + offset,
        noised_l=x_l + offset,
    )
    assert loss.requires_grad  # it looks alive
    assert float(loss.detach().abs()) > 1e-3
    for gradient in torch.autograd.grad(loss, list(student.parameters()), retain_graph=True):
        assert float(gradient.abs().max()) == 0.0
    with pytest.raises(AssertionError, match="not above"):  # and the audit finds it
        assert_gradient(loss, student)
    with pytest.raises(ValueError, match="noised_w"):
        distillation_dpo_loss(x_w, x_l, g_w, g_l, compat="reference")


@pytest.mark.parametrize("pair_weight", ["none", "sigmoid"])
def test_t2_nothing_moves_where_the_auxiliary_nets_equal_the_teacher(pair_weight: str) -> None:
    torch.manual_seed(0)
    student, z = Generator(), points(0)
    teacher = nn.Linear(3, 3).double()
    x_w, x_l = student(z), student(1.1 * z)
    with torch.no_grad():
        g_w, g_l = (teacher(x + 0.3) - teacher(x + 0.3) for x in (x_w, x_l))
    weights = {"anchor": 1.0, "pair_weight": pair_weight}
    loss = distillation_dpo_loss(x_w, x_l, g_w, g_l, **weights)  # type: ignore[arg-type]
    for gradient in torch.autograd.grad(loss, list(student.parameters())):
        assert float(gradient.abs().max()) == 0.0


def test_t3_a_preference_by_coin_has_no_expected_gradient() -> None:
    """λ = 1, independent pairs, random labels, one auxiliary net for both."""
    torch.manual_seed(0)
    draws, student = 4000, Generator()
    teacher, auxiliary = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    found = []
    for _ in range(draws):
        a, b = student(torch.randn(1, 4, 3).double()), student(torch.randn(1, 4, 3).double())
        x_w, x_l = (a, b) if bool(torch.rand(()) < 0.5) else (b, a)
        with torch.no_grad():
            offset = torch.randn(1, 4, 3).double()
            g_w, g_l = (teacher(x + offset) - auxiliary(x + offset) for x in (x_w, x_l))
        loss = distillation_dpo_loss(x_w, x_l, g_w, g_l, loser_weight=1.0, anchor=0.0)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))]))
    gradients = torch.stack(found)
    error = gradients.std(0) / math.sqrt(draws)
    assert float((gradients.mean(0).abs() / error).max()) < 3.5
    assert float(gradients.std(0).min()) > 1e-3


# -- T4 ------------------------------------------------------------------------------------------------------


def gaussian_world(
    loser_weight: float,
    *,
    anchor: float = 0.0,
    pair_weight: str = "none",
    independent: bool = False,
    lr: float = 0.02,
    steps: int = 4000,
) -> tuple[float, float]:
    """Train x = a + b·z towards N(0, 0.1²) from a = b = 0.3 with ideal Gaussian auxiliary nets.

    The pair's winner is the sample next to 0; each auxiliary net is the Gaussian fit of its side of the
    batch. Returns (a, b).
    """
    generator = torch.Generator().manual_seed(0)
    theta = torch.tensor([0.3, 0.3], dtype=torch.float64, requires_grad=True)
    sigmas, variance, batch = PROCESS.sigma(torch.arange(1000.0)), 0.1**2, 256
    for _ in range(steps):
        z = torch.randn(batch, generator=generator, dtype=torch.float64)
        other = torch.randn(batch, generator=generator, dtype=torch.float64) if independent else 1.1 * z
        first, second = theta[0] + theta[1] * z, theta[0] + theta[1] * other
        wins = first.detach().abs() <= second.detach().abs()
        x_w, x_l = torch.where(wins, first, second), torch.where(wins, second, first)
        sigma = sigmas[torch.randint(1000, (batch,), generator=generator)]
        eps = torch.randn(batch, generator=generator, dtype=torch.float64)
        g = []
        for x in (x_w.detach(), x_l.detach()):
            y = x + sigma * eps
            teacher = sigma * y / (sigma**2 + variance)
            g.append(teacher - sigma * (y - x.mean()) / (sigma**2 + x.var(correction=0)))
        clouds = [v[None, :, None] for v in (x_w, x_l, *g)]
        loss = distillation_dpo_loss(
            *clouds,
            loser_weight=loser_weight,
            anchor=anchor,
            pair_weight=pair_weight,  # type: ignore[arg-type]
        )
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - lr * gradient).detach().requires_grad_()
        if float(theta[1].detach().abs()) > 100:
            break
    return float(theta[0].detach()), float(theta[1].detach())


def test_t4_vsd_finds_the_target() -> None:
    a, b = gaussian_world(0.0)
    assert a == pytest.approx(0.0, abs=3e-3)
    assert b == pytest.approx(0.100, abs=2e-3)


def test_t4_a_small_loser_weight_is_a_little_too_wide() -> None:
    a, b = gaussian_world(0.25)
    assert a == pytest.approx(0.0, abs=3e-3)
    assert b == pytest.approx(0.104, abs=2e-3)


def test_t4_a_loser_weight_of_a_half_is_sixteen_per_cent_too_wide() -> None:
    a, b = gaussian_world(0.5)
    assert a == pytest.approx(0.0, abs=3e-3)
    assert b == pytest.approx(0.116, abs=3e-3)


def test_t4_equal_weights_diverge_without_correcting_the_bias() -> None:
    a, b = gaussian_world(1.0, lr=0.005)
    assert b > 5
    assert abs(a) > 0.25


def test_t4_nine_tenths_diverge() -> None:
    assert gaussian_world(0.9)[1] > 5


def test_t4_independent_noise_is_wider_than_shared_noise() -> None:
    assert gaussian_world(0.5, independent=True, steps=1000)[1] > 0.15
    assert gaussian_world(1.0, independent=True, steps=1000)[1] > 5


def test_t4_the_sigmoid_bounds_the_spread_and_the_anchor_puts_it_right() -> None:
    a, b = gaussian_world(1.0, pair_weight="sigmoid")
    assert 0.5 < b < 4
    assert abs(a) > 0.2
    a, b = gaussian_world(1.0, pair_weight="sigmoid", anchor=1.0)
    assert a == pytest.approx(0.0, abs=3e-3)
    assert 0.103 < b < 0.108


# -- the others ----------------------------------------------------------------------------------------------


def test_vsd_is_the_winner_s_term() -> None:
    x, g = points(0), points(1)
    both = distillation_dpo_loss(x, x, g, 3 * g, loser_weight=0.0)
    assert torch.allclose(vsd_loss(x, g), both)
    weighted = vsd_loss(x, g, omega=torch.tensor([2.0, 0.0]))
    assert torch.allclose(weighted, 2 * (g[0] * x[0]).sum() / x.numel())


def test_the_pair_weight_fades_as_the_loser_gets_worse() -> None:
    g = torch.ones(1, 4, 3)
    weights = [float(fisher_weight(g, scale * g)) for scale in (0.5, 1.0, 2.0, 10.0)]
    assert weights[1] == 0.5
    assert weights == sorted(weights, reverse=True)
    assert weights[3] < 1e-6


def test_noise_loss_is_its_formula_and_vanishes_where_it_should() -> None:
    eps, predicted = points(0), points(1)
    parts = noise_loss(predicted, eps, moment=5.0)
    moments = predicted.mean() ** 2 + (predicted.std() - 1) ** 2
    expected = ((predicted - eps) ** 2).mean() + 5 * moments
    assert torch.allclose(parts.total, expected)
    assert torch.allclose(parts.moments, moments)
    white = (eps - eps.mean()) / eps.std()
    assert float(noise_loss(white, white).total) == pytest.approx(0.0, abs=1e-12)
    assert_gradcheck(lambda p: noise_loss(p, eps).total, predicted)


def test_diffusion_dpo_starts_at_log_two_and_prefers_the_winner() -> None:
    e = torch.tensor([0.5, 0.7], dtype=torch.float64)
    assert float(diffusion_dpo_loss(e, e, e, e)) == pytest.approx(math.log(2))
    w, lo = e.clone().requires_grad_(), e.clone().requires_grad_()
    loss = diffusion_dpo_loss(w, lo, e, e, beta=3.0)
    down, up = torch.autograd.grad(loss, (w, lo))
    assert torch.allclose(down, torch.full_like(down, 3 * 0.5 / 2))  # β·σ(0)/B
    assert torch.allclose(up, -down)
    gap = (0.2 - 0.5) - (0.9 - 0.4)
    given = diffusion_dpo_loss(*(torch.tensor([v]) for v in (0.2, 0.9, 0.5, 0.4)), beta=2.0)
    assert float(given) == pytest.approx(-math.log(1 / (1 + math.exp(2.0 * gap))), rel=1e-5)
    with pytest.raises(ValueError, match="beta"):
        diffusion_dpo_loss(e, e, e, e, beta=0.0)


def test_structural_terms_vanish_on_the_ground_truth_in_any_order_only_when_matched() -> None:
    full = points(0, count=64)
    shuffled = full[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert float(scene_loss(shuffled, full)) == 0.0
    assert float(scene_loss(shuffled, full, match="index")) > 0.1
    found = keypoints(full[0], share=1.0, neighbours=8)
    assert len(found) == 21
    assert float(point_loss(shuffled[0], full[0], found)) == pytest.approx(0.0, abs=1e-12)
    assert float(point_loss(shuffled[0], full[0], found, match="index")) > 0.01
    x = shuffled[0].clone().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(point_loss(x + 0.01, full[0], found), x)[0]).all()


def test_keypoints_are_where_the_surface_bends() -> None:
    """Two planes that meet at a right angle: the edge bends, the planes do not."""
    u, v = torch.meshgrid(torch.linspace(0, 1, 20), torch.linspace(0, 1, 20), indexing="ij")
    floor = torch.stack([u, v, torch.zeros_like(u)], -1).reshape(-1, 3)
    wall = torch.stack([torch.zeros_like(u), v, u], -1).reshape(-1, 3)
    cloud = torch.cat([floor, wall])
    found = cloud[keypoints(cloud, share=1.0, neighbours=9, keep=0.05)]
    assert float((found[:, 0] + found[:, 2]).max()) < 0.06


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loser_weight": -1.0}, "loser_weight"),
        ({"anchor": float("nan")}, "anchor"),
        ({"pair_weight": "softmax"}, "pair_weight"),
        ({"compat": "paper"}, "compat"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], message: str) -> None:
    x = points(0)
    with pytest.raises(ValueError, match=message):
        distillation_dpo_loss(x, x, x, x, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shapes"):
        distillation_dpo_loss(x, x[:1], x, x)
