"""Vocabulary alignment and ULD: padded heads, permuted ids, and the cheapest relabelling by brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stillhouse.core.losses.vocabulary import VocabAlignment, uld_loss


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(*ids: int) -> dict[str, int]:
    """Token names follow their position: tokens(3, 1) puts token "t0" at id 3 and "t1" at id 1."""
    return {f"t{position}": i for position, i in enumerate(ids)}


def kl(student: Tensor, teacher: Tensor) -> float:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True).item()


# --- the kinds ----------------------------------------------------------------------------------------------


def test_identical_maps_with_heads_padded_differently():
    ids = tokens(*range(6))
    alignment = VocabAlignment.check(ids, dict(reversed(ids.items())))
    assert (alignment.kind, alignment.shared) == ("identical", 6)
    student, teacher = draw(2, 8), draw(2, 11, seed=1)
    s, t = alignment.align(student, teacher)
    assert torch.equal(s, student[:, :6])
    assert torch.equal(t, teacher[:, :6])
    assert s.data_ptr() == student.data_ptr()  # a view, no copy of the logits


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_prefix_truncate_when_one_side_adds_tokens_at_the_end(larger: str):
    base, more = tokens(*range(6)), tokens(*range(8))
    alignment = VocabAlignment.check(more, base) if larger == "student" else VocabAlignment.check(base, more)
    assert (alignment.kind, alignment.shared) == ("prefix-truncate", 6)
    s, t = alignment.align(draw(3, 8), draw(3, 8))
    assert s.shape == t.shape == (3, 6)


def test_equal_sizes_with_other_tokens_are_matched_token_by_token():
    student_ids, teacher_ids = tokens(0, 1, 2, 3), tokens(2, 0, 3, 1)
    alignment = VocabAlignment.check(student_ids, teacher_ids)
    assert alignment.kind == "intersect"
    student = draw(5, 4)
    teacher = torch.empty_like(student)
    for token, i in student_ids.items():
        teacher[:, teacher_ids[token]] = student[:, i]
    assert kl(student, teacher) > 0.1
    assert kl(*alignment.align(student, teacher)) == 0.0


def test_intersect_keeps_the_shared_tokens_only():
    student_ids = {"a": 0, "b": 1, "c": 2, "mine": 3}
    teacher_ids = {"yours": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    alignment = VocabAlignment.check(student_ids, teacher_ids, min_overlap=0.7)
    assert (alignment.kind, alignment.shared) == ("intersect", 3)
    assert alignment.student_ids.tolist() == [0, 1, 2]
    assert alignment.teacher_ids.tolist() == [1, 2, 3]
    assert VocabAlignment.check(student_ids, teacher_ids).kind == "cross-tokenizer"


def test_ids_with_holes_are_selected_not_sliced():
    ids = tokens(0, 2, 5)
    alignment = VocabAlignment.check(ids, ids)
    assert alignment.kind == "identical"
    assert alignment.student_size == 6
    logits = draw(2, 6)
    s, _ = alignment.align(logits, logits)
    assert torch.equal(s, logits[:, [0, 2, 5]])


def test_a_token_that_fills_a_hole_is_not_a_prefix():
    alignment = VocabAlignment.check(tokens(0, 1, 3), tokens(0, 1, 3) | {"new": 2, "newer": 4})
    assert alignment.kind == "intersect"


def test_tokenizers_are_read_through_get_vocab():
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return tokens(0, 1, 2)

    assert VocabAlignment.check(Tokenizer(), tokens(0, 1, 2)).kind == "identical"


@given(seed=st.integers(0, 10_000), size=st.integers(1, 12), pads=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_a_permuted_and_padded_copy_always_aligns_to_itself(seed: int, size: int, pads: int):
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    alignment = VocabAlignment.check(tokens(*range(size)), tokens(*order))
    student = draw(3, size, seed=seed)
    teacher = draw(3, size + pads, seed=seed + 1)
    teacher[:, order] = student
    s, t = alignment.align(student, teacher)
    assert torch.equal(s, t)


def test_zero_padding_gives_pads_real_probability_and_truncation_does_not():
    """100 tokens, teacher head padded by 10 columns it never uses; student ≡ teacher on the real tokens."""
    real = 1.5 * draw(100)
    real = real - real.logsumexp(0) + math.log(10 / math.expm1(2.2e-3))
    teacher = F.pad(real, (0, 10), value=-100.0)
    zero_padded = F.pad(real, (0, 10), value=0.0)
    assert kl(zero_padded, teacher) == pytest.approx(2.2e-3, rel=1e-9)  # log(1 + 10 / Σ e^z)
    ids = tokens(*range(100))
    assert kl(*VocabAlignment.check(ids, ids).align(real, teacher)) == 0.0


def test_align_keeps_the_graph_on_both_sides():
    alignment = VocabAlignment.check(tokens(0, 1, 2), tokens(2, 1, 0))
    student, teacher = draw(2, 3).requires_grad_(), draw(2, 5).requires_grad_()
    s, t = alignment.align(student, teacher)
    (s.sum() + t.sum()).backward()
    assert torch.equal(student.grad, torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(teacher.grad[:, 3:], torch.zeros(2, 2, dtype=torch.float64))


def test_align_keeps_bfloat16():
    ids = tokens(0, 1, 2)
    s, t = VocabAlignment.check(ids, ids).align(draw(2, 3).bfloat16(), draw(2, 4).bfloat16())
    assert s.dtype == t.dtype == torch.bfloat16


def test_errors_name_what_is_wrong():
    ids = tokens(*range(6))
    with pytest.raises(ValueError, match=r"student_logits have 5 columns .* ids up to 5\. A padded head"):
        VocabAlignment.check(ids, ids).align(draw(2, 5), draw(2, 6))
    with pytest.raises(ValueError, match="teacher_logits have 4 columns"):
        VocabAlignment.check(ids, ids).align(draw(2, 6), draw(2, 4))
    crossed = VocabAlignment.check(ids, {f"other{i}": i for i in range(6)})
    assert (crossed.kind, crossed.shared) == ("cross-tokenizer", 0)
    with pytest.raises(ValueError, match="use uld_loss"):
        crossed.align(draw(2, 6), draw(2, 6))
    with pytest.raises(TypeError, match="floating"):
        VocabAlignment.check(ids, ids).align(torch.ones(2, 6, dtype=torch.long), draw(2, 6))
    with pytest.raises(TypeError, match="get_vocab"):
        VocabAlignment.check(["a"], ids)
    with pytest.raises(TypeError, match="an integer is needed"):
        VocabAlignment.check({"a": 0.5}, ids)
    with pytest.raises(ValueError, match="share the id 0"):
        VocabAlignment.check({"a": 0, "b": 0}, ids)
    with pytest.raises(ValueError, match="negative id"):
        VocabAlignment.check(ids, {"a": -1})
    with pytest.raises(ValueError, match="empty"):
        VocabAlignment.check({}, ids)
    with pytest.raises(ValueError, match="min_overlap=0"):
        VocabAlignment.check(ids, ids, min_overlap=0)
    with pytest.raises(ValueError, match="all but the last"):
        uld_loss(draw(2, 3), draw(3, 3))
    with pytest.raises(ValueError, match="temperature"):
        uld_loss(draw(2, 3), draw(2, 3), temperature=0.0)


# --- ULD ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(6, 6), (6, 9), (9, 6)])
def test_uld_is_the_cheapest_relabelling(widths: tuple[int, int]):
    student, teacher = draw(widths[0]), draw(widths[1], seed=1)
    width = max(widths)
    q, p = (F.pad(z.softmax(-1), (0, width - len(z))) for z in (student, teacher))
    cost = (q[:, None] - p[None]).abs().numpy()
    rows, columns = linear_sum_assignment(cost)
    assert uld_loss(student, teacher).item() == pytest.approx(cost[rows, columns].sum(), rel=1e-10)


@given(seed=st.integers(0, 10_000), t=st.floats(0.2, 5))
@settings(max_examples=30, deadline=None)
def test_uld_ignores_labels_and_shift_and_is_at_most_the_l1_distance(seed: int, t: float):
    student, teacher = draw(4, 7, seed=seed), draw(4, 7, seed=seed + 1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    value = uld_loss(student, teacher, temperature=t)
    assert torch.allclose(uld_loss(student[:, order] + 3, teacher, temperature=t), value)
    assert uld_loss(student, student[:, order], temperature=t) < 1e-12
    l1 = ((student / t).softmax(-1) - (teacher / t).softmax(-1)).abs().sum(-1).mean()
    assert 0 <= value <= l1 + 1e-12


def test_uld_mask_equals_row_removal_and_hides_nan():
    student, teacher = draw(2, 3, 6), draw(2, 3, 8, seed=1)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    temperature = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    expected = torch.stack(
        [
            uld_loss(student[m], teacher[m], temperature=temperature[m].item())
            for m in ((0, 0), (0, 2), (1, 2))
        ]
    )
    student[~mask] = math.nan
    student.requires_grad_()
    value = uld_loss(student, teacher, mask=mask, temperature=temperature)
    assert torch.allclose(value, expected.mean())
    rows = uld_loss(student, teacher, mask=mask, temperature=temperature, reduction="none")
    assert torch.allclose(rows[mask], expected)
    assert (rows[~mask] == 0).all()
    halves = uld_loss(student, teacher, mask=mask, temperature=temperature, num_items=6)
    assert torch.allclose(halves, expected.mean() / 2)
    value.backward()
    assert student.grad.isfinite().all()


def test_uld_gradcheck_detached_teacher_and_minus_infinity():
    student, teacher = draw(3, 5).requires_grad_(), draw(3, 7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: uld_loss(s, teacher, temperature=1.5), (student,))
    uld_loss(student, teacher).backward()
    assert teacher.grad is None
    masked = draw(3, 5)
    masked[:, 2] = -math.inf
    masked.requires_grad_()
    value = uld_loss(masked, teacher)
    value.backward()
    assert value.isfinite()
    assert masked.grad.isfinite().all()


def test_uld_with_an_empty_mask_is_zero_and_connected():
    student = draw(2, 3).requires_grad_()
    value = uld_loss(student, draw(2, 4), mask=torch.zeros(2, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_uld_bfloat16_inputs_are_computed_in_float32():
    student, teacher = draw(4, 9).bfloat16(), draw(4, 7, seed=1).bfloat16()
    exact = uld_loss(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = uld_loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_uld_equals_pots_one_dimensional_transport():
    ot = pytest.importorskip("ot")
    student, teacher = draw(6, 9), draw(6, 9, seed=1)
    q, p = student.softmax(-1), teacher.softmax(-1)
    oracle = torch.stack([9 * ot.wasserstein_1d(a, b, p=1) for a, b in zip(q, p, strict=True)])
    assert torch.allclose(uld_loss(student, teacher, reduction="none"), oracle, rtol=1e-9)
