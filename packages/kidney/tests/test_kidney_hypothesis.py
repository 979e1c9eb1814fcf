"""Hypothesis-space distillation: closed forms, the identity of the method, where gradients flow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.losses import forward_kl
from stillhouse.core.testing import assert_gradcheck, assert_gradient, assert_no_gradient
from stillhouse.kidney.hypothesis import (
    class_means,
    hypothesis_kd,
    hypothesis_logits,
    leave_one_out_logits,
    mean_posterior,
)


def _episode(seed: int, classes: int = 4, shots: int = 3, queries: int = 7, dim: int = 5):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(shots)
    support = torch.randn(len(labels), dim, generator=g, dtype=torch.float64)
    return torch.randn(queries, dim, generator=g, dtype=torch.float64), support, labels, classes


def test_posterior_of_two_points_in_closed_form() -> None:
    # Squared distances 1 and 4 to the prototypes, τ = 2: odds exp((4 − 1)/2).
    logits = hypothesis_logits(
        torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0]]), torch.tensor([0, 1]), 2, tau=2.0
    )
    p = logits.softmax(-1)[0, 0]
    assert float(p) == pytest.approx(1 / (1 + math.exp(-1.5)), abs=1e-6)


def test_kl_in_closed_form_with_the_square_of_the_temperature() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0) * 2, 0.0]])
    # At T = 2 the teacher is (3/4, 1/4), the student (1/2, 1/2).
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(hypothesis_kd(student, teacher, temperature=2.0)) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 5))
def test_zero_where_distances_differ_by_a_constant_of_each_query(seed: int, temperature: float) -> None:
    query, support, labels, classes = _episode(seed)
    teacher = hypothesis_logits(query, support, labels, classes, tau=0.7)
    constant = torch.linspace(-3, 3, len(query), dtype=torch.float64)[:, None]
    assert float(hypothesis_kd(teacher + constant, teacher, temperature=temperature)) == pytest.approx(
        0.0, abs=1e-12
    )
    scaled = hypothesis_kd(teacher * 1.5, teacher, temperature=temperature)
    assert float(scaled) > 0  # a constant of each query is free, a scale is not


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_support_does_not_matter(seed: int) -> None:
    query, support, labels, classes = _episode(seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + 1))
    one = hypothesis_logits(query, support, labels, classes, tau=0.3)
    two = hypothesis_logits(query, support[order], labels[order], classes, tau=0.3)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_rotating_a_space_does_not_change_its_posterior() -> None:
    query, support, labels, classes = _episode(3)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    turned = hypothesis_logits(query @ q + 2.0, support @ q + 2.0, labels, classes, tau=0.3)
    torch.testing.assert_close(turned, hypothesis_logits(query, support, labels, classes, tau=0.3))


def test_leave_one_out_is_the_brute_force() -> None:
    _, support, labels, classes = _episode(5)
    got = leave_one_out_logits(support, labels, classes, tau=0.4)
    for i in range(len(support)):
        kept = torch.arange(len(support)) != i
        expected = hypothesis_logits(support[i : i + 1], support[kept], labels[kept], classes, tau=0.4)
        torch.testing.assert_close(got[i : i + 1], expected)


def test_leave_one_out_keeps_the_only_image_of_a_class() -> None:
    logits = leave_one_out_logits(torch.eye(2), torch.tensor([0, 1]), 2, tau=1.0)
    torch.testing.assert_close(logits, torch.tensor([[0.0, -2.0], [-2.0, 0.0]]))


def test_mean_posterior_is_the_mean_of_probabilities_not_of_logits() -> None:
    a, b = torch.tensor([[0.0, 5.0]]), torch.tensor([[3.0, 0.0]])
    expected = (a.softmax(-1) + b.softmax(-1)) / 2
    torch.testing.assert_close(mean_posterior([a, b]).exp(), expected)
    assert not torch.allclose(expected, ((a + b) / 2).softmax(-1), atol=1e-2)


def test_the_gradient_reaches_the_student_alone() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    assert_no_gradient(hypothesis_kd(student, teacher), [teacher])
    assert_gradient(hypothesis_kd(student, teacher), [student])


def test_gradcheck() -> None:
    query, support, labels, classes = _episode(7, queries=3)
    teacher = torch.randn(3, classes, dtype=torch.float64)

    def loss(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return hypothesis_kd(hypothesis_logits(q, s, labels, classes, tau=0.5), teacher, temperature=2.0)

    assert_gradcheck(loss, query, support)
    assert_gradcheck(lambda s: leave_one_out_logits(s, labels, classes, tau=0.5).sum(), support)


def test_it_is_the_cores_forward_kl() -> None:
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    mask = torch.tensor([True, True, False, True, False, True])
    expected = forward_kl(student[mask], teacher[mask], temperature=3.0)
    torch.testing.assert_close(hypothesis_kd(student, teacher, temperature=3.0, mask=mask), expected)


@pytest.mark.parametrize(
    ("labels", "match"), [([0, 0, 2], "class 1 has no support"), ([0, 1, 3], "span"), ([0, 1], "2 entries")]
)
def test_wrong_support_is_named(labels: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        class_means(torch.zeros(3, 2), torch.tensor(labels), 3)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="tau is 0"):
        hypothesis_logits(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), 1, tau=0.0)
