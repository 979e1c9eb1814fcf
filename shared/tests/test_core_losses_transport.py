"""Sinkhorn losses against POT, geomloss, the probability-domain iteration, and the two limits of ε."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stillhouse.core.losses.transport import sinkhorn_loss, sinkhorn_plan


def draw(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def l1_cost(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    x, y = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    return (x[..., :, None, :] - y[..., None, :, :]).abs().sum(-1)


def probability_domain(cost: Tensor, eps: float, iters: int) -> Tensor:
    """The published iteration: normalise exp(−C/ε) by rows, then by columns; columns sum to 1."""
    plan = (-cost / eps).exp()
    for _ in range(iters):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    return plan


# --- values -------------------------------------------------------------------------------------------------


def test_log_domain_equals_the_probability_domain():
    student, teacher = draw(16, 10), draw(16, 10, seed=1)
    cost = l1_cost(student, teacher)
    plan = probability_domain(cost, 0.1, 20)
    assert torch.allclose(sinkhorn_plan(cost, mass="batch"), plan, rtol=1e-10)
    assert torch.allclose(sinkhorn_loss(student, teacher, mass="batch"), (plan * cost).sum(), rtol=1e-10)


def test_mass_and_reference_options_are_plain_factors():
    student, teacher = draw(16, 10), draw(16, 10, seed=1)
    mean = sinkhorn_loss(student, teacher)
    assert torch.allclose(sinkhorn_loss(student, teacher, mass="batch"), 16 * mean)
    assert torch.allclose(sinkhorn_loss(student, teacher, compat="reference"), 0.016 * mean)
    cost = l1_cost(student, teacher)
    assert sinkhorn_plan(cost).sum().item() == pytest.approx(1.0)
    assert torch.allclose(sinkhorn_plan(cost, mass="batch").sum(-2), torch.ones(16, dtype=torch.float64))


def test_finite_where_the_probability_domain_is_not():
    student = draw(8, 10, dtype=torch.float32).requires_grad_()
    teacher = draw(8, 10, seed=1, dtype=torch.float32)
    cost = l1_cost(student.detach(), teacher)
    assert probability_domain(cost, 1e-3, 20).isnan().any()
    value = sinkhorn_loss(student, teacher, eps=1e-3)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_small_eps_approaches_the_assignment_cost():
    cost = l1_cost(draw(7, 10), draw(7, 10, seed=1))
    rows, columns = linear_sum_assignment(cost.numpy())
    exact = cost.numpy()[rows, columns].mean()
    values = [
        (sinkhorn_plan(cost, eps=eps, iters=4000) * cost).sum().item() for eps in (0.3, 0.1, 0.03, 0.003)
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(exact, abs=1e-4)


def test_large_eps_approaches_the_product_plan():
    cost = l1_cost(draw(6, 10), draw(6, 10, seed=1))
    assert torch.allclose(sinkhorn_plan(cost, eps=1e6), torch.full_like(cost, 1 / 36), rtol=1e-5)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    plan = sinkhorn_plan(cost[:4], eps=1e6, row_weights=weights)
    assert torch.allclose(plan, weights[:, None].expand(4, 6) / 6, rtol=1e-5)


def test_batch_of_one_is_the_l1_distance():
    student, teacher = draw(1, 10), draw(1, 10, seed=1)
    assert torch.allclose(sinkhorn_loss(student, teacher), l1_cost(student, teacher).squeeze())


def test_equality_is_zero_only_when_debiased():
    teacher = draw(16, 10, scale=1.0)
    assert sinkhorn_loss(teacher, teacher) > 0.05
    assert sinkhorn_loss(teacher, teacher, debias=True).item() == 0.0
    shuffled = teacher[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(sinkhorn_loss(shuffled, teacher), sinkhorn_loss(teacher, teacher))
    assert abs(sinkhorn_loss(shuffled, teacher, debias=True, iters=500)) < 1e-10


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 8), debias=st.booleans())
@settings(max_examples=25, deadline=None)
def test_permuting_either_batch_changes_nothing(seed: int, rows: int, debias: bool):
    student, teacher = draw(rows, 6, seed=seed), draw(rows, 6, seed=seed + 1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    value = sinkhorn_loss(student, teacher, debias=debias)
    assert torch.allclose(sinkhorn_loss(student[order], teacher, debias=debias), value, atol=1e-12)
    assert torch.allclose(sinkhorn_loss(student, teacher[order], debias=debias), value, atol=1e-12)
    assert torch.allclose(sinkhorn_loss(student + 5, teacher - 3, debias=debias), value, atol=1e-10)


@given(seed=st.integers(0, 10_000), rows=st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_ranges(seed: int, rows: int):
    student, teacher = draw(rows, 6, seed=seed), draw(rows, 6, seed=seed + 1)
    value = sinkhorn_loss(student, teacher)
    assert 0 <= value <= 2
    assert sinkhorn_loss(student, teacher, debias=True, iters=300) > -1e-9


# --- batches and masks --------------------------------------------------------------------------------------


def test_leading_dimensions_are_independent_problems():
    student, teacher = draw(2, 3, 5, 6), draw(2, 3, 5, 6, seed=1)
    rows = sinkhorn_loss(student, teacher, reduction="none")
    assert rows.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(rows[i, j], sinkhorn_loss(student[i, j], teacher[i, j]))
    assert torch.allclose(sinkhorn_loss(student, teacher), rows.mean())
    assert torch.allclose(sinkhorn_loss(student, teacher, reduction="sum"), rows.sum())


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("mass", ["mean", "batch"])
def test_mask_equals_row_removal_and_hides_nan(debias: bool, mass):
    student, teacher = draw(3, 5, 6), draw(3, 5, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    expected = [
        sinkhorn_loss(student[i][mask[i]], teacher[i][mask[i]], debias=debias, mass=mass) for i in (0, 1)
    ]
    student[~mask] = math.nan
    teacher[~mask] = math.inf
    student.requires_grad_()
    rows = sinkhorn_loss(student, teacher, mask=mask, debias=debias, mass=mass, reduction="none")
    assert torch.allclose(rows, torch.stack([*expected, torch.zeros((), dtype=torch.float64)]), atol=1e-12)
    value = sinkhorn_loss(student, teacher, mask=mask, debias=debias, mass=mass)
    assert torch.allclose(value, (expected[0] + expected[1]) / 2)
    value.backward()
    assert student.grad.isfinite().all()
    assert (student.grad[~mask] == 0).all()


def test_zero_weights_take_rows_out_of_the_plan():
    cost = l1_cost(draw(5, 6), draw(4, 6, seed=1))
    weights = torch.tensor([0.25, 0, 0.25, 0.5, 0], dtype=torch.float64)
    plan = sinkhorn_plan(cost, row_weights=weights, iters=500)
    assert (plan[[1, 4]] == 0).all()
    assert torch.allclose(plan.sum(1), weights)
    assert torch.allclose(plan.sum(0), torch.full((4,), 0.25, dtype=torch.float64))
    kept = sinkhorn_plan(cost[[0, 2, 3]], row_weights=weights[[0, 2, 3]], iters=500)
    assert torch.allclose(plan[[0, 2, 3]], kept)


# --- gradients and precision --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"debias": True}, {"mass": "batch", "eps": 0.5}, {"temperature": 0.7}]
)
def test_gradcheck(options):
    student, teacher = draw(4, 5, scale=1.0).requires_grad_(), draw(4, 5, seed=1, scale=1.0)
    assert torch.autograd.gradcheck(lambda s: sinkhorn_loss(s, teacher, iters=8, **options), (student,))


def test_plan_gradcheck():
    cost = l1_cost(draw(3, 5), draw(4, 5, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sinkhorn_plan(c, iters=8), (cost,))


@pytest.mark.parametrize("debias", [False, True])
def test_gradients_stay_finite_at_equality_and_with_one_hot_predictions(debias: bool):
    for teacher in (draw(6, 5, dtype=torch.float32), 1e4 * torch.eye(6)):
        student = teacher.clone().requires_grad_()
        value = sinkhorn_loss(student, teacher, debias=debias)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_debiased_gradient_step_moves_the_student_closer():
    student, teacher = draw(6, 5).requires_grad_(), draw(6, 5, seed=1)
    before = sinkhorn_loss(student, teacher, debias=True, iters=100)
    (gradient,) = torch.autograd.grad(before, student)
    after = sinkhorn_loss(student - 0.1 * gradient / gradient.norm(), teacher, debias=True, iters=100)
    assert after < before


def test_teacher_gets_no_gradient():
    student, teacher = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    sinkhorn_loss(student, teacher, debias=True).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_bfloat16_inputs_are_computed_in_float32_under_autocast_too():
    student, teacher = draw(8, 10).bfloat16(), draw(8, 10, seed=1).bfloat16()
    exact = sinkhorn_loss(student.double(), teacher.double())
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sinkhorn_loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    value.backward()
    assert student.grad.dtype == torch.bfloat16


def test_errors_name_what_is_wrong():
    x = draw(4, 5)
    with pytest.raises(ValueError, match="eps=0"):
        sinkhorn_loss(x, x, eps=0)
    with pytest.raises(ValueError, match="iters=0"):
        sinkhorn_plan(x, iters=0)
    with pytest.raises(ValueError, match="mass='sum'"):
        sinkhorn_loss(x, x, mass="sum")
    with pytest.raises(ValueError, match="compat='paper'"):
        sinkhorn_loss(x, x, compat="paper")
    with pytest.raises(ValueError, match="fixes temperature=2"):
        sinkhorn_loss(x, x, compat="reference", temperature=4.0)
    with pytest.raises(ValueError, match="temperature"):
        sinkhorn_loss(x, x, temperature=-1.0)
    with pytest.raises(ValueError, match="must be"):
        sinkhorn_loss(x, x[:3])
    with pytest.raises(ValueError, match=r"\[\.\.\., N, M\]"):
        sinkhorn_plan(x[0])
    with pytest.raises(ValueError, match="row_weights has shape"):
        sinkhorn_plan(x, row_weights=torch.ones(3))
    with pytest.raises(ValueError, match="must not be negative"):
        sinkhorn_plan(x, row_weights=-torch.ones(4))


# --- independent libraries ----------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eps", [0.05, 0.1, 1.0])
def test_plan_and_cost_equal_pot(eps: float):
    ot = pytest.importorskip("ot")
    student, teacher = draw(16, 10), draw(16, 10, seed=1)
    cost = l1_cost(student, teacher)
    uniform = torch.full((16,), 1 / 16, dtype=torch.float64)
    oracle = ot.sinkhorn(
        uniform, uniform, cost, reg=eps, method="sinkhorn_log", stopThr=1e-13, numItermax=20_000
    )
    assert torch.allclose(sinkhorn_plan(cost, eps=eps, iters=5000), oracle, atol=1e-10)
    converged = (oracle * cost).sum()
    assert torch.allclose(sinkhorn_loss(student, teacher, eps=eps, iters=5000), converged, rtol=1e-9)
    if eps >= 0.1:  # the default of 20 iterations is close already
        assert torch.allclose(sinkhorn_loss(student, teacher, eps=eps), converged, rtol=5e-3)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_small_eps_equals_pots_exact_transport_with_weights():
    ot = pytest.importorskip("ot")
    cost = l1_cost(draw(5, 8), draw(7, 8, seed=1))
    a = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    b = torch.tensor([0.2, 0.1, 0.1, 0.25, 0.15, 0.1, 0.1], dtype=torch.float64)
    exact = ot.emd2(a, b, cost)
    plan = sinkhorn_plan(cost, eps=0.003, iters=4000, row_weights=a, column_weights=b)
    assert (plan * cost).sum().item() == pytest.approx(float(exact), abs=2e-4)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_debiased_loss_equals_geomloss():
    geomloss = pytest.importorskip("geomloss")
    student, teacher = draw(16, 10), draw(16, 10, seed=1)
    x, y = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    for debias in (False, True):
        oracle = geomloss.SamplesLoss(
            "sinkhorn",
            p=1,
            blur=0.1,
            scaling=0.999,
            debias=debias,
            cost=lambda p, q: torch.cdist(p, q, p=1),
            backend="tensorized",
        )(x, y)
        if debias:
            assert sinkhorn_loss(student, teacher, debias=True, iters=5000).item() == pytest.approx(
                oracle.item(), rel=1e-5
            )
        else:  # geomloss adds ε·KL(P ‖ a⊗b) to ⟨P, C⟩
            cost = l1_cost(student, teacher)
            plan = sinkhorn_plan(cost, iters=5000)
            entropic = (plan * cost).sum() + 0.1 * (plan * (plan * 256).log()).sum()
            assert entropic.item() == pytest.approx(oracle.item(), rel=1e-5)
