"""Losses whose *gradient* is the point: denoising score matching, distribution matching, consistency.

Reduction, here and everywhere in this file: "mean" over all elements that count (default), "sum", or
"batch_mean" (sum over elements, mean over samples). A surrogate's gradient is the stated one divided by that
number of elements; its value means nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "batch_mean"]
Normaliser = Literal["none", "dmd2", "fastgen"]


def dsm(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Denoising score matching, w·(prediction − target)² in whatever space the two live.

    Args:
        prediction: `[B, *S]`.
        target: `[B, *S]`, taken as a constant.
        weight: a number, `[B]`, or anything that broadcasts to `[B, *S]`.
        mask: bool, broadcasts to `[B, *S]`; False does not count.
        reduction: see the head of the module.

    Returns:
        Scalar.

    Example:
        >>> dsm(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(2.)
    """
    _same("target", target, prediction)
    gap = _masked(prediction - target.detach(), mask)
    return _reduce(_weighted(weight, gap.square()), mask, reduction)


def score_matching_surrogate(
    x: Tensor,
    fake: Tensor,
    real: Tensor,
    weight: Tensor | float = 1.0,
    *,
    mask: Tensor | None = None,
    normaliser: Normaliser = "none",
    reduction: Reduction = "mean",
) -> Tensor:
    """½·‖x − sg(x − w·(D_fake − D_real))‖², whose gradient in x is w·(D_fake − D_real).

    It moves the sample x towards where the teacher, and not the critic, would denoise it to.

    Args:
        x: the student's sample `[B, *S]`, with its graph.
        fake: the critic's x₀ at the re-noised sample `[B, *S]`.
        real: the teacher's x₀ there.
        weight: a number, `[B]`, or broadcastable.
        mask: bool, broadcasts to `[B, *S]`.
        normaliser: "dmd2" divides by mean|x − D_real| of each sample and turns NaN and infinities into
            numbers; "fastgen" adds 1e-6 to that mean; "none".
        reduction: see the head of the module.

    Returns:
        Scalar.

    Source: Yin et al., DMD2, 2024.

    Example:
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> loss = score_matching_surrogate(x, torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), reduction="sum")
        >>> torch.autograd.grad(loss, x)[0]
        tensor([[1., 2.]])
    """
    _same("fake", fake, x)
    _same("real", real, x)
    with torch.no_grad():
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        direction = _weighted(weight, fake.to(wide.dtype) - real.to(wide.dtype))
        direction = direction * _dmd_factor(wide, real, mask, normaliser)
        if normaliser == "dmd2":
            direction = direction.nan_to_num()
        target = wide - direction
    gap = _masked(x.to(wide.dtype) - target, mask)
    return _reduce(0.5 * gap.square(), mask, reduction)


def vsd_surrogate(
    g: Tensor,
    x: Tensor,
    *,
    weight: Tensor | float = 1.0,
    mask: Tensor | None = None,
    normaliser: Literal["none", "abs_mean", "rms"] = "none",
    reduction: Reduction = "mean",
) -> Tensor:
    """mean(sg(g)·x): a loss whose gradient in x is g, divided by the number of elements.

    With g = ε_teacher(x_t) − ε_critic(x_t) at the re-noised sample this is the descent of variational score
    distillation on KL(student ‖ teacher).

    Args:
        g: the wished gradient `[B, *S]`; no gradient flows through it.
        x: the student's sample `[B, *S]`, with its graph.
        weight: a number, `[B]`, or broadcastable, for example a function ω(t).
        mask: bool, broadcasts to `[B, *S]`.
        normaliser: "abs_mean" divides g by the mean of |g| of each sample, "rms" by its root mean square;
            a g that is zero throughout stays zero.
        reduction: see the head of the module.

    Returns:
        Scalar.

    Source: Wang et al., ProlificDreamer, 2023; the product form is ours.

    Example:
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> torch.autograd.grad(vsd_surrogate(torch.tensor([[2.0, -4.0]]), x), x)[0]
        tensor([[ 1., -2.]])
    """
    _same("g", g, x)
    with torch.no_grad():
        direction = _weighted(weight, g.detach())
        if normaliser != "none":
            if normaliser not in ("abs_mean", "rms"):
                raise ValueError(f"normaliser is {normaliser!r}; allowed: 'none', 'abs_mean', 'rms'")
            size = direction.abs() if normaliser == "abs_mean" else direction.square()
            mean = _sample_mean(size, mask)
            scale = mean if normaliser == "abs_mean" else mean.sqrt()
            direction = direction / torch.where(scale > 0, scale, torch.ones_like(scale))
    return _reduce(_masked(direction, mask) * _masked(x, mask), mask, reduction)


