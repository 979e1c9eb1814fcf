"""Distillation from a teacher stored as a few tokens per row instead of the whole vocabulary.

A `SparseTeacher` holds k ids with their *raw* logits and the logsumexp over the full vocabulary at each
temperature that will be used. From these the probability of every kept token and the mass of all the
others, the tail, are exact at those temperatures. Log-probabilities alone give that at T = 1 only.

When to use: with a stored language-model teacher, whose full logits (V of 10⁵) do not fit on disk; with the
full logits at hand `divergence.forward_kl` is exact.

Legend: N rows that count, V vocabulary, k kept tokens; S the kept ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._closed_form import refuse_second_derivative, row_blocks
from ._forms import INF, expect, safe_logsumexp
from ._reduction import (
    Reduction,
    check_floating,
    check_mask,
    check_reduction,
    check_temperature,
    compute_dtype,
    reduce_rows,
    valid_rows,
)

Tail = Literal["bucket", "renormalize", "renormalize_teacher", "truncate"]
Sampler = Literal["topk", "importance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTeacher:
    """A teacher's distribution over V tokens, known on k of them per row.

    Args:
        ids: [..., k] integers in [0, V): the kept tokens. Distinct within a row for top-k signals; drawn
            with replacement for sampled ones.
        logits: [..., k] their raw logits (untempered), any floating dtype; log-probabilities at T = 1 when
            `log_values`.
        lse: [..., n_T] logsumexp of all V raw logits divided by T, one column per entry of `temperatures`.
            Not needed, and not looked at, with `log_values`.
        temperatures: the n_T temperatures of `lse`.
        vocab: V, the size of the vocabulary the teacher was normalised over.
        log_values: `logits` are log-probabilities; every temperature but 1 is refused then, unless k = V.
        weights: [..., k] importance weights of sampled tokens, with E[Σ_i w_i·f(id_i)] = Σ_v p_v·f(v);
            None for top-k signals.
        weights_temperature: temperature of the p that the weights estimate.

    Raises:
        TypeError, ValueError: inconsistent shapes or dtypes, ids out of range are *not* looked for here
            (that would read the data); `topk_kl` does it on CPU tensors.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 1.0, 0.0, 2.0]])
        >>> teacher = SparseTeacher.from_logits(logits, k=2, temperatures=(1.0, 2.0))
        >>> teacher.ids.tolist(), teacher.logits.tolist()
        ([[0, 3]], [[3.0, 2.0]])
        >>> log_p, log_tail = teacher.log_probs(2.0)
        >>> (log_p.exp().sum(-1) + log_tail.exp()).allclose(torch.ones(1))
        True
    """

    ids: Tensor
    logits: Tensor
    lse: Tensor | None
    temperatures: tuple[float, ...] = (1.0,)
    vocab: int
    log_values: bool = False
    weights: Tensor | None = None
    weights_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_floating("logits", self.logits)
        if self.ids.is_floating_point() or self.ids.dtype == torch.bool:
            raise TypeError(f"ids must hold integers, got {self.ids.dtype}")
        if self.ids.dim() == 0 or self.ids.shape != self.logits.shape:
            raise ValueError(
                f"ids have shape {list(self.ids.shape)} and logits {list(self.logits.shape)}; both must be "
                "[..., k]"
            )
        if self.weights is None and not 0 < self.ids.shape[-1] <= self.vocab:
            raise ValueError(f"k={self.ids.shape[-1]} must lie in [1, vocab={self.vocab}]")
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise ValueError(
                f"weights have shape {list(self.weights.shape)}; they must be {list(self.ids.shape)} like ids"
            )
        if self.log_values:
            return
        if self.lse is None:
            raise ValueError(
                "lse is None: raw logits need the logsumexp over the full vocabulary at each temperature; "
                "with log-probabilities set log_values=True"
            )
        if self.lse.shape != (*self.ids.shape[:-1], len(self.temperatures)):
            raise ValueError(
                f"lse has shape {list(self.lse.shape)}; {len(self.temperatures)} temperature(s) need "
                f"{[*self.ids.shape[:-1], len(self.temperatures)]}"
            )

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        k: int,
        temperatures: Sequence[float] = (1.0,),
        dtype: torch.dtype | None = None,
    ) -> SparseTeacher:
        """Keep the k largest logits of each row.

        Args:
            logits: [..., V] raw teacher logits.
            k: number of tokens to keep, 1 ≤ k ≤ V.
            temperatures: those at which the signal will be used.
            dtype: dtype of the stored logits (for example torch.float16); None keeps that of the input.
                `lse` is always float32 (float64 for float64).

        Returns:
            The signal, detached.
        """
        check_floating("logits", logits)
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k={k} must lie in [1, V={logits.shape[-1]}]")
        logits = logits.detach()
        values, ids = logits.topk(k, dim=-1)
        return cls(
            ids=ids,
            logits=values if dtype is None else values.to(dtype),
            lse=_logsumexps(logits, temperatures),
            temperatures=tuple(float(t) for t in temperatures),
            vocab=logits.shape[-1],
        )

    @classmethod
    def sample(
        cls,
        logits: Tensor,
        *,
        draws: int,
        temperature: float = 1.0,
        proposal_temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> SparseTeacher:
        """Draw tokens from the teacher instead of keeping the largest: an unbiased sparse teacher.

        `draws` tokens are drawn with replacement from softmax(logits/proposal_temperature), each with the
        weight p/(draws·proposal). Unlike any top-k signal, Σ_i w_i·f(id_i) is an unbiased estimate of Σ_v
        p_v·f(v).

        Args:
            logits: [..., V] raw teacher logits.
            draws: number k of draws per row.
            temperature: T of the p that is estimated.
            proposal_temperature: temperature of the distribution drawn from; None: T itself, and all
                weights are 1/draws.
            generator: source of randomness.

        Returns:
            The signal, with `weights`, for `topk_kl(..., sampler="importance", temperature=temperature)`.
        """
        check_floating("logits", logits)
        if draws < 1:
            raise ValueError(f"draws={draws} must be at least 1")
        check_temperature(temperature, logits.shape[:-1])
        if proposal_temperature is not None:
            check_temperature(proposal_temperature, logits.shape[:-1])
        logits = logits.detach()
        rows = logits.reshape(-1, logits.shape[-1]).to(compute_dtype(logits))
        proposal = torch.log_softmax(rows / (proposal_temperature or temperature), -1)
        ids = torch.multinomial(proposal.exp(), draws, replacement=True, generator=generator)
        log_p = torch.log_softmax(rows / temperature, -1).gather(-1, ids)
        weights = (log_p - proposal.gather(-1, ids)).exp() / draws
        shape = (*logits.shape[:-1], draws)
        return cls(
            ids=ids.reshape(shape),
            logits=logits.gather(-1, ids.reshape(shape)),
            lse=_logsumexps(logits, (temperature,)),
            temperatures=(float(temperature),),
            vocab=logits.shape[-1],
            weights=weights.reshape(shape),
            weights_temperature=float(temperature),
        )

    def rows(self, mask: Tensor | None) -> SparseTeacher:
        """Return the signal of the rows that count, with leading shape [N]."""
        ids, logits = valid_rows(mask, self.ids, self.logits)
        lse = None if self.lse is None else valid_rows(mask, self.lse)[0]
        weights = None if self.weights is None else valid_rows(mask, self.weights)[0]
        return replace(self, ids=ids, logits=logits, lse=lse, weights=weights)

    def log_probs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the kept tokens and of the tail at T.

        Args:
            temperature: one of `temperatures`; 1 for log-probabilities.

        Returns:
            log p [..., k] and log(1 − Σ_S p) [...]; −inf for an empty tail. Stored values that were
            rounded can sum to more than 1; they are scaled back to 1 then.

        Raises:
            ValueError: T is not stored, or T ≠ 1 for log-probabilities with k < V.
        """
        values = self.logits.to(compute_dtype(self.logits))
        complete = self.ids.shape[-1] == self.vocab and self.weights is None
        if self.log_values:
            if temperature != 1.0 and not complete:
                raise ValueError(
                    f"temperature={temperature} is impossible: the signal holds {self.ids.shape[-1]} of "
                    f"{self.vocab} log-probabilities, which fix the distribution at T=1 only. Store raw "
                    "logits and the logsumexp at that temperature"
                )
            log_p = values if temperature == 1.0 else torch.log_softmax(values / temperature, -1)
        else:
            if self.lse is None or temperature not in self.temperatures:
                raise ValueError(
                    f"temperature={temperature} is not stored; there are logsumexps for "
                    f"{', '.join(str(t) for t in self.temperatures)}"
                )
            lse = self.lse[..., self.temperatures.index(temperature), None]
            log_p = values / temperature - lse.to(values.dtype)
        if self.weights is not None:
            return log_p, log_p.new_full(log_p.shape[:-1], float("nan"))
        mass = torch.logsumexp(log_p, -1)
        log_p = log_p - mass.clamp_min(0.0)[..., None]
        tail = log1mexp(mass.clamp_max(0.0))
        return log_p, torch.full_like(tail, -INF) if complete else tail


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − e^x) for x ≤ 0, accurate at both ends; −inf at 0."""
    near = x > -0.6931471805599453
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _logsumexps(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    if not temperatures:
        raise ValueError("temperatures must name at least one temperature")
    for t in temperatures:
        check_temperature(t, logits.shape[:-1])
    wide = logits.to(compute_dtype(logits))
    return torch.stack([torch.logsumexp(wide / t, -1) for t in temperatures], -1)


def gather_log_softmax(u: Tensor, ids: Tensor, distinct: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of k entries and of all the others together.

    The tail is summed over the other entries themselves, not as 1 − Σ_S q, so it stays exact when S holds
    nearly all the mass.

    Args:
        u: [N, V] tempered logits.
        ids: [N, k] the entries.
        distinct: no id repeats within a row. False: there is no tail (−inf).

    Returns:
        log q_S [N, k], log q_tail [N], and for the gradient lse [N] and lse_tail [N]; without a graph.
    """
    kept = u.gather(-1, ids)
    if distinct:
        lse_tail = torch.logsumexp(u.scatter(-1, ids, -INF), -1)
        lse = torch.logaddexp(torch.logsumexp(kept, -1), lse_tail)
    else:
        lse = torch.logsumexp(u, -1)
        lse_tail = torch.full_like(lse, -INF)
    return kept - lse[:, None], lse_tail - lse, lse, lse_tail


