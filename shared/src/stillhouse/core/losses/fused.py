"""Divergences over a language-model head that never hold the N×V logits.

The loss takes hidden states and the head's weight instead of logits. Rows go through in chunks: logits of
both sides, loss, gradient of the logits, and at once the gradients of hidden states, weight and bias; only
those are kept. The backward pass scales them. Peak memory is two chunks of logits and the gradients, whatever
the number of tokens.

When to use: with a large vocabulary, where the logits of both sides are what fills the memory; with few
classes the same losses on logits are simpler.

Legend: N rows that count, H width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._chunked_head import FusedLinear, Plan
from ._chunked_head import LinearHead as LinearHead
from ._closed_form import temperature_rows
from ._forms import Form, ForwardKL, JensenShannon, ReverseKL
from ._reduction import (
    Reduction,
    check_floating,
    check_mask,
    check_reduction,
    check_temperature,
    compute_dtype,
)
from .topk import Sampler, SparseTeacher, Tail, check_sparse

_CHUNK_BYTES = {"cpu": 32 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20  # few and large products on an accelerator


def fused_linear_kl(
    student: LinearHead,
    teacher: LinearHead | Tensor | SparseTeacher,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
    vocab: int | None = None,
    tail: Tail = "bucket",
    sampler: Sampler = "topk",
    chunk_bytes: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Forward or reverse KL over a language-model head, from hidden states, in chunks of rows.

    Equal to `forward_kl` or `reverse_kl` of the two heads' logits (`topk_kl` for a stored teacher),
    without ever holding them. Rows that do not count are dropped before the head.

    Args:
        student: hidden states [..., H], head [V, H] and the head's options. Gradients go to its hidden
            states, weight and bias, where they require one.
        teacher: the teacher's own hidden states and head (another H is fine), or logits [..., V], or a
            stored `SparseTeacher` (forward direction only). Detached.
        direction: "forward", KL(teacher ‖ student), or "reverse".
        temperature: T > 0, a number or a tensor [..., 1] without a gradient.
        labels: [...] token ids, already shifted (`causal_shift`): rows with `ignore_index` do not count.
        ignore_index: label of rows that do not count.
        mask: bool [...], True = the row counts; together with labels both must hold.
        weights: [...] weight of each row's value, ≥ 0; detached. "token_mean" still divides by the number
            of rows.
        reduction: "token_mean", "sum" or "batch_mean", see `forward_kl`; not "none".
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².
        vocab: compare the first `vocab` entries of both heads only, renormalised: for heads that are
            padded to different sizes. None: the sizes must be equal.
        tail: what becomes of a SparseTeacher's tail, see `topk_kl`.
        sampler: kind of SparseTeacher, see `topk_kl`.
        chunk_bytes: bound on the logits of both sides that exist at a time; None: 32 MiB on a CPU, 256 MiB on
            an accelerator.
        chunk_rows: rows per chunk; overrides chunk_bytes. Every chunk rewrites the V×H gradient of the
            head, so fewer rows than about H cost time, and more cost memory.

    Returns:
        A scalar; float32 (float64 for float64). Softmax and sums are in float32, row values are added up
        in float64, the head's gradient is accumulated in float32; the head's matrix products run in the
        dtype of the hidden states, or of autocast where that is on.

    Raises:
        TypeError, ValueError: arguments that do not fit each other; reduction "none".

    Relations:
        `fused_linear_jsd` is the same for the generalised JSD. The gradient is formed in the forward pass,
        so a second derivative is not available; use `forward_kl` on logits for that.

    Example:
        >>> import torch
        >>> from stillhouse.core.losses import forward_kl
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw = lambda *shape: torch.randn(*shape, generator=generator)
        >>> student = LinearHead(hidden=draw(2, 6, 8).requires_grad_(), weight=draw(50, 8).requires_grad_())
        >>> teacher = LinearHead(hidden=draw(2, 6, 16), weight=draw(50, 16), softcap=30.0)
        >>> loss = fused_linear_kl(student, teacher, temperature=2.0, chunk_rows=5)
        >>> loss.backward()
        >>> loss.allclose(forward_kl(student.logits(), teacher.logits(), temperature=2.0))
        True
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction!r} is unknown; allowed: 'forward', 'reverse'")
    return _fused(
        ForwardKL() if direction == "forward" else ReverseKL(),
        student,
        teacher,
        temperature=temperature,
        labels=labels,
        ignore_index=ignore_index,
        mask=mask,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        vocab=vocab,
        tail=tail,
        sampler=sampler,
        chunk_bytes=chunk_bytes,
        chunk_rows=chunk_rows,
    )


def fused_linear_jsd(
    student: LinearHead,
    teacher: LinearHead | Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
    scale_t2: bool = True,
    vocab: int | None = None,
    chunk_bytes: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence over a language-model head, in chunks of rows.

    Args:
        student: hidden states [..., H] and head [V, H].
        teacher: hidden states and head, or logits [..., V]; detached.
        beta: β in [0, 1], the teacher's weight; 0 is forward and 1 reverse KL, see `generalized_jsd`.
        temperature: T > 0, a number or a tensor [..., 1] without a gradient.
        labels: [...] token ids, already shifted: rows with `ignore_index` do not count.
        ignore_index: label of rows that do not count.
        mask: bool [...], True = the row counts.
        weights: [...] weight of each row's value.
        reduction: "token_mean", "sum" or "batch_mean"; not "none".
        num_items: count that replaces the local one in "token_mean".
        scale_t2: multiply by T².
        vocab: compare the first `vocab` entries of both heads only.
        chunk_bytes: bound on the logits that exist at a time, see `fused_linear_kl`.
        chunk_rows: rows per chunk; overrides chunk_bytes.

    Returns:
        A scalar, as `fused_linear_kl`.

    Raises:
        ValueError: beta outside [0, 1]; otherwise as `fused_linear_kl`.

    Relations:
        Equal to `generalized_jsd` of the two heads' logits.

    Example:
        >>> import torch
        >>> from stillhouse.core.losses import generalized_jsd
        >>> student = LinearHead(hidden=torch.ones(4, 2), weight=torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> teacher = torch.tensor([[0.0, 1.0]]).expand(4, 2)
        >>> loss = fused_linear_jsd(student, teacher, beta=0.3)
        >>> loss.allclose(generalized_jsd(student.logits(), teacher, beta=0.3))
        True
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} must lie in [0, 1]")
    return _fused(
        ForwardKL() if beta == 0.0 else ReverseKL() if beta == 1.0 else JensenShannon(beta),
        student,
        teacher,
        temperature=temperature,
        labels=labels,
        ignore_index=ignore_index,
        mask=mask,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
        scale_t2=scale_t2,
        vocab=vocab,
        tail="bucket",
        sampler="topk",
        chunk_bytes=chunk_bytes,
        chunk_rows=chunk_rows,
    )


def _fused(
    form: Form,
    student: LinearHead,
    teacher: LinearHead | Tensor | SparseTeacher,
    *,
    temperature: float | Tensor,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    weights: Tensor | None,
    reduction: Reduction,
    num_items: int | Tensor | None,
    scale_t2: bool,
    vocab: int | None,
    tail: Tail,
    sampler: Sampler,
    chunk_bytes: int | None,
    chunk_rows: int | None,
) -> Tensor:
    if not isinstance(student, LinearHead):
        raise TypeError(f"student must be a LinearHead, got {type(student).__name__}")
    shape = student.hidden.shape[:-1]
    size = _check(student, teacher, shape, vocab, weights, temperature)
    check_reduction(reduction, num_items)
    if reduction == "none":
        raise ValueError(
            "reduction='none' is not possible: the gradient is formed in the forward pass and must know each "
            "row's weight there; pass weights with reduction='sum', or use the loss on logits"
        )
    if isinstance(teacher, SparseTeacher):
        if not isinstance(form, ForwardKL):
            raise ValueError("a SparseTeacher gives the forward direction only; others need the full teacher")
        if isinstance(temperature, Tensor):
            raise ValueError("a SparseTeacher needs one temperature, a number that it stores")
        check_sparse(teacher, size, tail=tail, sampler=sampler, temperature=temperature)
    mask = _merge_masks(mask, labels, ignore_index, shape)

    keep = None if mask is None else mask.reshape(-1).nonzero()[:, 0]
    hidden = student.hidden.reshape(-1, student.hidden.shape[-1])
    hidden = hidden if keep is None else hidden[keep]
    count, dtype = hidden.shape[0], compute_dtype(hidden)
    t = temperature_rows(temperature, mask, shape)
    factor = torch.ones(count, dtype=dtype, device=hidden.device)
    if weights is not None:
        flat = weights.detach().reshape(-1).to(dtype)
        factor = flat if keep is None else flat[keep]
    if scale_t2:
        factor = factor * (t.to(dtype).squeeze(-1) ** 2 if isinstance(t, Tensor) else t * t)
    factor = factor / _divisor(reduction, num_items, count, shape, factor)
    for name, value in (("chunk_rows", chunk_rows), ("chunk_bytes", chunk_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES_ELSEWHERE)
    if chunk_rows is None:
        chunk_rows = max(1, chunk_bytes // (2 * size * dtype.itemsize))
    plan = Plan(
        form=form,
        teacher=_teacher_rows(teacher, mask),
        keep=keep,
        temperature=t.to(dtype) if isinstance(t, Tensor) else t,
        factor=factor,
        vocab=size,
        logit_scale=student.logit_scale,
        softcap=student.softcap,
        tail=tail,
        distinct=sampler == "topk",
        rows=chunk_rows,
        product=_product_dtype(hidden),
        differentiate=torch.is_grad_enabled(),
    )
    result: Tensor = FusedLinear.apply(hidden, student.weight, student.bias, plan)
    return result


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the head's matrix products: that of the hidden states, or of autocast."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _check(
    student: LinearHead,
    teacher: LinearHead | Tensor | SparseTeacher,
    shape: torch.Size,
    vocab: int | None,
    weights: Tensor | None,
    temperature: float | Tensor,
) -> int:
    """Check the arguments against each other and return the number of vocabulary entries that are
    compared."""
    if not isinstance(student, LinearHead):
        raise TypeError(f"student must be a LinearHead, got {type(student).__name__}")
    if isinstance(teacher, LinearHead):
        leading, size = teacher.hidden.shape[:-1], teacher.weight.shape[0]
    elif isinstance(teacher, SparseTeacher):
        leading, size = teacher.ids.shape[:-1], teacher.vocab
    else:
        check_floating("teacher", teacher)
        leading, size = teacher.shape[:-1], teacher.shape[-1]
    if leading != shape:
        raise ValueError(
            f"the teacher has rows {list(leading)}, the student {list(shape)}; they must be equal"
        )
    own = student.weight.shape[0]
    if vocab is None and own != size:
        raise ValueError(
            f"the student's head has {own} entries and the teacher's {size}; name the shared real vocabulary "
            "with vocab=..., and both are cut to it"
        )
    if vocab is not None and not 1 <= vocab <= min(own, size):
        raise ValueError(f"vocab={vocab} must lie in [1, {min(own, size)}], the smaller of the two heads")
    if weights is not None and weights.shape != shape:
        raise ValueError(f"weights have shape {list(weights.shape)}; they must be {list(shape)}")
    check_temperature(temperature, shape)
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError(
            "the fused losses give temperature no gradient; use the loss on logits, or detach it"
        )
    return vocab if vocab is not None else own


def _merge_masks(
    mask: Tensor | None, labels: Tensor | None, ignore_index: int, shape: torch.Size
) -> Tensor | None:
    check_mask(mask, shape)
    if labels is None:
        return mask
    if labels.shape != shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}; they must be {list(shape)}, after the shift"
        )
    counted = labels != ignore_index
    return counted if mask is None else counted & mask


def _teacher_rows(
    teacher: LinearHead | Tensor | SparseTeacher, mask: Tensor | None
) -> LinearHead | Tensor | SparseTeacher:
    """Detach the teacher and keep the rows that count; logits are only flattened, to avoid a copy of
    them."""
    if isinstance(teacher, SparseTeacher):
        return teacher.rows(mask)
    if isinstance(teacher, Tensor):
        return teacher.detach().reshape(-1, teacher.shape[-1])
    hidden = teacher.hidden.detach()
    return LinearHead(
        hidden=hidden.reshape(-1, hidden.shape[-1]) if mask is None else hidden[mask],
        weight=teacher.weight.detach(),
        bias=None if teacher.bias is None else teacher.bias.detach(),
        logit_scale=teacher.logit_scale,
        softcap=teacher.softcap,
    )


def _divisor(
    reduction: str, num_items: int | Tensor | None, count: int, shape: torch.Size, like: Tensor
) -> int | Tensor:
    """Return what the sum over the rows is divided by."""
    if reduction == "sum":
        return 1
    if reduction == "batch_mean":
        return max(shape[0], 1)
    if isinstance(num_items, Tensor):
        return num_items.to(like).reshape(()).clamp_min(1)
    return max(count if num_items is None else num_items, 1)
