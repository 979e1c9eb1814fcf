"""Relational losses against dense forms, invariances, torchdistill, and where naive gradients break."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.core.losses.relations import (
    attention_relation,
    correlation_congruence,
    pairwise_distances,
    rkd_angle,
    rkd_distance,
    similarity_kl,
    similarity_preserving,
)

EMBEDDING_LOSSES = [
    rkd_distance,
    rkd_angle,
    similarity_preserving,
    correlation_congruence,
    similarity_kl,
    lambda s, t: similarity_kl(s, t, temperature=0.3, exclude_self=True),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def similar_copy(x: Tensor, *, scale: float, seed: int) -> Tensor:
    """A scaled, rotated (into two more dimensions) and shifted copy of x [B, D]."""
    width = x.shape[1] + 2
    rotation = torch.linalg.qr(draw(width, width, seed=seed)).Q[: x.shape[1]]
    return scale * x @ rotation + 5 * draw(width, seed=seed + 1)


def dense_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The textbook B³ form, written over (i, j, k) with vertex j."""

    def angles(x: Tensor) -> Tensor:
        difference = x[:, None] - x[None]  # [i, j] = e_i − e_j
        length = difference.norm(dim=-1, keepdim=True)
        units = torch.where(length > 0, difference / length.clamp_min(1e-300), 0.0)
        return torch.einsum("ijd,kjd->ijk", units, units)

    return F.smooth_l1_loss(angles(student), angles(teacher))


# --- pairwise distances -------------------------------------------------------------------------------------


def test_pairwise_distances_equal_scipy():
    distance = pytest.importorskip("scipy.spatial.distance")
    x = draw(30, 5)
    assert torch.allclose(pairwise_distances(x), torch.from_numpy(distance.squareform(distance.pdist(x))))


def test_pairwise_distances_keep_digits_that_the_gram_form_loses():
    x = 1000 + 1e-3 * draw(40, 16)
    x = x.float()
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    off = ~torch.eye(40, dtype=torch.bool)
    ours = (pairwise_distances(x).double() / exact - 1)[off].abs().max()
    gram = (torch.cdist(x, x).double() / exact - 1)[off].abs().max()
    assert ours < 1e-5
    assert gram > 0.5


def test_pairwise_distances_gradient_at_coincident_points_is_zero():
    x = torch.ones(4, 3, requires_grad=True)
    pairwise_distances(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))


# --- RKD ----------------------------------------------------------------------------------------------------


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_rkd_is_zero_for_a_similar_copy(scale: float, seed: int):
    teacher = draw(9, 4, seed=seed)
    student = similar_copy(teacher, scale=scale, seed=seed + 1)
    assert rkd_distance(student, teacher) < 1e-20
    assert rkd_angle(student, teacher) < 1e-20


def test_rkd_is_zero_where_mse_is_not():
    teacher = draw(9, 4)
    rotation = torch.linalg.qr(draw(4, 4, seed=1)).Q
    student = 0.3 * teacher @ rotation + draw(4, seed=2)
    assert rkd_distance(student, teacher) < 1e-25
    assert F.mse_loss(student, teacher) > 0.5
    assert rkd_distance(student + 0.1 * draw(9, 4, seed=3), teacher) > 1e-4


def test_rkd_distance_closed_form():
    # distances 1, 1, 2 (mean 4/3) against 3, 4, 5 (mean 4)
    student = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    pairs = [(1 / (4 / 3), 3 / 4), (2 / (4 / 3), 5 / 4), (1 / (4 / 3), 4 / 4)]
    expected = 2 * sum(0.5 * (a - b) ** 2 for a, b in pairs) / 9
    assert rkd_distance(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_angle_closed_form():
    # a collinear student against a right isosceles triangle
    student = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    huber = [abs(d) - 0.5 if abs(d) > 1 else d * d / 2 for d in (-1 - 0, 1 - half, 1 - half)]
    assert rkd_angle(student, teacher).item() == pytest.approx(2 * sum(huber) / 27, rel=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 7, 100])