def consistency(
    a: Tensor,
    b: Tensor,
    metric: Literal["l2", "l1", "huber"] = "l2",
    *,
    huber_c: float = 1e-3,
    weight: Tensor | float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """d(a, sg(b)): two answers for one trajectory agree.

    Args:
        a: the student's answer `[B, *S]`.
        b: the target `[B, *S]`; taken as a constant.
        metric: "l2" (squared), "l1", or "huber", √(d² + c²) − c elementwise (pseudo-Huber).
        huber_c: c > 0.
        weight: a number, `[B]`, or broadcastable.
        mask: bool, broadcasts to `[B, *S]`.
        reduction: see the head of the module.

    Returns:
        Scalar.
    """
    _same("b", b, a)
    d = _masked(a - b.detach(), mask)
    if metric == "l2":
        value = d.square()
    elif metric == "l1":
        value = d.abs()
    elif metric == "huber":
        if not huber_c > 0:
            raise ValueError(f"huber_c is {huber_c}; it must be > 0")
        value = (d.square() + huber_c**2).sqrt() - huber_c
    else:
        raise ValueError(f"metric is {metric!r}; allowed: 'l2', 'l1', 'huber'")
    return _reduce(_weighted(weight, value), mask, reduction)


def _dmd_factor(x: Tensor, real: Tensor, mask: Tensor | None, normaliser: str) -> Tensor | float:
    if normaliser == "none":
        return 1.0
    if normaliser not in ("dmd2", "fastgen"):
        raise ValueError(f"normaliser is {normaliser!r}; allowed: 'none', 'dmd2', 'fastgen'")
    mean = _sample_mean((x - real.to(x.dtype)).abs(), mask)
    return 1 / (mean + (1e-6 if normaliser == "fastgen" else 0.0))


def _sample_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all but the batch, kept broadcastable."""
    axes = tuple(range(1, values.dim()))
    if not axes:
        return values
    if mask is None:
        return values.mean(axes, keepdim=True)
    counts = mask.expand_as(values)
    total = torch.where(counts, values, torch.zeros_like(values)).sum(axes, keepdim=True)
    return total / counts.sum(axes, keepdim=True).clamp_min(1)


def _weighted(weight: Tensor | float, values: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        weight = weight.to(values)
        if weight.dim() == 1 and values.dim() > 1:
            if len(weight) != len(values):
                raise ValueError(f"weight has {len(weight)} entries for a batch of {len(values)}")
            weight = weight.reshape(-1, *[1] * (values.dim() - 1))
    return values * weight


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where the mask is False, before anything is squared: a NaN there reaches no gradient either."""
    return values if mask is None else torch.where(mask, values, torch.zeros_like(values))


def _reduce(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "batch_mean"):
        raise ValueError(f"reduction is {reduction!r}; allowed: 'mean', 'sum', 'batch_mean'")
    count = values.numel()
    if mask is not None:
        counts = mask.expand_as(values)
        values = torch.where(counts, values, torch.zeros_like(values))
        count = int(counts.sum())
    total = values.sum()
    if reduction == "mean":
        return total / max(count, 1)
    return total / max(len(values), 1) if reduction == "batch_mean" else total


def _same(name: str, value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; it must be that of the sample, {list(x.shape)}"
        )