def gather_gradient(
    u: Tensor, ids: Tensor, lse: Tensor, lse_tail: Tensor, by_kept: Tensor, by_tail: Tensor, distinct: bool
) -> Tensor:
    """Return ∂L/∂u [N, V] from g = ∂L/∂log q_S [N, k] and h = ∂L/∂log q_tail [N].

    ∂L/∂u_j = Σ_{i: id_i = j} g_i + [j ∉ S]·h·q_j/q_tail − q_j·(Σg + h); a row without a tail has h = 0.
    """
    by_tail = by_tail.masked_fill(lse_tail == -INF, 0.0)
    gradient = torch.exp(u - lse[:, None]) * -(by_kept.sum(-1) + by_tail)[:, None]
    if distinct:
        share = torch.exp(u.scatter(-1, ids, -INF) - lse_tail.masked_fill(lse_tail == -INF, 0.0)[:, None])
        gradient = gradient + share * by_tail[:, None]
    return gradient.scatter_add(-1, ids, by_kept)


class _GatherLogSoftmax(torch.autograd.Function):
    """`gather_log_softmax` of logits/T by blocks of rows; nothing of size N×V is kept for the backward
    pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype, distinct: bool
    ) -> tuple[Tensor, Tensor]:
        log_q = logits.new_empty(ids.shape, dtype=dtype)
        tail, lse, lse_tail = logits.new_empty(3, ids.shape[0], dtype=dtype)
        for block in row_blocks(logits):
            u = logits[block].to(dtype) / temperature
            log_q[block], tail[block], lse[block], lse_tail[block] = gather_log_softmax(
                u, ids[block], distinct
            )
        ctx.save_for_backward(logits, ids, lse, lse_tail)
        ctx.temperature, ctx.distinct = temperature, distinct
        return log_q, tail

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        logits, ids, *lses = ctx.saved_tensors
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for block in row_blocks(logits):
            u = logits[block].to(lses[0].dtype) / ctx.temperature
            lse, lse_tail, by_kept, by_tail = (x[block] for x in (*lses, *grads))
            gradient = gather_gradient(u, ids[block], lse, lse_tail, by_kept, by_tail, ctx.distinct)
            result[block] = (gradient / ctx.temperature).to(result.dtype)
        return result, None, None, None, None


def sparse_divergence(
    log_q: Tensor, log_q_tail: Tensor, log_p: Tensor, log_p_tail: Tensor, weights: Tensor | None, tail: Tail
) -> Tensor:
    """Return the value of each row, [N], from the log-probabilities of the kept tokens and of the tail.

    Args:
        log_q: [N, k] student.
        log_q_tail: [N] student.
        log_p: [N, k] teacher.
        log_p_tail: [N] teacher.
        weights: [N, k] importance weights, which replace p and leave out the tail; or None.
        tail: see `topk_kl`.
    """
    if weights is not None:
        return expect(weights, log_p, log_q)
    if tail in ("renormalize", "renormalize_teacher"):
        log_p = log_p - torch.logsumexp(log_p, -1, keepdim=True)
        if tail == "renormalize":
            mass = safe_logsumexp(log_q)
            log_q = log_q - mass.masked_fill(mass == -INF, 0.0)[:, None]
    values = expect(log_p.exp(), log_p, log_q)
    if tail == "bucket":
        values = values + expect(log_p_tail.exp()[:, None], log_p_tail[:, None], log_q_tail[:, None])
    return values


def topk_kl(
    student: Tensor,
    teacher: SparseTeacher,
    *,
    tail: Tail = "bucket",
    sampler: Sampler = "topk",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
) -> Tensor:
    """Forward KL to a teacher of which only k tokens per row are known.

    bucket:              T²·[Σ_S p (log p − log q) + p_tail (log p_tail − log q_tail)]
    renormalize:         T²·Σ_S p̂ (log p̂ − log q̂), both sides renormalised over S
    renormalize_teacher: T²·Σ_S p̂ (log p̂ − log q), the student over the full vocabulary
    truncate:            T²·Σ_S p (log p − log q)

    Args:
        student: logits [..., V].
        teacher: the stored signal with leading shape [...] and vocabulary V.
        tail: what becomes of the mass outside S. "bucket" (default) treats it as one more token: a KL of
            coarsened distributions, never negative and never above the full KL. "renormalize" is a KL on S
            alone and gives the tail no gradient; "renormalize_teacher" over-estimates and pushes all
            student mass onto S; "truncate" is not a divergence and can be negative.
        sampler: "topk", or "importance" for a signal of `SparseTeacher.sample`: Σ_i w_i (log p_i − log
            q_i), whose mean over the draws is the full KL, in value and gradient. `tail` must be left at
            "bucket" then and is not used.
        temperature: T, one of those the signal stores.
        mask: bool [...], True = the row counts.
        reduction: "none", "token_mean", "sum" or "batch_mean", see `forward_kl`.
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².

    Returns:
        A scalar, or [...] for "none".

    Raises:
        TypeError: teacher is not a SparseTeacher.
        ValueError: vocabularies or shapes differ, ids outside [0, V) (looked for on CPU tensors), T not
            stored, T ≠ 1 with log-probabilities of fewer than V tokens, a sampler that does not fit the
            signal, unknown tail.

    Source:
        The bucket: the data-processing inequality for the map that merges the tail into one symbol. The
        sampled teacher: Anshumann et al., "Sparse Logit Sampling", ACL 2025.

    Relations:
        `forward_kl` is the case k = V. `fused_linear_kl` takes the same signal without student logits.

    Example:
        >>> import torch
        >>> from stillhouse.core.losses import forward_kl
        >>> full, student = torch.tensor([[3.0, 1.0, 0.0, 2.0]]), torch.zeros(1, 4)
        >>> sparse = SparseTeacher.from_logits(full, k=2)
        >>> round(topk_kl(student, sparse).item(), 4), round(forward_kl(student, full).item(), 4)
        (0.4255, 0.4388)
    """
    check_floating("student", student)
    if not isinstance(teacher, SparseTeacher):
        raise TypeError(f"teacher must be a SparseTeacher, got {type(teacher).__name__}")
    if student.dim() == 0 or student.shape[:-1] != teacher.ids.shape[:-1]:
        raise ValueError(
            f"student has shape {list(student.shape)} but the teacher's ids {list(teacher.ids.shape)}; all "
            "but the last dimension must be equal"
        )
    check_sparse(teacher, student.shape[-1], tail=tail, sampler=sampler, temperature=temperature)
    shape = student.shape[:-1]
    check_mask(mask, shape)
    check_reduction(reduction, num_items)
    signal = teacher.rows(mask)
    log_p, log_p_tail = signal.log_probs(temperature)
    (rows,) = valid_rows(mask, student)
    dtype = compute_dtype(student, teacher.logits)
    log_q, log_q_tail = _GatherLogSoftmax.apply(
        rows, signal.ids.long(), float(temperature), dtype, signal.weights is None
    )
    weights = None if signal.weights is None else signal.weights.to(dtype)
    values = sparse_divergence(log_q, log_q_tail, log_p.to(dtype), log_p_tail.to(dtype), weights, tail)
    if scale_t2:
        values = values * (temperature * temperature)
    return reduce_rows(values, mask=mask, shape=shape, reduction=reduction, num_items=num_items)


def check_sparse(teacher: SparseTeacher, vocab: int, *, tail: str, sampler: str, temperature: float) -> None:
    """Raise ValueError unless the signal can be used with these options by a student of `vocab` tokens."""
    if tail not in get_args(Tail):
        raise ValueError(f"tail={tail!r} is unknown; allowed: {', '.join(get_args(Tail))}")
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler={sampler!r} is unknown; allowed: {', '.join(get_args(Sampler))}")
    if teacher.vocab != vocab:
        raise ValueError(
            f"the student has {vocab} tokens but the teacher's signal was normalised over {teacher.vocab}; "
            "cut both to the shared real vocabulary before the signal is made"
        )
    if (sampler == "importance") != (teacher.weights is not None):
        kind = "sampled tokens with weights" if teacher.weights is not None else "the top k tokens"
        raise ValueError(f"sampler={sampler!r} does not fit: the signal holds {kind}")
    if teacher.weights is not None and tail != "bucket":
        raise ValueError(f"tail={tail!r} has no meaning with sampled tokens; leave it at 'bucket'")
    if teacher.weights is not None and teacher.weights_temperature != temperature:
        raise ValueError(
            f"temperature={temperature}, but the tokens were sampled for {teacher.weights_temperature}"
        )
    if teacher.ids.device.type == "cpu" and teacher.ids.numel():
        low, high = int(teacher.ids.min()), int(teacher.ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"the teacher's ids {low}..{high} leave the vocabulary 0..{vocab - 1}")
