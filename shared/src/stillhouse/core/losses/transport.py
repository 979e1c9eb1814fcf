"""Optimal transport between the predictions of a batch: Sinkhorn distances in the log domain (SinKD).

When to use: besides a loss per sample, never alone: it compares two batches as sets, and adds how the
predictions of a batch lie to each other.

Legend: N student rows, M teacher rows, B rows of a batch (N = M = B), V classes or vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ._reduction import Reduction, check_floating, check_mask, check_pair, check_temperature, reduce, upcast

_NOTHING = -1e30  # log-weight of a row that takes no part: finite, so that no gradient is NaN


def sinkhorn_plan(
    cost: Tensor,
    *,
    eps: float = 0.1,
    iters: int = 20,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    mass: Literal["mean", "batch"] = "mean",
) -> Tensor:
    """Entropic transport plan by alternate normalisation of rows and columns, in the log domain.

    P minimises ⟨P, C⟩ + ε·KL(P ‖ a bᵀ) over plans with row sums a and column sums b. After the last half-step
    the column sums are exact, the row sums only up to convergence. The gradient runs through all iterations.

    Args:
        cost: C [..., N, M]; leading dimensions are independent problems.
        eps: ε > 0, in the units of the cost. Smaller is sharper and needs more iterations (of the order max C
            / ε).
        iters: pairs of half-steps, ≥ 1.
        row_weights: a [..., N] ≥ 0 with sum 1; None: 1/N each. Zero takes a row out.
        column_weights: b [..., M] ≥ 0 with sum 1; None: 1/M each. Zero takes a column out.
        mass: "mean": the plan has mass 1; "batch": mass M, so that each column sums to 1 under uniform
            weights (mass = number of columns with positive weight).

    Returns:
        P [..., N, M], float32 (float64 for float64 input).

    Raises:
        TypeError: not floating point.
        ValueError: fewer than two dimensions, an empty last one, eps ≤ 0, iters < 1, weights of another
            shape, an unknown mass.

    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013.

    Example:
        >>> plan = sinkhorn_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), eps=0.05)
        >>> (100 * plan).round().tolist()
        [[50.0, 0.0], [0.0, 50.0]]
    """
    check_floating("cost", cost)
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost must be [..., N, M] with N, M ≥ 1, got shape {list(cost.shape)}")
    _check_options(eps, iters, mass)
    (cost,) = upcast(cost)
    log_a = _log_weights("row_weights", row_weights, cost, cost.shape[:-1])
    log_b = _log_weights("column_weights", column_weights, cost, cost.shape[:-2] + cost.shape[-1:])
    plan = _plan(cost, log_a, log_b, eps, iters)
    if mass == "batch":
        plan = plan * (log_b > _NOTHING).sum(-1)[..., None, None]
    return plan


def _plan(cost: Tensor, log_a: Tensor, log_b: Tensor, eps: float, iters: int) -> Tensor:
    scaled = -cost / eps
    v = torch.zeros_like(log_b)
    for _ in range(iters):
        u = log_a - (scaled + v[..., None, :]).logsumexp(-1)
        v = log_b - (scaled + u[..., :, None]).logsumexp(-2)
    return (scaled + u[..., :, None] + v[..., None, :]).exp()


def sinkhorn_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 2.0,
    eps: float = 0.1,
    iters: int = 20,
    debias: bool = False,
    mass: Literal["mean", "batch"] = "mean",
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    compat: Literal["reference"] | None = None,
) -> Tensor:
    """Sinkhorn distance between the student's and the teacher's predictions of one batch (SinKD).

    x_i = softmax(z_S,i / T), y_j = softmax(z_T,j / T), C_ij = ‖x_i − y_j‖₁, P = `sinkhorn_plan`(C); loss =
    ⟨P, C⟩.

    It compares the two batches as *sets*: permuting one of them changes nothing, so it cannot say which
    sample should match which and must ride on a per-sample loss. Without `debias` it is **not zero at student
    ≡ teacher** (the entropic plan also moves mass between different rows).

    Args:
        student: logits [..., B, V]; leading dimensions are independent transport problems.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T > 0, or a tensor that broadcasts to [..., B, 1].
        eps: entropic regularisation ε > 0. The cost lies in [0, 2].
        iters: Sinkhorn iterations, ≥ 1.
        debias: return the Sinkhorn divergence S = OT(x, y) − ½ OT(x, x) − ½ OT(y, y), where OT = ⟨P, C⟩ +
            ε·KL(P ‖ abᵀ): 0 at equality and, up to convergence, ≥ 0.
        mass: "mean": the plan has mass 1, the loss is a mean cost per sample and independent of B; "batch":
            mass B (the number of valid rows), the published form.
        mask: bool [..., B], True = the sample takes part, on both sides.
        reduction: over the transport problems (leading dimensions): "token_mean", "sum", "batch_mean" or
            "none" ([...]).
        compat: "reference" reproduces the authors' BERT code: mass B, output × 0.001, T fixed at 2, no
            debiasing.

    Returns:
        Scalar, or [...]. Without debias it lies in [0, 2] for mass "mean". A problem without a valid sample
        is 0 and does not count in the mean.

    Raises:
        TypeError: not floating point, or the mask not boolean.
        ValueError: shapes differ, temperature or eps ≤ 0, iters < 1, an unknown mass or compat, or options
            that contradict compat="reference".

    Source: Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation", COLING 2024. The authors
    normalise in the probability domain, which underflows below ε ≈ 0.02; values agree where it does not.
    Debiasing: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences",
    AISTATS 2019.

    Relations to sibling losses: at B = 1 it is ‖x − y‖₁, twice the total variation; `uld_loss` transports
    within one distribution, this one between the samples of a batch.

    Example:
        >>> student, teacher = torch.randn(8, 5), torch.randn(8, 5)
        >>> shuffled = teacher.flip(0)
        >>> torch.allclose(sinkhorn_loss(student, teacher), sinkhorn_loss(student, shuffled), atol=1e-5)
        True
        >>> abs(sinkhorn_loss(teacher, teacher, debias=True).item()) < 1e-6
        True
    """
    check_pair(student, teacher, min_dim=2)
    check_temperature(temperature, student.shape[:-1])
    check_mask(mask, student.shape[:-1])
    _check_options(eps, iters, mass)
    if compat not in (None, "reference"):
        raise ValueError(f"compat={compat!r} is unknown; allowed: None, 'reference'")
    if compat == "reference":
        if debias or not (isinstance(temperature, (int, float)) and temperature == 2.0):
            raise ValueError("compat='reference' fixes temperature=2 and debias=False; leave both alone")
        mass = "batch"
    student, teacher = upcast(student, teacher.detach())
    if mask is not None:  # what padding holds, NaN included, must not reach a sum
        student, teacher = (z.masked_fill(~mask[..., None], 0.0) for z in (student, teacher))
    x, y = (z / temperature for z in (student, teacher))
    x, y = x.softmax(-1), y.softmax(-1)
    valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    count = valid.sum(-1)
    log_weights = torch.where(valid, -count.clamp_min(1).to(x.dtype).log()[..., None], _NOTHING)

    def transport(p: Tensor, q: Tensor) -> Tensor:
        cost = torch.cdist(p, q, p=1)
        plan = _plan(cost, log_weights, log_weights, eps, iters)
        value = (plan * cost).sum((-2, -1))
        if debias:
            value = value + eps * _kl_to_product(plan, log_weights)
        return value

    values = transport(x, y)
    if debias:
        values = values - 0.5 * (transport(x, x) + transport(y, y))
    if mass == "batch":
        values = values * count
    if compat == "reference":
        values = values * 0.001
    return reduce(values, mask=None if mask is None else count > 0, reduction=reduction)


def _kl_to_product(plan: Tensor, log_weights: Tensor) -> Tensor:
    """Σ P log(P / a bᵀ) for uniform weights on the valid rows, 0·log 0 = 0."""
    positive = plan > 0
    log_plan = torch.where(positive, plan, 1.0).log()
    log_product = log_weights[..., :, None] + log_weights[..., None, :]
    return torch.where(positive, plan * (log_plan - log_product), 0.0).sum((-2, -1))


def _check_options(eps: float, iters: int, mass: str) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps} must be a finite number > 0")
    if iters < 1:
        raise ValueError(f"iters={iters} must be at least 1")
    if mass not in ("mean", "batch"):
        raise ValueError(f"mass={mass!r} is unknown; allowed: 'mean' (plan of mass 1), 'batch' (mass B)")


def _log_weights(name: str, weights: Tensor | None, cost: Tensor, shape: torch.Size) -> Tensor:
    if weights is None:
        return cost.new_full(shape, -math.log(shape[-1]))
    check_floating(name, weights)
    if weights.shape != shape:
        raise ValueError(f"{name} has shape {list(weights.shape)}; {list(shape)} is needed")
    if bool((weights < 0).any()):
        raise ValueError(f"{name} must not be negative")
    weights = weights.to(cost.dtype)
    positive = weights > 0
    return torch.where(positive, torch.where(positive, weights, 1.0).log(), _NOTHING)
