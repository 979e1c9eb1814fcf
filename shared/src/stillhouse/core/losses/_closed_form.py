"""How a divergence of logits is computed: argument checks, temperature, blocks of rows, closed-form backward.

Legend: N rows that count, V classes; T a number or [N, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._forms import Form
from ._reduction import (
    Reduction,
    check_mask,
    check_pair,
    check_reduction,
    check_temperature,
    compute_dtype,
    reduce_rows,
    upcast,
    valid_rows,
)

_BLOCK_ELEMENTS = {"cpu": 1 << 18}  # about a core's cache
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 25  # few kernel launches on an accelerator


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Yield slices that cut rows [N, V] into blocks of a size that suits their device."""
    elements = _BLOCK_ELEMENTS.get(rows.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // max(rows.shape[-1], 1))
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def tempered_log_softmax(logits: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Return log softmax(logits/T) over the last dimension, computed in `dtype`."""
    logits = logits.to(dtype)
    if isinstance(temperature, Tensor):
        logits = logits / temperature.to(dtype)
    elif temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, -1)


def block_of(temperature: float | Tensor, block: slice) -> float | Tensor:
    """Return the temperatures of one block of rows; a number stays a number."""
    return temperature[block] if isinstance(temperature, Tensor) else temperature


def refuse_second_derivative() -> None:
    """Raise in a backward pass with create_graph=True: a missing term must not pass for a zero one."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss has no second derivative (create_graph=True): its gradient is not kept as a function; "
            "use forward_kl, reverse_kl or generalized_jsd on logits"
        )


class _ClosedForm(torch.autograd.Function):
    """Values of a divergence per row, with its closed-form gradient in the student's logits."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, temperature: float | Tensor, form: Form) -> Tensor:
        dtype = compute_dtype(student, teacher)
        values = torch.empty(student.shape[0], dtype=dtype, device=student.device)
        for block in row_blocks(student):
            t = block_of(temperature, block)
            log_q = tempered_log_softmax(student[block], t, dtype)
            values[block] = form.values(log_q, tempered_log_softmax(teacher[block], t, dtype))
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        student, teacher, temperature, form = inputs
        tempered = (temperature,) if isinstance(temperature, Tensor) else ()
        ctx.save_for_backward(student, teacher, *tempered)
        ctx.number, ctx.form, ctx.dtype = temperature, form, output.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        student, teacher, *tempered = ctx.saved_tensors
        temperature = tempered[0] if tempered else ctx.number

        def gradient(rows: slice) -> Tensor:
            t = block_of(temperature, rows)
            log_q = tempered_log_softmax(student[rows], t, ctx.dtype)
            _, by_u = ctx.form.closed(log_q, tempered_log_softmax(teacher[rows], t, ctx.dtype))
            return (by_u * (grads[0][rows, None] / t)).to(student.dtype)

        if torch.is_grad_enabled():  # create_graph=True: the formula itself is differentiated again
            return gradient(slice(None)), None, None, None
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        for block in row_blocks(student):
            result[block] = gradient(block)
        return result, None, None, None


def divergence_rows(
    form: Form, student: Tensor, teacher: Tensor, temperature: float | Tensor, log_input: bool = False
) -> Tensor:
    """Return the values [N] of `form` for rows [N, V], without the factor T²; T a number or [N, 1]."""
    if log_input:
        log_q, log_p = upcast(student, teacher.detach())
        return form.values(log_q, log_p)
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        dtype = compute_dtype(student, teacher)
        log_p = tempered_log_softmax(teacher.detach(), temperature, dtype)
        return form.values(tempered_log_softmax(student, temperature, dtype), log_p)
    values: Tensor = _ClosedForm.apply(student, teacher.detach(), temperature, form)
    return values


def temperature_rows(temperature: float | Tensor, mask: Tensor | None, shape: torch.Size) -> float | Tensor:
    """Return T as a number, or as one value per valid row, [N, 1]."""
    if not isinstance(temperature, Tensor):
        return float(temperature)
    full = temperature.reshape(()) if temperature.numel() == 1 else temperature
    return valid_rows(mask, full.expand(*shape, 1))[0]


def divergence_of_logits(
    form: Form,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    reduction: Reduction,
    num_items: int | Tensor | None,
    scale_t2: bool,
    log_input: bool,
) -> Tensor:
    """Check the arguments of a public divergence, compute `form` per row and reduce; see `forward_kl`."""
    check_pair(student, teacher)
    shape = student.shape[:-1]
    check_mask(mask, shape)
    check_reduction(reduction, num_items)
    check_temperature(temperature, shape)
    if log_input and (isinstance(temperature, Tensor) or temperature != 1.0):
        raise ValueError(
            "log_input=True takes log-probabilities as they are and needs temperature=1; to temper them pass "
            "them as logits (log_input=False): softmax(log p / T) is the tempered distribution"
        )
    student_rows, teacher_rows = valid_rows(mask, student, teacher)
    t = temperature_rows(temperature, mask, shape)
    values = divergence_rows(form, student_rows, teacher_rows, t, log_input)
    if scale_t2:
        values = values * (t.to(values.dtype).squeeze(-1) ** 2 if isinstance(t, Tensor) else t * t)
    return reduce_rows(values, mask=mask, shape=shape, reduction=reduction, num_items=num_items)