def test_rkd_angle_equals_the_dense_form_for_every_chunk(chunk: int | None):
    student, teacher = draw(7, 3).requires_grad_(), draw(7, 5, seed=1)
    value = rkd_angle(student, teacher, chunk=chunk)
    reference = dense_angle(student, teacher)
    assert torch.allclose(value, reference, rtol=1e-12)
    (gradient,) = torch.autograd.grad(value, student)
    (expected,) = torch.autograd.grad(reference, student)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-15)


def test_rkd_angle_dense_form_with_coincident_points():
    student, teacher = draw(6, 3), draw(6, 4, seed=1)
    student[3] = student[1]
    teacher[4] = teacher[2]
    assert torch.allclose(rkd_angle(student, teacher), dense_angle(student, teacher), rtol=1e-12)


def test_rkd_angle_scales_its_gradient_with_the_upstream():
    student, teacher = draw(6, 3).requires_grad_(), draw(6, 4, seed=1)
    (once,) = torch.autograd.grad(rkd_angle(student, teacher), student)
    (thrice,) = torch.autograd.grad(3 * rkd_angle(student, teacher), student)
    assert torch.allclose(thrice, 3 * once)


def test_rkd_angle_never_holds_the_cube():
    """Saved for backward is one gradient of the student's size, nothing of B² or B³."""
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    student, teacher = draw(40, 3).requires_grad_(), draw(40, 3, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rkd_angle(student, teacher)
    assert max(sizes) <= 40 * 3


# --- the other batch relations ------------------------------------------------------------------------------


def test_similarity_preserving_closed_form():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    h = math.sqrt(0.5)
    expected = 2 * ((1 - h) ** 2 + h**2) / 4
    assert similarity_preserving(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_similarity_preserving_flattens_maps_and_ignores_scale_and_rotation():
    teacher = draw(5, 2, 3, 3)
    rotation = torch.linalg.qr(draw(18, 18, seed=1)).Q
    assert similarity_preserving(4 * teacher.flatten(1) @ rotation, teacher) < 1e-25


def test_correlation_congruence_approaches_the_gaussian_kernel():
    student, teacher = draw(8, 3), draw(8, 5, seed=1)

    def kernel(x: Tensor) -> Tensor:
        return (-0.4 * torch.cdist(F.normalize(x), F.normalize(x)).square()).exp()

    exact = (kernel(student) - kernel(teacher)).square().mean()
    errors = [abs(correlation_congruence(student, teacher, order=p) - exact).item() for p in (1, 2, 4, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_similarity_kl_equals_the_written_formula():
    student, teacher, t = draw(6, 3), draw(6, 5, seed=1), 0.3
    s, q = (F.normalize(x) @ F.normalize(x).T / t for x in (student, teacher))
    expected = F.kl_div(s.log_softmax(-1), q.log_softmax(-1), reduction="batchmean", log_target=True) * t**2
    assert torch.allclose(similarity_kl(student, teacher, temperature=t), expected)
    unscaled = similarity_kl(student, teacher, temperature=t, scale_t2=False)
    assert torch.allclose(unscaled * t**2, expected)
    rows = similarity_kl(student, teacher, temperature=t, reduction="none")
    assert torch.allclose(rows.mean(), expected)


def test_similarity_kl_without_self_equals_row_removal():
    student, teacher = draw(5, 3), draw(5, 4, seed=1)
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        s, q = (
            F.cosine_similarity(x[i : i + 1], x[others]).div(0.5).log_softmax(-1) for x in (student, teacher)
        )
        expected += F.kl_div(s, q, reduction="sum", log_target=True).item() * 0.25 / 5
    value = similarity_kl(student, teacher, temperature=0.5, exclude_self=True)
    assert value.item() == pytest.approx(expected, rel=1e-10)


@given(seed=st.integers(0, 10_000), items=st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_relations_are_non_negative_vanish_at_equality_and_ignore_the_order_of_the_batch(
    seed: int, items: int
):
    student, teacher = draw(items, 4, seed=seed), draw(items, 3, seed=seed + 1)
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    for loss in EMBEDDING_LOSSES:
        value = loss(student, teacher)
        assert value >= -1e-12
        assert abs(loss(teacher, teacher)) < 1e-12
        assert torch.allclose(loss(student[order], teacher[order]), value, atol=1e-12)


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_gradcheck(loss):
    student, teacher = draw(6, 4).requires_grad_(), draw(6, 3, seed=1)
    assert torch.autograd.gradcheck(loss, (student, teacher))


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_teacher_gets_no_gradient(loss):
    student, teacher = draw(6, 4).requires_grad_(), draw(6, 3, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
@pytest.mark.parametrize("case", ["pair", "all", "zeros", "huge"])
def test_gradients_stay_finite_where_points_coincide(loss, case: str):
    student, teacher = draw(6, 4, dtype=torch.float32), draw(6, 3, seed=1, dtype=torch.float32)
    if case == "pair":
        student[3] = student[1]
    elif case == "all":
        student[:] = student[0].clone()
    elif case == "zeros":
        student.zero_()
        teacher[2] = 0
    else:
        student *= 1e12
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_bfloat16_inputs_are_computed_in_float32_under_autocast_too(loss):
    student, teacher = draw(16, 8).bfloat16(), draw(16, 8, seed=1).bfloat16()
    exact = loss(student.double(), teacher.double())
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    value.backward()
    assert student.grad.dtype == torch.bfloat16
    assert student.grad.isfinite().all()


def test_batch_relations_name_what_is_wrong():
    with pytest.raises(ValueError, match="student holds 3 items and teacher 4"):
        rkd_distance(draw(3, 2), draw(4, 2))
    with pytest.raises(ValueError, match=r"must be embeddings \[B, D\]"):
        rkd_angle(draw(3, 2, 2), draw(3, 2))
    with pytest.raises(ValueError, match="at least 2 items"):
        rkd_distance(draw(1, 2), draw(1, 2))
    with pytest.raises(ValueError, match="chunk=0"):
        rkd_angle(draw(3, 2), draw(3, 2), chunk=0)
    with pytest.raises(TypeError, match="floating"):
        similarity_preserving(torch.ones(3, 2, dtype=torch.long), draw(3, 2))
    with pytest.raises(ValueError, match="gamma"):
        correlation_congruence(draw(3, 2), draw(3, 2), gamma=0)
    with pytest.raises(ValueError, match="order"):
        correlation_congruence(draw(3, 2), draw(3, 2), order=0)
    with pytest.raises(ValueError, match="temperature"):
        similarity_kl(draw(3, 2), draw(3, 2), temperature=0.0)
    with pytest.raises(ValueError, match="exclude_self"):
        similarity_kl(draw(1, 2), draw(1, 2), exclude_self=True)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        similarity_kl(draw(3), draw(3))
    with pytest.raises(ValueError, match="x must be"):
        pairwise_distances(draw(3))


# --- attention relations ------------------------------------------------------------------------------------


def relation_by_loops(student, teacher, heads: int, mask: Tensor) -> float:
    """One softmax at a time, over the real tokens only."""
    total, count = 0.0, int(mask.sum())
    for x_s, x_t in zip(student, teacher, strict=True):
        for b in range(mask.shape[0]):
            real = mask[b].nonzero().flatten()
            for a in range(heads):
                logs = []
                for x in (x_s, x_t):
                    d = x.shape[-1] // heads
                    piece = x[b, real, a * d : (a + 1) * d]
                    logs.append((piece @ piece.T / math.sqrt(d)).log_softmax(-1))
                total += F.kl_div(logs[0], logs[1], reduction="sum", log_target=True).item() / heads
    return total / count


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_relation_equals_loops_over_real_tokens(heads: int):
    student, teacher = draw(3, 2, 5, 8).unbind(), draw(3, 2, 5, 12, seed=1).unbind()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    value = attention_relation(student, teacher, relation_heads=heads, mask=mask)
    assert value.item() == pytest.approx(relation_by_loops(student, teacher, heads, mask), rel=1e-10)
    unmasked = attention_relation(student, teacher, relation_heads=heads)
    everything = torch.ones_like(mask)
    assert unmasked.item() == pytest.approx(relation_by_loops(student, teacher, heads, everything), rel=1e-10)


def test_attention_relation_ignores_what_padding_holds():
    student, teacher = draw(2, 2, 4, 6), draw(2, 2, 4, 6, seed=1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    clean = attention_relation(student.unbind(), teacher.unbind(), relation_heads=2, mask=mask)
    student[:, ~mask] = math.nan
    teacher[:, ~mask] = math.inf
    student.requires_grad_()
    dirty = attention_relation(student.unbind(), teacher.unbind(), relation_heads=2, mask=mask)
    assert dirty.item() == clean.item()
    dirty.backward()
    assert student.grad.isfinite().all()
    assert (student.grad[:, ~mask] == 0).all()


def test_attention_relation_reductions_agree():
    student, teacher = draw(3, 2, 5, 8).unbind(), draw(3, 2, 5, 8, seed=1).unbind()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()

    def loss(**options) -> Tensor:
        return attention_relation(student, teacher, relation_heads=2, mask=mask, **options)

    rows = loss(reduction="none")
    assert rows.shape == (2, 5)
    assert (rows[~mask] == 0).all()
    assert torch.allclose(loss(), rows.sum() / 8)
    assert torch.allclose(loss(reduction="sum"), rows.sum())
    assert torch.allclose(loss(reduction="batch_mean"), rows.sum() / 2)
    assert torch.allclose(loss(num_items=16), rows.sum() / 16)


def test_attention_relation_with_an_empty_mask_is_zero_and_connected():
    student = draw(1, 2, 3, 4).requires_grad_()
    mask = torch.zeros(2, 3, dtype=torch.bool)
    value = attention_relation(student.unbind(), draw(1, 2, 3, 4).unbind(), relation_heads=2, mask=mask)
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_attention_relation_gradcheck_and_detached_teacher():
    student, teacher = draw(2, 2, 4, 6).requires_grad_(), draw(2, 2, 4, 4, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()

    def loss(x: Tensor) -> Tensor:
        return attention_relation(x.unbind(), teacher.unbind(), relation_heads=2, mask=mask)

    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None


def test_attention_relation_bfloat16():
    student, teacher = draw(3, 2, 5, 8).bfloat16(), draw(3, 2, 5, 8, seed=1).bfloat16()
    exact = attention_relation(student.double().unbind(), teacher.double().unbind(), relation_heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = attention_relation(student.unbind(), teacher.unbind(), relation_heads=2)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


def test_attention_relation_names_what_is_wrong():
    x = draw(2, 3, 8)
    with pytest.raises(ValueError, match="does not divide the student's width 8"):
        attention_relation((x,), (x,), relation_heads=3)
    with pytest.raises(ValueError, match="give as many"):
        attention_relation((x, x), (x,), relation_heads=2)
    with pytest.raises(ValueError, match=r"\[B, L, H\]"):
        attention_relation((x,), (x[:, :2],), relation_heads=2)
    with pytest.raises(ValueError, match="relation_heads=0"):
        attention_relation((x,), (x,), relation_heads=0)
    with pytest.raises(TypeError, match="sequences of tensors"):
        attention_relation(x, x, relation_heads=2)
    with pytest.raises(TypeError, match="bool"):
        attention_relation((x,), (x,), relation_heads=2, mask=torch.ones(2, 3))


# --- independent library ------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1])
def test_relations_equal_torchdistill(seed: int):
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = draw(12, 6, seed=seed), draw(12, 9, seed=seed + 100)
    tensors = ({"s": {"output": student}}, {"t": {"output": teacher}})
    distance = peer.RKDLoss("s", "t", 1.0, 0, "mean")(*tensors)
    angle = peer.RKDLoss("s", "t", 0, 1.0, "mean")(*tensors)
    units = ({"s": {"output": F.normalize(student)}}, {"t": {"output": F.normalize(teacher)}})
    congruence = peer.CCKDLoss("s", "t", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "sum")(*units)
    assert torch.allclose(rkd_distance(student, teacher), distance, rtol=1e-6)
    assert torch.allclose(rkd_angle(student, teacher), angle, rtol=1e-9)
    assert torch.allclose(correlation_congruence(student, teacher), (congruence / 12) ** 2, rtol=1e-9)
