"""Divergences between the teacher's and the student's class distributions, from logits.

p = softmax(teacher/T) and q = softmax(student/T) throughout, and every value is multiplied by T² unless
`scale_t2=False` (Hinton, Vinyals & Dean 2015, section 2: the factor keeps the gradient's size as T changes).

The gradients are closed forms (`_forms`), recomputed in the backward pass from the logits themselves: nothing
of size N×V is kept between the passes, and temporaries stay within blocks of rows. A second derivative, a
differentiable temperature and `log_input=True` go through ordinary autograd of the same formulas.

When to use: `forward_kl` (`kd_loss`) is where to start; the student spreads over all that the teacher
allows. A student too small for that does better with `reverse_kl` or a JSD, which let it choose, most of all
on sequences that it wrote itself; the skew divergences and `tvd` are the bounded, calmer relatives for
teachers and students that are far apart.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ._closed_form import divergence_of_logits
from ._forms import (
    AlphaDivergence,
    Form,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from ._reduction import Reduction

Compat = Literal["reference"] | None


def forward_kl(
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
    """Forward Kullback-Leibler divergence T²·KL(p‖q) = T²·Σ p (log p − log q): Hinton's distillation loss.

    It covers the teacher's modes: q is punished for missing what p allows. The gradient in the student's
    logits is T·(q − p).

    Args:
        student: logits [..., V], float16/bfloat16/float32/float64. −inf marks classes that are not
            allowed; every row that counts needs at least one finite logit.
        teacher: logits [..., V] over the same classes; detached inside.
        temperature: T > 0, a number or a tensor [..., 1] (one per row). Finite in value and gradient from
            T = 0.02 on for logits of ordinary size.
        mask: bool [...], True = the row counts.
        reduction: "token_mean" (mean over the rows that count), "sum", "batch_mean" (sum / first
            dimension) or "none" (one value per row).
        num_items: count that replaces the local one in "token_mean", for accumulation and data parallelism.
        scale_t2: multiply by T².
        log_input: the inputs are log-probabilities already; needs temperature 1.

    Returns:
        A scalar, or [...] for "none"; float32, or float64 when an input is. Zero and connected to the
        graph when no row counts. A row where the teacher has mass on a class whose student logit is −inf
        is +inf, as the mathematics has it, and its gradient is still T·(q − p). Give both sides the same
        −inf to avoid it.

    Raises:
        TypeError: inputs are not floating-point, the mask is not bool.
        ValueError: shapes differ, T ≤ 0, unknown reduction, log_input with a temperature.

    Source:
        Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Relations:
        `soft_cross_entropy` is this plus the teacher's entropy (same gradient); `logit_mse`/2 is its limit
        for T → ∞; `reverse_kl` seeks modes instead; `generalized_jsd` interpolates between the two;
        `fused_linear_kl` takes hidden states instead of logits; `topk_kl` a teacher's stored top-k.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
        >>> student = torch.zeros(1, 3, requires_grad=True)
        >>> loss = forward_kl(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
        (0.7706, [-0.5904, 0.2042, 0.3862])
    """
    return divergence_of_logits(
        ForwardKL(),
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


kd_loss = forward_kl


def reverse_kl(
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
    """Reverse Kullback-Leibler divergence T²·KL(q‖p) = T²·Σ q (log q − log p).

    It seeks the teacher's modes: q is punished for mass where p has little. The gradient in the student's
    logits is T·q·(log q − log p − KL).

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
        A scalar, or [...] for "none". A row where the student has mass on a class whose teacher logit is
        −inf is +inf, has no direction of descent and gets gradient zero; give both sides the same −inf to
        avoid it.

    Raises:
        TypeError, ValueError: as `forward_kl`.

    Source:
        Gu et al., "MiniLLM", ICLR 2024; Agarwal et al., "GKD", ICLR 2024.

    Relations:
        `on_policy_kl` estimates it from tokens that the student sampled; `skew_reverse_kl` is its bounded
        form.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
        >>> round(reverse_kl(torch.zeros(1, 3), teacher).item(), 4)
        0.7379
    """
    return divergence_of_logits(
        ReverseKL(),
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


def generalized_jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
    log_input: bool = False,
    compat: Compat = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence T²·[β·KL(p‖m) + (1−β)·KL(q‖m)], m = βp + (1−β)q.

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; detached inside.
        beta: β in [0, 1], the teacher's weight. 0 and 1 are special cases, as in GKD's implementations: β
            = 0 is *defined* as forward KL and β = 1 as reverse KL. The formula itself tends to 0 at both
            ends; it is JSD_β/β that tends to forward KL as β → 0, and JSD_β/(1−β) to reverse KL as β → 1.
            The value therefore jumps at the ends.
        temperature: T > 0, a number or [..., 1].
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T². GKD's implementations do not.
        log_input: the inputs are log-probabilities already; needs temperature 1.
        compat: "reference" reads beta as the *student's* weight, the convention of DistiLLM's and TAID's
            code: beta=0.9 there is beta=0.1 here. It must lie inside (0, 1).

    Returns:
        A scalar, or [...] for "none"; between 0 and T²·ln 2 for β = 0.5. Finite for any supports unless β
        is 0 or 1.

    Raises:
        ValueError: beta outside [0, 1], unknown compat; otherwise as `forward_kl`.

    Source:
        Agarwal et al., "On-Policy Distillation of Language Models" (GKD), ICLR 2024, equation 1.

    Relations:
        The mixture of `skew_forward_kl` and `skew_reverse_kl`:
        JSD_β = β·skew_forward(α=β) + (1−β)·skew_reverse(α=1−β).

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
        >>> student = torch.zeros(1, 3)
        >>> round(generalized_jsd(student, teacher, beta=0.5).item(), 4)
        0.1495
        >>> generalized_jsd(student, teacher, beta=0.0).equal(forward_kl(student, teacher))
        True
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} must lie in [0, 1]")
    form: Form
    if _reference(compat):
        if beta in (0.0, 1.0):
            raise ValueError(
                f"beta={beta} with compat='reference' must lie inside (0, 1): the formula is 0 there"
            )
        form = JensenShannon(1.0 - beta)
    else:
        form = ForwardKL() if beta == 0.0 else ReverseKL() if beta == 1.0 else JensenShannon(beta)
    return divergence_of_logits(
        form,
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


def skew_forward_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
    log_input: bool = False,
    compat: Compat = None,
) -> Tensor:
    """Skew forward divergence T²·KL(p‖αp + (1−α)q).

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; detached inside.
        alpha: α in [0, 1), the teacher's share of the mixture; 0 is forward KL. At most −log α for α > 0.
        temperature: T > 0, a number or [..., 1].
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².
        log_input: the inputs are log-probabilities already; needs temperature 1.
        compat: "reference" returns the cross-entropy −Σ p log m of DistiLLM's code: the teacher's entropy
            is left out, the gradient is the same.

    Returns:
        A scalar, or [...] for "none"; finite for any supports when α > 0.

    Raises:
        ValueError: alpha outside [0, 1), unknown compat; otherwise as `forward_kl`.

    Source:
        Ko et al., "DistiLLM", ICML 2024 (α = 0.1 is its code's default).

    Relations:
        `skew_reverse_kl` is the mirror image; `forward_kl` the case α = 0; see `generalized_jsd`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
        >>> round(skew_forward_kl(torch.zeros(1, 3), teacher, alpha=0.1).item(), 4)
        0.4657
    """
    _check_skew(alpha)
    entropy = not _reference(compat)
    return divergence_of_logits(
        SkewForwardKL(alpha, entropy) if alpha > 0 else ForwardKL(entropy),
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


def skew_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
    log_input: bool = False,
) -> Tensor:
    """Skew reverse divergence T²·KL(q‖(1−α)p + αq).

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; detached inside.
        alpha: α in [0, 1), the student's share of the mixture; 0 is reverse KL. At most −log α for α > 0.
        temperature: T > 0, a number or [..., 1].
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².
        log_input: the inputs are log-probabilities already; needs temperature 1.

    Returns:
        A scalar, or [...] for "none"; finite for any supports when α > 0.

    Raises:
        ValueError: alpha outside [0, 1); otherwise as `forward_kl`.

    Source:
        Ko et al., "DistiLLM", ICML 2024 (α = 0.1 is its code's default).

    Relations:
        `skew_forward_kl` is the mirror image; `reverse_kl` the case α = 0.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
        >>> round(skew_reverse_kl(torch.zeros(1, 3), teacher, alpha=0.1).item(), 4)
        0.5246
    """
    _check_skew(alpha)
    return divergence_of_logits(
        SkewReverseKL(alpha) if alpha > 0 else ReverseKL(),
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


def tvd(
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
    """Total variation distance T²·½ Σ |p − q|.

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
        A scalar, or [...] for "none"; between 0 and T². The subgradient at p = q is zero.

    Raises:
        TypeError, ValueError: as `forward_kl`.

    Source:
        Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023.

    Relations:
        Pinsker's inequality bounds it: TVD ≤ √(KL/2), for either direction of the KL (T = 1).

    Example:
        >>> import torch
        >>> round(tvd(torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]).log_softmax(-1)).item(), 4)
        0.4526
    """
    return divergence_of_logits(
        TotalVariation(),
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


def alpha_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
    log_input: bool = False,
) -> Tensor:
    """Amari's alpha-divergence T²·(1 − Σ p^α q^{1−α}) / (α(1−α)).

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; detached inside.
        alpha: α in [0, 1]: 1 is forward KL, 0 reverse KL (the limits, and computed as such), 0.5 four
            times the squared Hellinger distance ½ Σ (√p − √q)². Unlike `generalized_jsd` it is continuous
            in α.
        temperature: T > 0, a number or [..., 1].
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².
        log_input: the inputs are log-probabilities already; needs temperature 1.

    Returns:
        A scalar, or [...] for "none"; at most T²/(α(1−α)), so finite for any supports inside (0, 1).

    Raises:
        ValueError: alpha outside [0, 1]; otherwise as `forward_kl`.

    Source:
        Amari, "Differential-Geometrical Methods in Statistics", 1985, in the parametrisation whose ends
        are the two KL divergences.

    Relations:
        Another path between `forward_kl` and `reverse_kl` than `generalized_jsd`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
        >>> [round(alpha_divergence(torch.zeros(1, 3), teacher, alpha=a).item(), 4) for a in (0.0, 0.5, 1.0)]
        [0.7379, 0.6249, 0.5743]
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]")
    form: Form
    form = ReverseKL() if alpha == 0.0 else ForwardKL() if alpha == 1.0 else AlphaDivergence(alpha)
    return divergence_of_logits(
        form,
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        log_input=log_input,
    )


def _check_skew(alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha={alpha} must lie in [0, 1); at 1 the mixture is the first argument itself")


def _reference(compat: str | None) -> bool:
    if compat not in (None, "reference"):
        raise ValueError(f"compat={compat!r} is unknown; allowed: None, 'reference'")
    return compat == "reference"
