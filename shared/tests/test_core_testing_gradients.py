import pytest
import torch
from torch import nn

from stillhouse.core.testing import (
    assert_gradcheck,
    assert_gradient,
    assert_gradient_only,
    assert_no_gradient,
)


class WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]  # the factor 2 is missing


def networks():
    torch.manual_seed(0)
    return nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(4, 3)


def test_gradcheck_finds_a_wrong_derivative():
    x = torch.tensor([1.0, -2.0])
    assert_gradcheck(lambda x: (x * x).sum(), x, second=True)
    with pytest.raises(AssertionError, match="gradcheck"):
        assert_gradcheck(lambda x: WrongSquare.apply(x).sum(), x)
    with pytest.raises(ValueError, match="nothing to differentiate"):
        assert_gradcheck(lambda i: i, torch.tensor([1]))


def test_gradcheck_passes_other_inputs_as_they_are():
    assert_gradcheck(lambda x, i: x[i].exp().sum(), torch.randn(4), torch.tensor([0, 2]))


def test_flow_into_the_student_only():
    student, teacher, x = networks()
    loss = (student(x) - teacher(x).detach()).square().mean()
    assert_gradient_only(loss, student, teacher)
    assert all(p.grad is None for p in student.parameters())  # audits leave no trace
    leaking = (student(x) - teacher(x)).square().mean()
    with pytest.raises(AssertionError, match="weight: a gradient of size"):
        assert_no_gradient(leaking, teacher)
    with pytest.raises(AssertionError):
        assert_gradient_only(leaking, student, teacher)


def test_missing_zero_and_infinite_gradients_are_named():
    student, other, x = networks()
    with pytest.raises(AssertionError, match="weight: no gradient reaches it"):
        assert_gradient(student(x).sum(), other)
    with pytest.raises(AssertionError, match="weight: its gradient is at most 0"):
        assert_gradient((student(x) * 0).sum(), student)
    at_zero = torch.zeros(2, requires_grad=True)
    with pytest.raises(AssertionError, match="tensor: its gradient is not finite"):
        assert_gradient(at_zero.sqrt().sum(), at_zero)
    with pytest.raises(AssertionError, match="not above 100"):
        assert_gradient(student(x).sum(), student, minimum=100.0)


def test_targets_of_every_kind():
    student, teacher, x = networks()
    loss = student(x).sum()
    assert_gradient(loss, student.weight)
    assert_gradient(loss, [student.weight, student.bias])
    assert_gradient(loss, dict(student.named_parameters()))
    assert_no_gradient(loss, teacher.requires_grad_(False))
    assert_no_gradient(torch.tensor(1.0), student)
    student.bias.requires_grad_(False)
    assert_gradient(student(x).sum(), student)  # frozen parameters of a module are not asked for
    with pytest.raises(AssertionError, match="b: no gradient"):
        assert_gradient(student(x).sum(), {"b": student.bias})


def test_wrong_use():
    student, _, x = networks()
    with pytest.raises(ValueError, match="must be a scalar"):
        assert_gradient(student(x), student)
    with pytest.raises(ValueError, match="audit of nothing"):
        assert_no_gradient(student(x).sum(), [])
