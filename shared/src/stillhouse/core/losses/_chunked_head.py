"""The chunk loop of the fused losses: logits, values and gradients of a few rows at a time.

Legend: N rows that count, H width of the hidden states, V compared vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._closed_form import block_of, refuse_second_derivative, row_blocks, tempered_log_softmax
from ._forms import Form
from ._reduction import check_floating, compute_dtype
from .topk import SparseTeacher, Tail, gather_gradient, gather_log_softmax, sparse_divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearHead:
    """Hidden states and the linear head that would turn them into logits.

    logits = cap(logit_scale·(hidden·weightᵀ + bias)), with cap(x) = softcap·tanh(x/softcap), or x where there
    is no softcap.

    Args:
        hidden: [..., H].
        weight: [V, H], of the same dtype.
        bias: [V] or None.
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: bound of the logits (Gemma 2), > 0, or None.

    Raises:
        TypeError: not floating-point, or dtypes differ.
        ValueError: shapes do not fit, softcap ≤ 0.

    Example:
        >>> import torch
        >>> head = LinearHead(hidden=torch.ones(2, 5, 3), weight=torch.eye(3)[:2], softcap=0.5)
        >>> head.logits().shape, round(head.logits().max().item(), 3)
        (torch.Size([2, 5, 2]), 0.482)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_floating("hidden", self.hidden)
        check_floating("weight", self.weight)
        if self.hidden.dtype != self.weight.dtype:
            raise TypeError(f"hidden is {self.hidden.dtype} but weight {self.weight.dtype}; cast one of them")
        if self.weight.dim() != 2 or self.hidden.dim() < 2 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden has shape {list(self.hidden.shape)} and weight {list(self.weight.shape)}; they must "
                "be [..., H] and [V, H]"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias has shape {list(self.bias.shape)}; it must be [{self.weight.shape[0]}]")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be > 0, or None for none")

    def logits(self) -> Tensor:
        """Return the full logits [..., V]; what the fused losses avoid."""
        raw = F.linear(self.hidden, self.weight, self.bias)
        scaled = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the chunk loop needs beside the student's tensors."""

    form: Form
    teacher: LinearHead | Tensor | SparseTeacher  # a tensor: all rows, others: rows that count
    keep: Tensor | None  # [N] indices of the rows of a teacher tensor that count, None = all
    temperature: float | Tensor  # number or [N, 1]
    factor: Tensor  # [N] weight of each row's value in the loss
    vocab: int
    logit_scale: float
    softcap: float | None
    tail: Tail
    distinct: bool
    rows: int  # C
    product: torch.dtype  # of the head's matrix products
    differentiate: bool


class _Logits:
    """Logits of one head by chunks of rows, in a buffer that is written over and over."""

    def __init__(self, head: LinearHead, vocab: int, rows: int, dtype: torch.dtype, product: torch.dtype):
        self.hidden = head.hidden.to(product)
        self.weight = head.weight[:vocab].to(product)
        self.bias = None if head.bias is None else head.bias[:vocab].to(dtype)
        self.scale, self.cap = head.logit_scale, head.softcap
        self.buffer = self.hidden.new_empty(min(rows, self.hidden.shape[0]), vocab, dtype=dtype)

    def __call__(self, chunk: slice) -> Tensor:
        hidden = self.hidden[chunk]
        z = self.buffer[: hidden.shape[0]]
        if z.dtype == hidden.dtype:
            torch.mm(hidden, self.weight.T, out=z)
        else:
            z.copy_(hidden @ self.weight.T)
        if self.bias is not None:
            z.add_(self.bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.cap is not None:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z


_Grads = list[Tensor | None]  # by hidden [N, H], by weight [V, H], by bias [V]


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, wanted: tuple[bool, ...]
) -> tuple[Tensor, _Grads]:
    """Go through all rows once; return Σ_n factor_n·value_n in float64 and the gradients that are wanted."""
    device, dtype = hidden.device, compute_dtype(hidden)
    head = LinearHead(
        hidden=hidden, weight=weight, bias=bias, logit_scale=plan.logit_scale, softcap=plan.softcap
    )
    student = _Logits(head, plan.vocab, plan.rows, dtype, plan.product)
    # MPS has no float64
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    by_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
    by_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
    by_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if wanted[2] else None
    for chunk, teacher in _teacher_chunks(plan, hidden.shape[0], dtype):
        z = student(chunk)
        evaluate = _to_gradient if any(wanted) else _values
        values = evaluate(z, teacher, plan, chunk)
        factor = plan.factor[chunk]
        total += (factor * values).masked_fill(factor == 0, 0.0).sum(dtype=total.dtype)
        slope = z.to(plan.product)
        if by_hidden is not None:
            by_hidden[chunk] = slope @ student.weight
        if by_weight is not None:
            part = by_weight[: plan.vocab]
            if plan.product == dtype:
                part.addmm_(slope.T, student.hidden[chunk])
            else:  # the sum over chunks stays in float32
                part.add_(slope.T @ student.hidden[chunk])
        if by_bias is not None:
            by_bias[: plan.vocab] += z.sum(0)
    return total, [by_hidden, by_weight, by_bias]


