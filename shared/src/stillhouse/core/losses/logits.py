"""Losses and transforms on logits that are not a divergence of the two distributions alone.

When to use: `dkd` where the teacher is nearly certain and its ranking of the other classes would drown;
`dist_loss` or `logit_standardization` where the teacher is much stronger, so that only its relations can be
followed; `logit_mse` in place of a very high temperature; `taid_target` to walk from student to teacher.

Legend: [..., V] logits, N rows that count. p = softmax(teacher/T), q = softmax(student/T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._closed_form import divergence_of_logits, temperature_rows, tempered_log_softmax
from ._forms import INF, ForwardKL, expect, safe_logsumexp
from ._reduction import (
    Reduction,
    check_floating,
    check_mask,
    check_pair,
    check_reduction,
    check_temperature,
    compute_dtype,
    reduce_rows,
    upcast,
    valid_rows,
)


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
    log_input: bool = False,
) -> Tensor:
    """Cross-entropy with soft targets, −T²·Σ p log q.

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; detached inside.
        temperature: T > 0, a number or [..., 1].
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².
        log_input: the inputs are log-probabilities already; needs temperature 1.

    Returns:
        A scalar, or [...] for "none". +inf where the teacher has mass on a class whose student logit is
        −inf.

    Raises:
        TypeError, ValueError: as `forward_kl`.

    Relations:
        `forward_kl` plus T²·H(p). The gradients are equal; the value is not a distance: its minimum is the
        teacher's entropy. Code that reads the value (TAID's adaptive rule, loss balancing) tells the two
        apart.

    Example:
        >>> import torch
        >>> teacher = torch.zeros(1, 4)
        >>> soft_cross_entropy(teacher, teacher).allclose(torch.tensor(4.0).log())
        True
    """
    return divergence_of_logits(
        ForwardKL(entropy=False),
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


def logit_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    center: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Mean squared difference of the logits, (1/V)·Σ_v (z̃_s − z̃_t)², per row.

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; detached inside.
        center: subtract each row's mean first (z̃), so that a constant added to a row, which no softmax
            sees, costs nothing. False compares the raw logits.
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".

    Returns:
        A scalar, or [...] for "none". Classes whose logit is −inf on either side are left out of the means.

    Raises:
        TypeError, ValueError: as `forward_kl`.

    Source:
        Ba & Caruana, "Do Deep Nets Really Need to be Deep?", 2014; the limit in Hinton, Vinyals & Dean
        2015.

    Relations:
        With centred logits, `forward_kl` at temperature T tends to half of this for T → ∞.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 2.0]])
        >>> logit_mse(student, teacher).item(), logit_mse(student, teacher, center=False).item()
        (1.0, 10.0)
    """
    check_pair(student, teacher)
    check_mask(mask, student.shape[:-1])
    check_reduction(reduction, num_items)
    s, t = upcast(*valid_rows(mask, student, teacher.detach()))
    kept = (s != -INF) & (t != -INF)
    count = kept.sum(-1).clamp_min(1)
    difference = s.masked_fill(~kept, 0.0) - t.masked_fill(~kept, 0.0)
    if center:
        difference = (difference - difference.sum(-1, keepdim=True) / count[:, None]).masked_fill(~kept, 0.0)
    values = difference.square().sum(-1) / count
    return reduce_rows(values, mask=mask, shape=student.shape[:-1], reduction=reduction, num_items=num_items)


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
) -> Tensor:
    """Decoupled knowledge distillation T²·(α·TCKD + β·NCKD).

    With y the target class: TCKD = KL of the binary distributions (p_y, 1−p_y) and (q_y, 1−q_y); NCKD = KL
    of the distributions over the other classes, each renormalised. Both in log-space; the target is
    removed by masked_fill(−inf), not by a large negative number.

    Args:
        student: logits [..., V], V ≥ 2.
        teacher: logits [..., V]; detached inside.
        target: class indices [...], integers in [0, V); entries under a False mask may hold anything.
        alpha: weight α of TCKD.
        beta: weight β of NCKD.
        temperature: T > 0, a number or [..., 1].
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².

    Returns:
        A scalar, or [...] for "none". With two classes NCKD is exactly zero; with a one-hot teacher (all
        other logits −inf) it is defined as zero.

    Raises:
        ValueError: V < 2, target of another shape or out of range; otherwise as `forward_kl`.
        TypeError: target does not hold integers.

    Source:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022; α = 1, β = 8, T = 4 are its code's
        values for CIFAR-100, used there with a warm-up of 20 epochs.

    Relations:
        KL(p‖q) = TCKD + (1−p_y)·NCKD, so `forward_kl` is DKD with a weight on NCKD that depends on the
        sample.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])
        >>> from stillhouse.core.losses import forward_kl
        >>> loss = dkd(student, teacher, torch.tensor([0]))
        >>> loss.allclose(forward_kl(student, teacher, temperature=4.0))
        True
    """
    check_pair(student, teacher)
    shape, classes = student.shape[:-1], student.shape[-1]
    check_mask(mask, shape)
    check_reduction(reduction, num_items)
    check_temperature(temperature, shape)
    if classes < 2:
        raise ValueError(f"student has {classes} class; decoupling needs at least 2")
    labels = _target_rows(target, mask, shape, classes)
    rows = valid_rows(mask, student, teacher.detach())
    dtype = compute_dtype(student, teacher)
    t = temperature_rows(temperature, mask, shape)
    log_q, log_p = (tempered_log_softmax(z, t, dtype) for z in rows)

    at_target = torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, labels[:, None], True)
    other_q, other_p = log_q.masked_fill(at_target, -INF), log_p.masked_fill(at_target, -INF)
    rest_q, rest_p = safe_logsumexp(other_q), safe_logsumexp(other_p)
    binary_q = torch.stack((log_q.gather(-1, labels[:, None])[:, 0], rest_q), -1)
    binary_p = torch.stack((log_p.gather(-1, labels[:, None])[:, 0], rest_p), -1)
    tckd = expect(binary_p.exp(), binary_p, binary_q)

    # Rows in which one side has nothing beside the target have no distribution over the other classes.
    alone_p, alone_q = (rest_p == -INF)[:, None], (rest_q == -INF)[:, None]
    hat_p = (other_p - rest_p[:, None].masked_fill(alone_p, 0.0)).masked_fill(alone_p, -INF)
    hat_q = other_q - rest_q[:, None].masked_fill(alone_q, 0.0)
    nckd = expect(hat_p.exp(), hat_p, hat_q)

    values = alpha * tckd + beta * nckd
    if scale_t2:
        values = values * (t.to(dtype).squeeze(-1) ** 2 if isinstance(t, Tensor) else t * t)
    return reduce_rows(values, mask=mask, shape=shape, reduction=reduction, num_items=num_items)


