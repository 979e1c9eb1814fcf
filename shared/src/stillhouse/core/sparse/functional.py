"""Gather, sum and convolution over sparse rows, differentiable twice, with sums in a fixed order.

Legend of the shapes: N and M rows, P pairs, K kernel offsets, C input channels, D output channels.
Sums of half-precision rows run in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernel_map import Bags, KernelMap

_AT_ONCE = 2**20  # bytes of gathered rows that are worth one allocation
_MAPPED = (
    24 * 2**20
)  # bytes above which the C library maps fresh pages for every tensor, which then cost the most


def _sum(rows: Tensor, bags: Bags) -> Tensor:
    """Sum of the rows of each bag: [P, C] → [n, C]; 0 for an empty bag."""
    if not len(bags.order):
        return rows.new_zeros(len(bags.offsets) - 1, rows.shape[1])
    half = rows.dtype in (torch.float16, torch.bfloat16)
    source = rows.float() if half else rows
    total = torch.embedding_bag(source, bags.order, bags.offsets, mode=0, include_last_offset=True)[0]
    return total.to(rows.dtype) if half else total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, bags: Bags) -> Tensor:
        ctx.index, ctx.bags = index, bags
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Sum.apply(grads[0], ctx.index, ctx.bags), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, bags: Bags) -> Tensor:
        ctx.index, ctx.bags = index, bags
        return _sum(rows, bags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Gather.apply(grads[0], ctx.index, ctx.bags), None, None


def gather_rows(rows: Tensor, index: Tensor, bags: Bags | None = None) -> Tensor:
    """`rows[index]`, whose gradient is summed in a fixed order.

    Args:
        rows: [M, C].
        index: int64 [N] in [0, M).
        bags: `Bags.of(index, M)`, where it is at hand.

    Returns:
        [N, C].
    """
    if bags is None:
        bags = Bags.of(index, len(rows))
    return _Gather.apply(rows, index, bags)


def sum_rows(rows: Tensor, index: Tensor, bags: Bags) -> Tensor:
    """Sum of the rows that go to each destination: [N, C] → [M, C], with `bags = Bags.of(index, M)`."""
    return _Sum.apply(rows, index, bags)


def _gathered(rows: Tensor, index: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """`rows[index]` in parts of `counts` rows: all at once if that is small, else through one small buffer.

    A part is valid until the next one is taken. Fresh memory for all pairs would cost more than the products.
    """
    if len(index) * rows.shape[1] * rows.element_size() <= _AT_ONCE:
        yield from rows.index_select(0, index).split(counts)
        return
    buffer = rows.new_empty(max(counts), rows.shape[1])
    for part in index.split(counts):
        yield torch.index_select(rows, 0, part, out=buffer[: len(part)])


def _ends(kernel_map: KernelMap, transposed: bool) -> tuple[Tensor, Tensor]:
    """Where the pairs come from and where they go."""
    ends = kernel_map.inputs, kernel_map.outputs
    return ends[::-1] if transposed else ends


def _product(x: Tensor, weight: Tensor, kernel_map: KernelMap, transposed: bool) -> Tensor:
    """The convolution: `x` [N, C], `weight` [K, C, D] → [M, D]."""
    source, target = _ends(kernel_map, transposed)
    pairs, centre = kernel_map.pairs, kernel_map.centre
    weights = weight.unbind(0)
    counts = [count for _, count in kernel_map.segments]
    parts = zip(kernel_map.segments, _gathered(x, source, counts), target.split(counts), strict=True)
    total = pairs + (0 if centre is None else len(x))
    if x.device.type == "cpu" and total * weight.shape[2] * x.element_size() > _MAPPED:
        # the same sums offset by offset: `index_add_` on the CPU keeps the order of the pairs
        n = kernel_map.n_inputs if transposed else kernel_map.n_outputs
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = (
            x.new_zeros(n, weight.shape[2], dtype=dtype)
            if centre is None
            else (x @ weights[centre]).to(dtype)
        )
        for (k, _), part, place in parts:
            y.index_add_(0, place, (part @ weights[k]).to(dtype))
        return y.to(x.dtype)
    products = x.new_empty(total, weight.shape[2])
    for ((k, _), part, _), out in zip(parts, products[:pairs].split(counts), strict=True):
        if len(part):
            torch.mm(part, weights[k], out=out)
    if centre is not None:
        torch.mm(x, weights[centre], out=products[pairs:])
    return _sum(products, kernel_map.in_bags() if transposed else kernel_map.out_bags())


def _outer(x: Tensor, dy: Tensor, kernel_map: KernelMap, transposed: bool) -> Tensor:
    """Gradient of the weight: Σ over the pairs of each offset of xᵀ · dy, [K, C, D]."""
    source, target = _ends(kernel_map, transposed)
    weight = x.new_zeros(kernel_map.size, x.shape[1], dy.shape[1])
    slots = weight.unbind(0)
    counts = [count for _, count in kernel_map.segments]
    parts = zip(kernel_map.segments, _gathered(x, source, counts), _gathered(dy, target, counts), strict=True)
    for (k, _), part, grad in parts:
        if len(part):
            torch.mm(part.mT, grad, out=slots[k])
    if kernel_map.centre is not None:
        torch.mm(x.mT, dy, out=slots[kernel_map.centre])
    return weight


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.map, ctx.transposed = kernel_map, transposed
        return _product(x, weight, kernel_map, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        kernel_map, transposed, dy = ctx.map, ctx.transposed, grads[0].contiguous()
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # `apply` alone builds a graph under create_graph; without one it costs nothing
        dx = _Convolution.apply(dy, weight.mT, kernel_map, not transposed) if needs_x else None
        dw = _WeightGradient.apply(x, dy, kernel_map, transposed) if needs_weight else None
        return dx, dw, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, kernel_map: KernelMap, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, dy)
        ctx.map, ctx.transposed = kernel_map, transposed
        return _outer(x, dy, kernel_map, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, dy = ctx.saved_tensors
        v = grads[0]
        dx = _Convolution.apply(dy, v.mT, ctx.map, not ctx.transposed) if ctx.needs_input_grad[0] else None
        ddy = _Convolution.apply(x, v, ctx.map, ctx.transposed) if ctx.needs_input_grad[1] else None
        return dx, ddy, None, None


def sparse_conv(x: Tensor, weight: Tensor, kernel_map: KernelMap, *, transposed: bool = False) -> Tensor:
    """Convolution over the pairs of a kernel map: y[out] += x[in] · weight[offset].

    Under autocast both operands are cast to its type; products of half precision are summed in float32.

    Args:
        x: [n_inputs, C], or [n_outputs, C] if transposed.
        weight: [K, C, D].
        kernel_map: from a `CoordinateSet`.
        transposed: run the map backwards: from its outputs to its inputs.

    Returns:
        [n_outputs, D], or [n_inputs, D] if transposed.

    Raises:
        ValueError: rows, channels or K do not fit.
    """
    rows = kernel_map.n_outputs if transposed else kernel_map.n_inputs
    if x.ndim != 2 or weight.ndim != 3 or weight.shape[:2] != (kernel_map.size, x.shape[1]) or len(x) != rows:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; this map takes x [{rows}, C] and "
            f"weight [{kernel_map.size}, C, D]"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; cast one, or run under autocast")
    return _Convolution.apply(x, weight, kernel_map, transposed)
