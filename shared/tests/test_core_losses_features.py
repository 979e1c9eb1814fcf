"""Feature losses: closed forms, equalities between siblings, and finite gradients at zero vectors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.core.losses.features import (
    MGDGenerator,
    attention_transfer,
    cka,
    cosine,
    hint_loss,
    linear_cka,
    mgd,
    pkd,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Keep(nn.Module):
    """A generator that only applies the mask, so that MGD has a closed form."""

    def forward(self, student: Tensor, keep: Tensor) -> Tensor:
        return student * keep


def paper_attention(student: Tensor, teacher: Tensor) -> Tensor:
    return attention_transfer(student, teacher, mode="paper")


def unbiased_cka(student: Tensor, teacher: Tensor) -> Tensor:
    return cka(student, teacher, unbiased=True)


def seeded_mgd(student: Tensor, teacher: Tensor) -> Tensor:
    return mgd(student, teacher, Keep(), rng=torch.Generator().manual_seed(3))


CASES = [
    (hint_loss, (4, 3, 2, 2), (4, 3, 2, 2)),
    (cosine, (4, 2, 5), (4, 2, 5)),
    (pkd, (4, 5), (4, 5)),
    (attention_transfer, (3, 4, 4, 6), (3, 2, 2, 3)),
    (paper_attention, (3, 4, 4, 6), (3, 2, 2, 3)),
    (cka, (6, 4), (6, 3)),
    (unbiased_cka, (6, 4), (6, 3)),
    (seeded_mgd, (2, 3, 4, 4), (2, 3, 4, 4)),
]


@pytest.mark.parametrize("loss,student_shape,teacher_shape", CASES)
class TestEveryLoss:
    def test_gradcheck(self, loss, student_shape, teacher_shape):
        student, teacher = draw(*student_shape).requires_grad_(), draw(*teacher_shape, seed=1)
        assert torch.autograd.gradcheck(loss, (student, teacher))

    def test_teacher_gets_no_gradient(self, loss, student_shape, teacher_shape):
        student = draw(*student_shape).requires_grad_()
        teacher = draw(*teacher_shape, seed=1).requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0

    def test_bfloat16_inputs_are_computed_in_float32(self, loss, student_shape, teacher_shape):
        student, teacher = draw(*student_shape).bfloat16(), draw(*teacher_shape, seed=1).bfloat16()
        exact = loss(student.double(), teacher.double())
        student.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(student, teacher)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-4)
        value.backward()
        assert student.grad.dtype == torch.bfloat16

    @pytest.mark.parametrize("fill", [0.0, 0.1])
    def test_gradients_stay_finite_at_zero_and_constant_features(
        self, loss, student_shape, teacher_shape, fill
    ):
        student = torch.full(student_shape, fill, requires_grad=True)
        value = loss(student, draw(*teacher_shape, dtype=torch.float32))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() < 100


# --- hint ---------------------------------------------------------------------------------------------------


def test_hint_without_mask_is_the_mean_squared_error():
    student, teacher = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    assert torch.allclose(hint_loss(student, teacher), F.mse_loss(student, teacher))
    assert torch.allclose(
        hint_loss(student, teacher, reduction="none"), (student - teacher).square().mean((1, 2, 3))
    )


def test_hint_mask_equals_row_removal_and_hides_nan():
    student, teacher = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    expected = F.mse_loss(student[mask], teacher[mask])
    student[~mask] = math.nan
    student.requires_grad_()
    value = hint_loss(student, teacher, mask=mask)
    assert torch.allclose(value, expected)
    value.backward()
    assert student.grad.isfinite().all()
    halves = hint_loss(student, teacher, mask=mask, num_items=8)
    assert torch.allclose(halves, expected / 2)


def test_hint_with_an_empty_mask_is_zero_and_connected():
    student = draw(2, 3).requires_grad_()
    value = hint_loss(student, draw(2, 3), mask=torch.zeros(2, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


# --- directions ---------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_cosine_and_pkd_agree_with_torch_and_each_other(seed: int, scale: float):
    student, teacher = draw(5, 4, seed=seed), draw(5, 4, seed=seed + 1)
    expected = (1 - F.cosine_similarity(student, teacher)).mean()
    assert torch.allclose(cosine(scale * student, teacher), expected)
    assert torch.allclose(pkd(student, teacher), 2 * expected)
    assert pkd(student, scale * student) < 1e-20


def test_cosine_mask_and_zero_vectors():
    student = torch.tensor([[[1.0, 0.0], [math.nan, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    rows = cosine(student, teacher, mask=mask, reduction="none")
    assert torch.allclose(rows, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert cosine(student, teacher, mask=mask).item() == pytest.approx(2 / 3)


def test_cosine_keeps_digits_of_nearly_equal_directions():
    student = torch.tensor([[1.0, 1e-4]])
    teacher = torch.tensor([[1.0, 0.0]])
    exact = 1 - 1 / math.sqrt(1 + float(student[0, 1]) ** 2)
    assert cosine(student, teacher).item() == pytest.approx(exact, rel=1e-4)


# --- attention transfer -------------------------------------------------------------------------------------


def test_attention_transfer_closed_form_in_both_modes():
    student = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    teacher = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
    student[..., 0] = 5  # all energy left
    teacher[..., 1] = 2  # all energy right in item 0 …
    teacher[1] = 1  # … and even in item 1
    h = math.sqrt(0.5)
    squares = [2.0, (1 - h) ** 2 + h**2]
    assert attention_transfer(student, teacher).item() == pytest.approx(sum(squares) / 4)
    expected = sum(math.sqrt(s) for s in squares) / 2
    assert attention_transfer(student, teacher, mode="paper").item() == pytest.approx(expected)


def test_attention_transfer_ignores_scale_and_channels():
    teacher = draw(2, 4, 3, 3)
    student = 7 * teacher[:, [3, 1, 0, 2]]
    assert attention_transfer(student, teacher) < 1e-25
    assert attention_transfer(student, teacher, mode="paper") < 1e-12


@pytest.mark.parametrize("spatial", [(8,), (8, 6), (4, 4, 4)])
def test_attention_transfer_pools_the_larger_map_per_dimension(spatial: tuple[int, ...]):
    small = tuple(n // 2 for n in spatial)
    teacher = draw(2, 3, *small)
    student = teacher
    for axis in range(2, 2 + len(spatial)):
        student = student.repeat_interleave(2, axis)
    assert attention_transfer(student, teacher) < 1e-25
    assert attention_transfer(teacher, student) < 1e-25
    if len(spatial) == 2:  # each side larger in one dimension
        assert attention_transfer(draw(2, 3, 8, 3), draw(2, 3, 4, 6)).isfinite()


# --- MGD ----------------------------------------------------------------------------------------------------


def test_mgd_without_mask_is_the_sum_of_squares_over_the_batch():
    student, teacher = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    value = mgd(student, teacher, Keep(), mask_ratio=0.0)
    assert torch.allclose(value, F.mse_loss(student, teacher, reduction="sum") / 3)


@pytest.mark.parametrize("mask_dim", ["spatial", "channel"])
def test_mgd_hides_the_named_share_of_whole_places(mask_dim):
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, student: Tensor, keep: Tensor) -> Tensor:
            seen.append(keep)
            return student * keep

    feature = torch.ones(8, 64, 20, 20)
    mgd(feature, feature, Spy(), mask_ratio=0.15, mask_dim=mask_dim, rng=torch.Generator().manual_seed(0))
    (keep,) = seen
    assert keep.shape == ((8, 1, 20, 20) if mask_dim == "spatial" else (8, 64, 1, 1))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    sigma = math.sqrt(0.15 * 0.85 / keep.numel())
    assert abs((1 - keep.mean().item()) - 0.15) < 4 * sigma


def test_mgd_is_repeatable_by_its_generator_alone():
    torch.manual_seed(0)
    student, teacher, generator = draw(2, 4, 6, 6), draw(2, 8, 6, 6), MGDGenerator(4, 8).double()

    def value(seed: int) -> float:
        torch.rand(1)  # the global generator moves on and must not matter
        return mgd(student, teacher, generator, rng=torch.Generator().manual_seed(seed)).item()

    assert value(0) == value(0)
    assert value(0) != value(1)


def test_mgd_trains_its_generator_and_the_student():
    torch.manual_seed(0)
    generator = MGDGenerator(4, 8)
    student = draw(2, 4, 6, 6, dtype=torch.float32).requires_grad_()
    mgd(student, draw(2, 8, 6, 6, dtype=torch.float32), generator).backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())
    assert isinstance(MGDGenerator(4, 4).align, nn.Identity)


# --- CKA ----------------------------------------------------------------------------------------------------


def test_linear_cka_equals_the_feature_space_form():
    x, y = draw(9, 4), draw(9, 6, seed=1)
    x0, y0 = x - x.mean(0), y - y.mean(0)
    expected = (y0.T @ x0).norm() ** 2 / ((x0.T @ x0).norm() * (y0.T @ y0).norm())
    assert torch.allclose(linear_cka(x, y), expected)
    assert torch.allclose(cka(x, y), 1 - expected)


def test_unbiased_cka_equals_songs_formula():
    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        n = len(k)
        k, l = (m - m.diag().diag() for m in (k, l))  # noqa: E741
        value = (k @ l).trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()
        return value / (n * (n - 3))

    x, y = draw(9, 4), draw(9, 6, seed=1)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()
    assert torch.allclose(linear_cka(x, y, unbiased=True), expected)


def test_unbiased_cka_of_independent_features_is_near_zero_where_the_plain_one_is_not():
    plain, unbiased = [], []
    for seed in range(20):
        x, y = draw(16, 64, seed=2 * seed), draw(16, 64, seed=2 * seed + 1)
        plain.append(linear_cka(x, y).item())
        unbiased.append(linear_cka(x, y, unbiased=True).item())
    assert sum(plain) / 20 > 0.7
    assert abs(sum(unbiased) / 20) < 0.1


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_cka_ignores_scale_rotation_and_shift(seed: int, scale: float):
    teacher = draw(8, 4, seed=seed)
    rotation = torch.linalg.qr(draw(4, 4, seed=seed + 1)).Q
    student = scale * teacher @ rotation + draw(4, seed=seed + 2)
    assert abs(cka(student, teacher)) < 1e-10
    assert abs(cka(student, teacher, unbiased=True)) < 1e-10
    other = draw(8, 3, seed=seed + 3)
    assert 0 <= cka(other, teacher) <= 1
    assert -1 <= linear_cka(other, teacher, unbiased=True) <= 1


# --- errors -------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="projection"):
        hint_loss(draw(2, 3), draw(2, 4))
    with pytest.raises(ValueError, match="mask has shape"):
        hint_loss(draw(2, 3), draw(2, 3), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        hint_loss(draw(2, 3), draw(2, 3), mask=[True, False])
    with pytest.raises(TypeError, match="floating"):
        cosine(torch.ones(2, 3, dtype=torch.long), draw(2, 3))
    with pytest.raises(ValueError, match="mode='best'"):
        attention_transfer(draw(2, 3, 4), draw(2, 3, 4), mode="best")
    with pytest.raises(ValueError, match="spatial"):
        attention_transfer(draw(2, 3), draw(2, 3))
    with pytest.raises(ValueError, match="batch"):
        attention_transfer(draw(2, 3, 4), draw(3, 3, 4))
    with pytest.raises(ValueError, match="resize"):
        mgd(draw(2, 3, 4, 4), draw(2, 3, 8, 8), Keep())
    with pytest.raises(ValueError, match="hidden"):
        mgd(draw(2, 3, 4, 4), draw(2, 3, 4, 4), Keep(), mask_ratio=1.0)
    with pytest.raises(ValueError, match="mask_dim='time'"):
        mgd(draw(2, 3, 4, 4), draw(2, 3, 4, 4), Keep(), mask_dim="time")
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        mgd(draw(2, 3), draw(2, 3), Keep())
    with pytest.raises(ValueError, match="generator returned"):
        mgd(draw(2, 3, 4, 4), draw(2, 5, 4, 4), Keep())
    with pytest.raises(ValueError, match="student_channels=0"):
        MGDGenerator(0, 3)
    with pytest.raises(ValueError, match="at least 4 items"):
        cka(draw(3, 2), draw(3, 2), unbiased=True)
    with pytest.raises(ValueError, match="flatten"):
        cka(draw(3, 2, 2), draw(3, 2))


# --- independent library ------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_attention_transfer_equals_torchdistill(mode):
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = draw(5, 3, 4, 4), draw(5, 7, 4, 4, seed=1)
    place = {"io": "output", "path": "x"}
    oracle = peer.ATLoss({"pair": {"student": place, "teacher": place}}, mode=mode)
    expected = oracle({"x": {"output": student}}, {"x": {"output": teacher}})
    assert torch.allclose(attention_transfer(student, teacher, mode=mode), expected, rtol=1e-9)
