"""Gradient audits: is the derivative right, does it flow where it should, and nowhere else.

The audits read gradients with `torch.autograd.grad` and touch no `.grad`; they raise AssertionError, since
they are meant for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

Target = Tensor | nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


def assert_gradcheck(
    fn: Callable[..., Tensor],
    *inputs: Tensor,
    second: bool = False,
    eps: float = 1e-6,
    atol: float = 1e-6,
    rtol: float = 1e-4,
) -> None:
    """Compare the gradient of `fn` with central differences, in float64.

    Args:
        fn: takes `inputs`, returns a floating tensor.
        inputs: floating ones are cast to float64 and differentiated; others are passed as they are.
        second: check the second derivative as well.
        eps: step of the differences.
        atol: absolute tolerance.
        rtol: relative tolerance.

    Raises:
        AssertionError: a derivative differs, with the two Jacobians in the message.
        ValueError: no floating input.

    Example:
        >>> import torch
        >>> assert_gradcheck(lambda x: x.square().sum(), torch.tensor([1.0, -2.0]), second=True)
    """
    prepared = tuple(
        x.detach().to(torch.float64).clone().requires_grad_() if x.is_floating_point() else x for x in inputs
    )
    if not any(x.requires_grad for x in prepared):
        raise ValueError("none of the inputs is a floating-point tensor: there is nothing to differentiate")
    checks = [torch.autograd.gradcheck] + ([torch.autograd.gradgradcheck] if second else [])
    for check in checks:
        try:
            check(fn, prepared, eps=eps, atol=atol, rtol=rtol)
        except GradcheckError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


def assert_gradient(loss: Tensor, target: Target, *, minimum: float = 0.0) -> None:
    """Assert that a finite, non-zero gradient reaches *every* tensor of `target`.

    Args:
        loss: scalar.
        target: a tensor, a module (its parameters that require a gradient), a mapping or an iterable of
            tensors.
        minimum: the largest absolute entry of each gradient must exceed this.

    Raises:
        AssertionError: a tensor gets no gradient, a zero one or one that is not finite; the message names
            it.
        ValueError: `target` is empty.

    Example:
        >>> import torch
        >>> student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> x = torch.ones(3, 2)
        >>> loss = (student(x) - teacher(x).detach()).square().mean()
        >>> assert_gradient(loss, student)
        >>> assert_no_gradient(loss, teacher)
    """
    for name, gradient in _gradients(loss, target):
        if gradient is None:
            raise AssertionError(f"{name}: no gradient reaches it")
        if not bool(torch.isfinite(gradient).all()):
            raise AssertionError(f"{name}: its gradient is not finite")
        size = float(gradient.abs().max()) if gradient.numel() else 0.0
        if not size > minimum:
            raise AssertionError(
                f"{name}: its gradient is at most {size:.3g} in size, not above {minimum:.3g}"
            )


def assert_no_gradient(loss: Tensor, target: Target) -> None:
    """Assert that no gradient, or an exactly zero one, reaches any tensor of `target`.

    Args:
        loss: scalar. One without a graph passes.
        target: a tensor, a module (all its parameters), a mapping or an iterable of tensors.

    Raises:
        AssertionError: a gradient arrives; the message names the tensor.
        ValueError: `target` is empty.
    """
    for name, gradient in _gradients(loss, target, everything=True):
        if gradient is not None and not bool((gradient == 0).all()):
            raise AssertionError(f"{name}: a gradient of size {float(gradient.abs().max()):.3g} reaches it")


def assert_gradient_only(loss: Tensor, inside: Target, outside: Target) -> None:
    """Assert that the gradient flows to every tensor of `inside` and to none of `outside`.

    Args:
        loss: scalar.
        inside: see `assert_gradient`.
        outside: see `assert_no_gradient`.

    Raises:
        AssertionError: as the two audits.
    """
    assert_gradient(loss, inside)
    assert_no_gradient(loss, outside)


def _named(target: Target, everything: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(target, Tensor):
        yield "tensor", target
    elif isinstance(target, nn.Module):
        yield from ((n, p) for n, p in target.named_parameters() if everything or p.requires_grad)
    elif isinstance(target, Mapping):
        yield from target.items()
    else:
        yield from ((f"tensor {i}", t) for i, t in enumerate(target))


def _gradients(loss: Tensor, target: Target, *, everything: bool = False) -> list[tuple[str, Tensor | None]]:
    """Return (name, gradient or None) for each tensor of the target."""
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {list(loss.shape)}")
    named = list(_named(target, everything))
    if not named:
        raise ValueError("the target holds no tensor to look at: an audit of nothing would always pass")
    wanted = [t for _, t in named if t.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if wanted and loss.requires_grad:
        found = list(torch.autograd.grad(loss.reshape(()), wanted, retain_graph=True, allow_unused=True))
    by_id = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return [(name, by_id.get(id(t))) for name, t in named]