class FusedLinear(torch.autograd.Function):
    """Σ_n factor_n·value_n; its gradients in hidden, weight and bias are made in the forward pass.

    The backward pass scales them in place and gives them away, so that the V×H gradient exists once. Should a
    second backward pass come (retain_graph=True), the rows are gone through again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        wanted = tuple(plan.differentiate and w for w in ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            total, ctx.grads = _run(hidden, weight, bias, plan, wanted)
        dense = plan.teacher if isinstance(plan.teacher, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, dense)  # released with the graph, unlike an attribute
        ctx.plan = plan if dense is None else replace(plan, teacher=dense.new_empty(0))
        return total.to(compute_dtype(hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *inputs, dense = ctx.saved_tensors
        own: _Grads | None = ctx.grads
        ctx.grads = None
        if own is None:
            hidden, weight, bias = inputs
            plan = ctx.plan if dense is None else replace(ctx.plan, teacher=dense)
            with torch.autocast(hidden.device.type, enabled=False):
                _, own = _run(hidden, weight, bias, plan, ctx.needs_input_grad[:3])
        scaled = (
            None if g is None else g.mul_(grads[0]).to(x.dtype) for g, x in zip(own, inputs, strict=True)
        )
        return *scaled, None


_Sparse = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _teacher_chunks(plan: Plan, count: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor | _Sparse]]:
    """Yield each chunk of rows with the teacher's logits [C, V], or (ids, log p_S, log p_tail, weights)."""
    source = plan.teacher
    compute: _Logits | None = None
    if isinstance(source, LinearHead):
        own = torch.float64 if source.hidden.dtype == torch.float64 else plan.product
        compute = _Logits(source, plan.vocab, plan.rows, dtype, own)
    elif isinstance(source, SparseTeacher):
        signal, (log_p, tail) = source, source.log_probs(plan.temperature)  # type: ignore[arg-type]
    for start in range(0, count, plan.rows):
        chunk = slice(start, min(start + plan.rows, count))
        if compute is not None:
            yield chunk, compute(chunk)
        elif isinstance(source, Tensor):
            rows = source[chunk] if plan.keep is None else source[plan.keep[chunk]]
            yield chunk, rows[:, : plan.vocab]
        else:
            weights = None if signal.weights is None else signal.weights[chunk].to(dtype)
            yield chunk, (signal.ids[chunk].long(), log_p[chunk].to(dtype), tail[chunk].to(dtype), weights)


def _blocks(z: Tensor, chunk: slice, plan: Plan) -> Iterator[tuple[slice, float | Tensor]]:
    for block in row_blocks(z):
        yield block, block_of(plan.temperature, slice(chunk.start + block.start, chunk.start + block.stop))


def _values(z: Tensor, teacher: Tensor | _Sparse, plan: Plan, chunk: slice) -> Tensor:
    """Return the values [C] of one chunk of student logits z [C, V]."""
    values = z.new_empty(z.shape[0])
    for block, t in _blocks(z, chunk, plan):
        if isinstance(teacher, Tensor):
            log_q = tempered_log_softmax(z[block], t, z.dtype)
            values[block] = plan.form.values(log_q, tempered_log_softmax(teacher[block], t, z.dtype))
        else:
            ids, log_p, tail, weights = _cut(teacher, block)
            log_q, log_q_tail, _, _ = gather_log_softmax(z[block] / t, ids, plan.distinct)
            values[block] = sparse_divergence(log_q, log_q_tail, log_p, tail, weights, plan.tail)
    return values


def _to_gradient(z: Tensor, teacher: Tensor | _Sparse, plan: Plan, chunk: slice) -> Tensor:
    """Return the values [C]; overwrite the logits z [C, V] with the gradient in the head's raw output."""
    values = z.new_empty(z.shape[0])
    factor = plan.factor[chunk, None]
    for block, t in _blocks(z, chunk, plan):
        part = z[block]
        if isinstance(teacher, Tensor):
            log_q = tempered_log_softmax(part, t, z.dtype)
            log_p = tempered_log_softmax(teacher[block], t, z.dtype)
            values[block], slope = plan.form.closed(log_q, log_p)
        else:
            values[block], slope = _sparse_gradient(part / t, _cut(teacher, block), plan)
        slope = slope * (factor[block] * plan.logit_scale / t)
        if plan.softcap is not None:
            slope *= 1 - (part / plan.softcap) ** 2
        part.copy_(slope)
    return values


def _cut(teacher: _Sparse, block: slice) -> _Sparse:
    ids, log_p, tail, weights = teacher
    return ids[block], log_p[block], tail[block], None if weights is None else weights[block]


def _sparse_gradient(u: Tensor, teacher: _Sparse, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return values [R] and ∂/∂u [R, V] against a sparse teacher; autograd sees tensors of k columns only."""
    ids, log_p, tail, weights = teacher
    log_q, log_q_tail, lse, lse_tail = gather_log_softmax(u, ids, plan.distinct)
    with torch.enable_grad():
        leaves = (log_q.requires_grad_(), log_q_tail.requires_grad_())
        values = sparse_divergence(*leaves, log_p, tail, weights, plan.tail)
        by_kept, by_tail = torch.autograd.grad(
            values.sum(), leaves, allow_unused=True, materialize_grads=True
        )
    return values.detach(), gather_gradient(u, ids, lse, lse_tail, by_kept, by_tail, plan.distinct)
