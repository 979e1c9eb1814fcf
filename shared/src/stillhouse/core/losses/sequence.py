"""Token sequences: the causal shift, and the divergence on sequences that the student wrote itself.

When to use: `causal_shift` before every token-level loss of a causal model; `on_policy_kl` on sequences that
the student sampled, "full" where the teacher's whole distribution is at hand and a sampled estimator where a
server gives the chosen tokens' log-probabilities only.

Legend: B sequences, L positions, V vocabulary; q the student's and p the teacher's next-token distribution.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ._forms import INF, ReverseKL
from ._reduction import Reduction, check_mask, check_pair, check_reduction, reduce_rows, upcast, valid_rows
from .topk import log1mexp

Estimator = Literal["k1", "k2", "k3", "full", "topk"]
Gradient = Literal["score", "direct"]


def causal_shift(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Line up next-token logits with the tokens they predict; the one place where this is done.

    Position i of a causal model predicts token i + 1, so the last logits and the first label have no
    partner.

    Args:
        logits: [..., L, D] logits, or hidden states before the head.
        labels: [..., L] token ids, `ignore_index` where a token does not count (prompt, padding).
        ignore_index: label of tokens that do not count.

    Returns:
        logits[..., :-1, :] (a view), labels[..., 1:], and the mask [..., L−1] that is True where the
        *predicted* token counts. The first response token is predicted at the last prompt position, which
        is therefore kept.

    Raises:
        ValueError: shapes do not fit or L = 0.

    Relations:
        Pass teacher logits through it with the same labels; give the mask to any loss of this package.
        Nothing else shifts: a loss compares the rows it is given.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[-100, -100, 7, 8]])  # two prompt tokens, two of the response
        >>> logits, targets, mask = causal_shift(torch.zeros(1, 4, 9), labels)
        >>> logits.shape[1], targets.tolist(), mask.tolist()
        (3, [[-100, 7, 8]], [[False, True, True]])
    """
    if logits.dim() != labels.dim() + 1 or logits.shape[:-1] != labels.shape or labels.dim() == 0:
        raise ValueError(
            f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}; they must be "
            "[..., L, D] and [..., L], both before any shift"
        )
    if labels.shape[-1] == 0:
        raise ValueError("labels hold no position (L = 0)")
    targets = labels[..., 1:]
    return logits[..., :-1, :], targets, targets != ignore_index


