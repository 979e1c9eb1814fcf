"""What every loss of this package shares: argument checks, precision, masks and the four reductions.

A loss computes one value per *row* (a row is a sample, a token or a pixel), in float32 or float64, and
hands the values to `reduce`. Rows that the mask leaves out are best removed before anything is computed
(`valid_rows`): they cost nothing then, and whatever their padding holds, NaN included, cannot reach a
gradient.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "token_mean", "sum", "batch_mean"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype a loss computes in: float64 when any input is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating tensors to their common compute dtype (float32, or float64 when one of them is).

    The cast is explicit, so it holds under `torch.autocast` as well: element-wise operations, `exp`,
    `log_softmax` and sums keep the dtype of their input there. Matrix products do not; wrap them in
    `full_precision`.
    """
    dtype = compute_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def full_precision(device: torch.device | str) -> torch.autocast:
    """Return a context manager in which autocast is off on `device`, for matrix products inside a loss."""
    return torch.autocast(torch.device(device).type, enabled=False)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must hold floating-point values, got {tensor.dtype}")


def check_pair(student: Tensor, teacher: Tensor, *, min_dim: int = 1) -> None:
    """Raise unless student and teacher are floating tensors of one shape with a non-empty last dimension.

    Args:
        student: [..., D].
        teacher: [..., D].
        min_dim: fewest dimensions allowed.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes differ, too few dimensions, or D = 0.
    """
    check_floating("student", student)
    check_floating("teacher", teacher)
    if student.dim() < min_dim or student.shape[-1] == 0:
        raise ValueError(
            f"student has shape {list(student.shape)}; at least {min_dim} dimension(s) are needed, the last "
            "one not empty"
        )
    if student.shape != teacher.shape:
        hint = ""
        if student.shape[:-1] == teacher.shape[:-1]:
            hint = (
                ": the last dimensions differ; with padded language-model heads cut both to the shared real "
                "vocabulary before the loss"
            )
        raise ValueError(
            f"student has shape {list(student.shape)} but teacher has {list(teacher.shape)}; they must be "
            f"equal{hint}"
        )


def check_mask(mask: Tensor | None, shape: torch.Size) -> None:
    """Raise unless `mask` is None or a bool tensor of exactly `shape` (True = the row counts)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask must be a bool tensor (True = the row counts), got {got}; use e.g. `labels != -100`"
        )
    if mask.shape != shape:
        raise ValueError(f"mask has shape {list(mask.shape)} but there is one row per entry of {list(shape)}")


def check_reduction(reduction: str, num_items: int | Tensor | None = None) -> None:
    """Raise unless `reduction` is one of `REDUCTIONS` and `num_items` is used with token_mean only."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; allowed: {', '.join(REDUCTIONS)}")
    if num_items is not None and reduction != "token_mean":
        raise ValueError(
            f"num_items replaces the row count of reduction='token_mean'; it means nothing with {reduction!r}"
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must hold one number, got shape {list(num_items.shape)}")
    elif num_items is not None and num_items < 0:
        raise ValueError(f"num_items={num_items} must not be negative")


def check_temperature(temperature: float | Tensor, shape: torch.Size) -> None:
    """Raise unless the temperature is a positive number or a positive tensor [..., 1] that fits the rows.

    Args:
        temperature: number, one-element tensor, or tensor that broadcasts to shape + [1].
        shape: shape of the rows, that is of the logits without the last dimension.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            if temperature.dim() == 0 or temperature.shape[-1] != 1:
                raise ValueError(
                    f"a temperature tensor must have a last dimension of 1 (one value per row), got "
                    f"{list(temperature.shape)}; use temperature[..., None]"
                )
            try:
                fits = torch.broadcast_shapes(temperature.shape, (*shape, 1)) == torch.Size((*shape, 1))
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(
                    f"temperature has shape {list(temperature.shape)}, which does not fit rows {list(shape)}"
                )
        if not bool((temperature > 0).all()):
            raise ValueError("every temperature must be > 0")
    elif not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be a finite number > 0")


def valid_rows(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Flatten [..., D] tensors to rows and keep the valid ones.

    Args:
        mask: bool [...], True = keep; None keeps all.
        tensors: each [..., D] with the same leading shape.

    Returns:
        One tensor [N, D] per input, N = number of valid rows. No copy is made without a mask. With an
        empty mask the rows are [0, D] and still connected to the graph: sums over them are zero with zero
        gradients.
    """
    if mask is None:
        return tuple(t.reshape(-1, t.shape[-1]) for t in tensors)
    return tuple(t[mask] for t in tensors)


def scatter_rows(values: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Put values [N] of the valid rows back into `shape`, zeros where the mask is False."""
    if mask is None:
        return values.reshape(shape)
    return values.new_zeros(shape).masked_scatter(mask, values)


def reduce_rows(
    values: Tensor,
    *,
    mask: Tensor | None,
    shape: torch.Size,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Reduce the values of the *valid* rows, as `valid_rows` selected them.

    Args:
        values: [N], one value per valid row.
        mask: bool of `shape` that selected them, or None.
        shape: leading shape of the logits, [...].
        reduction: see `reduce`.
        num_items: see `reduce`.

    Returns:
        A scalar, or a tensor of `shape` for "none" (zero where masked).
    """
    check_reduction(reduction, num_items)
    if reduction == "none":
        return scatter_rows(values, mask, shape)
    total = values.sum()
    if reduction == "sum":
        return total
    if reduction == "batch_mean":
        return total / max(shape[0] if shape else 1, 1)
    if num_items is None:
        return total / max(values.numel(), 1)
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device).reshape(()).clamp_min(1)
    return total / max(num_items, 1)


def reduce(
    values: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "token_mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Reduce one value per row to the loss.

    Args:
        values: [...], float32 or float64.
        mask: bool [...], True = the row counts; None counts all.
        reduction: "none" returns the rows with zeros where masked; "token_mean" (default) divides the sum
            by the number of valid rows; "sum"; "batch_mean" divides the sum by the size of the *first*
            dimension, masked rows included (torch's "batchmean").
        num_items: with "token_mean", divide by this count instead of the local one: the number of valid
            rows of the whole update, over accumulation steps and ranks. The sum of the parts then equals
            the loss of the whole.

    Returns:
        A scalar, or [...] for "none". With no valid row it is zero and still connected to the graph.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: unknown reduction, mask of another shape, num_items without token_mean.

    Example:
        >>> import torch
        >>> values = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
        >>> mask = values < 9
        >>> reduce(values, mask=mask).item(), reduce(values, mask=mask, reduction="batch_mean").item()
        (2.0, 3.0)
        >>> reduce(values, mask=mask, num_items=12).item()
        0.5
    """
    check_mask(mask, values.shape)
    rows = values.reshape(-1) if mask is None else values[mask]
    return reduce_rows(rows, mask=mask, shape=values.shape, reduction=reduction, num_items=num_items)