def _target_rows(target: Tensor, mask: Tensor | None, shape: torch.Size, classes: int) -> Tensor:
    """Check class indices [...] and return those of the valid rows, int64 [N]."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold integer class indices, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(
            f"target has shape {list(target.shape)} but there is one row per entry of {list(shape)}"
        )
    labels = (target.reshape(-1) if mask is None else target[mask]).long()
    if labels.numel() and not bool(((labels >= 0) & (labels < classes)).all()):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(
            f"target holds classes {low}..{high} but there are {classes}; mask the rows without a label"
        )
    return labels


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    mask: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """DIST: match relations by Pearson correlation, τ²·(β·inter + γ·intra).

    inter = 1 − mean over the rows of ρ(q_i, p_i), the correlation over the classes of one sample;
    intra = 1 − mean over the classes of ρ(q_·v, p_·v), the correlation over the samples of one class.

    Args:
        student: logits [..., V], V ≥ 2.
        teacher: logits [..., V]; detached inside.
        beta: weight β of the inter-class relation.
        gamma: weight γ of the intra-class relation.
        tau: temperature τ > 0 of both softmaxes.
        mask: bool [...], True = the row counts.
        eps: smallest norm of a centred row that is divided by; a row or column without variance has
            correlation 0, loss 1 and a finite gradient.

    Returns:
        A scalar; 0 when the probabilities agree up to a positive affine map, at most 2·τ²·(β+γ). Zero with
        a graph when no row counts.

    Raises:
        ValueError: τ ≤ 0, fewer than 2 classes, or γ ≠ 0 with one or two rows (the correlation over two
            samples is ±1 whatever they are).

    Source:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.

    Relations:
        `forward_kl` asks for equal probabilities; this for linear relations between them, which a teacher
        that is much sharper than the student can still satisfy.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 1.0, 0.0]])
        >>> bool(dist_loss(logits, logits) < 1e-6)
        True
    """
    check_pair(student, teacher)
    check_mask(mask, student.shape[:-1])
    check_temperature(tau, student.shape[:-1])
    if student.shape[-1] < 2:
        raise ValueError(
            f"student has {student.shape[-1]} class; a correlation over classes needs at least 2"
        )
    rows = valid_rows(mask, student, teacher.detach())
    dtype = compute_dtype(student, teacher)
    q, p = (tempered_log_softmax(z, tau, dtype).exp() for z in rows)
    count = q.shape[0]
    if count == 0:
        return q.sum()
    if gamma != 0 and count < 3:
        raise ValueError(
            f"{count} row(s) count, but the correlation over samples needs at least 3: use larger batches or "
            "gamma=0"
        )
    loss = beta * (1 - _pearson(q, p, eps).mean())
    if gamma != 0:
        loss = loss + gamma * (1 - _pearson(q.T, p.T, eps).mean())
    return loss * (tau * tau)


def _pearson(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Pearson correlation of each row of x with the same row of y, [N]."""
    x = x - x.mean(-1, keepdim=True)
    y = y - y.mean(-1, keepdim=True)
    norm_x = torch.linalg.vector_norm(x, dim=-1).clamp_min(eps)
    norm_y = torch.linalg.vector_norm(y, dim=-1).clamp_min(eps)
    return (x * y).sum(-1) / (norm_x * norm_y)