def on_policy_kl(
    student_logp: Tensor,
    teacher_logp: Tensor,
    *,
    estimator: Estimator = "k1",
    gradient: Gradient = "score",
    behaviour_logp: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Reverse KL(q‖p) per token on sequences sampled from the student.

    With r = log p(y) − log q(y) for the sampled token y:
    k1 = −r; k2 = r²/2; k3 = e^r − 1 − r. "full" is Σ_v q (log q − log p) over the vocabulary, "topk" the
    same over k tokens and one bucket for all the others.

    For k1, k2, k3 the mean of the *gradient* over y ~ q is what counts, and differentiating the value is
    not enough: it leaves out that y depends on q. The mean of the differentiated k1 is zero, that of k3 is
    the gradient of the *forward* KL; only k2's is ∇KL(q‖p). gradient="score" (default) therefore gives
    each of them the score-function gradient (log q − log p)·∇log q, which is unbiased for ∇KL(q‖p) and
    turns out to be the same for all three.

    Args:
        student_logp: log q. [...] of the sampled tokens for k1, k2, k3; [..., V] for "full"; [..., k] for
            "topk", of any k distinct tokens (usually the student's largest), normalised over the full
            vocabulary.
        teacher_logp: log p, of the same shape and for the same tokens; detached inside.
        estimator: k1 (unbiased value), k2 (biased value, low variance), k3 (unbiased, ≥ 0), "full"
            (exact), "topk" (a lower bound of the exact value; the gradient is that of the bound).
        gradient: "score", or "direct" for the derivative of the value as it stands. Only for k1, k2, k3.
        behaviour_logp: [...], log-probability of y under the policy that sampled it, when that is not the
            current student: value and gradient are weighted by q/behaviour (not clipped, no gradient). Only
            for k1, k2, k3.
        mask: bool, True = the token counts; of shape [...].
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".

    Returns:
        A scalar, or [...] for "none". +inf where the teacher gives a sampled token probability zero; k3
        overflows to +inf, in its "direct" gradient too, where p/q does (e^88 in float32). A token to which
        the student itself gives probability zero weighs nothing. With "topk" the teacher's tail counts with
        at least the rounding unit of the dtype, since a smaller one cannot be told from none.

    Raises:
        ValueError: unknown estimator or gradient, shapes differ, an option that the estimator does not
            have.

    Source:
        Schulman, "Approximating KL Divergence", 2020 (k1, k2, k3). The gradients are derived in the tests
        by enumeration of a small vocabulary.

    Relations:
        `reverse_kl` is "full" from logits. With "full" and "topk" every token's gradient is exact, so
        their variance is lower than that of any single-sample estimator.

    Example:
        >>> import torch
        >>> log_q = torch.tensor([[-0.5, -2.0]], requires_grad=True)
        >>> log_p = torch.tensor([[-1.0, -1.0]])
        >>> loss = on_policy_kl(log_q, log_p)  # mean of (0.5, −1.0)
        >>> loss.backward()
        >>> loss.item(), log_q.grad.tolist()
        (-0.25, [[0.25, -0.5]])
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator={estimator!r} is unknown; allowed: {', '.join(get_args(Estimator))}")
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient={gradient!r} is unknown; allowed: {', '.join(get_args(Gradient))}")
    sampled = estimator in ("k1", "k2", "k3")
    if not sampled and (behaviour_logp is not None or gradient != "score"):
        raise ValueError(f"estimator={estimator!r} samples nothing: leave behaviour_logp and gradient alone")
    if sampled and student_logp.dim() == 0:
        raise ValueError("student_logp has no dimension; it must hold one entry per token")
    check_pair(student_logp, teacher_logp)
    shape = student_logp.shape if sampled else student_logp.shape[:-1]
    check_mask(mask, shape)
    check_reduction(reduction, num_items)
    if behaviour_logp is not None and behaviour_logp.shape != shape:
        raise ValueError(f"behaviour_logp has shape {list(behaviour_logp.shape)}; it must be {list(shape)}")

    teacher_logp = teacher_logp.detach()
    if sampled:
        pair = valid_rows(mask, student_logp[..., None], teacher_logp[..., None])
        log_q, log_p = (x[..., 0] for x in upcast(*pair))
        impossible = log_q == -INF  # weight q = 0, and −inf − (−inf) would be NaN
        log_q, log_p = (x.masked_fill(impossible, 0.0) for x in (log_q, log_p))
        values = _sampled(log_q, log_p, estimator, gradient)
        if behaviour_logp is not None:
            (behaviour,) = valid_rows(mask, behaviour_logp.detach()[..., None])
            weight = (log_q.detach() - behaviour[..., 0].to(log_q.dtype)).exp()
            values = (values * weight).masked_fill(impossible, 0.0)
    else:
        log_q, log_p = upcast(*valid_rows(mask, student_logp, teacher_logp))
        if estimator == "topk":
            # A tail that rounding took away would make the value infinite; with the floor it stays a bound.
            floor = math.log(torch.finfo(log_p.dtype).eps)
            log_q, log_p = _with_tail(log_q), _with_tail(log_p)
            log_p = torch.cat((log_p[..., :-1], log_p[..., -1:].clamp_min(floor)), -1)
        values = ReverseKL().values(log_q, log_p)
    return reduce_rows(values, mask=mask, shape=shape, reduction=reduction, num_items=num_items)


def _sampled(log_q: Tensor, log_p: Tensor, estimator: str, gradient: str) -> Tensor:
    """Value of a single-sample estimator per token, [N], carrying the gradient asked for."""
    log_ratio = log_p - log_q
    if estimator == "k1":
        values = -log_ratio
    elif estimator == "k2":
        excluded = log_p == -INF  # the value is +inf; r·∇log q would be infinite as well
        values = 0.5 * log_ratio.masked_fill(excluded, 0.0).square().masked_fill(excluded, INF)
    else:
        values = torch.expm1(log_ratio) - log_ratio
    if gradient == "direct":
        return values
    # The value stands; the gradient is (log q − log p)·∇log q. A token that the teacher
    # excludes has no finite one.
    slope = (-log_ratio.detach()).masked_fill(log_p == -INF, 0.0)
    return values.detach() + slope * (log_q - log_q.detach())


def _with_tail(log_probs: Tensor) -> Tensor:
    """Append the log of the remaining mass, [N, k] → [N, k+1]; −inf, without a gradient, where nothing
    remains."""
    mass = torch.logsumexp(log_probs, -1, keepdim=True)
    nothing = mass >= 0
    tail = log1mexp(mass.masked_fill(nothing, -1.0)).masked_fill(nothing, -INF)
    return torch.cat((log_probs, tail), -1)