def logit_standardization(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Standardise each row: (z − mean)/(std + ε), a transform to apply to both sides before a loss.

    Args:
        logits: [..., V], V ≥ 2.
        eps: ε, added to the standard deviation (with V − 1 in its denominator).

    Returns:
        [..., V], float32 (float64 for float64). −inf entries stay −inf and are left out of mean and
        deviation. The gradient flows through mean and deviation.

    Raises:
        TypeError: not floating-point.
        ValueError: V < 2.

    Source:
        Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024: the student matches the
        shape of the teacher's logits, not their magnitude. Follow it with a temperature.

    Relations:
        Makes any loss of this package invariant to a positive affine map of a row of logits.

    Example:
        >>> import torch
        >>> logit_standardization(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits have shape {list(logits.shape)}; a standard deviation needs at least 2 classes"
        )
    (z,) = upcast(logits)
    empty = z == -INF
    finite = z.masked_fill(empty, 0.0)
    count = (~empty).sum(-1, keepdim=True)
    mean = finite.sum(-1, keepdim=True) / count.clamp_min(1)
    centred = (finite - mean).masked_fill(empty, 0.0)
    # vector_norm has the subgradient 0 at 0, where the square root of the variance has none.
    deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (count - 1).clamp_min(1).sqrt()
    return (centred / (deviation + eps)).masked_fill(empty, -INF)


def taid_target(student: Tensor, teacher: Tensor, coef: float | Tensor) -> Tensor:
    """Intermediate target of TAID, the logits (1−t)·sg[z_s] + t·z_t.

    Args:
        student: logits [..., V]; detached inside.
        teacher: logits [..., V]; detached inside.
        coef: t in [0, 1], a number or a tensor that broadcasts to [..., 1]. A schedule moves it from the
            student (0) to the teacher (1); it is advanced by the training step, never here.

    Returns:
        Logits [..., V], float32 (float64 for float64), without a graph. −inf where a side of non-zero
        weight is.

    Raises:
        ValueError: shapes differ or a number t outside [0, 1].

    Source:
        Shing et al., "TAID: Temporally Adaptive Interpolated Distillation", ICLR 2025. The paper's loss is
        KL(p_t‖q), `forward_kl`; its code uses the cross-entropy, `soft_cross_entropy` (same gradient).

    Relations:
        t = 1 is plain distillation; at t = 0 the gradient is zero.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 0.0]])
        >>> taid_target(student, teacher, 0.25)
        tensor([[1.0000, 1.5000]])
    """
    check_pair(student, teacher)
    if not isinstance(coef, Tensor) and not 0.0 <= coef <= 1.0:
        raise ValueError(f"coef={coef} must lie in [0, 1]")
    s, t = upcast(student.detach(), teacher.detach())
    weight = coef.detach().to(s.dtype) if isinstance(coef, Tensor) else s.new_tensor(coef)
    # 0·(−inf) is NaN, so a side of weight zero is left out altogether.
    own = ((1 - weight) * s).masked_fill(weight == 1, 0.0)
    return own + (weight * t).masked_fill(weight == 0, 0.0)
