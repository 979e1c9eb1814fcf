"""Gather, sum and convolution over sparse rows, differentiable twice, with sums in a fixed order.

Legend of the shapes: N and M rows, P pairs, K kernel offsets, C input channels, D output channels.
Sums of half-precision rows run in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernel_map import Bags, KernelMap


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


def _product(rows: Tensor, gathered: Tensor, weight: Tensor, kernel_map: KernelMap, bags: Bags) -> Tensor:
    """Rows times the weight of each pair's offset, summed by bag: `weight` [K, C, D]."""
    pairs, centre = kernel_map.pairs, kernel_map.centre
    extra = 0 if centre is None else len(rows)
    products = gathered.new_empty(pairs + extra, weight.shape[2])
    weights = weight.unbind(0)
    counts = [count for _, count in kernel_map.segments]
    parts = zip(kernel_map.segments, gathered.split(counts), products[:pairs].split(counts), strict=True)
    for (k, count), part, out in parts:
        if count:
            torch.mm(part, weights[k], out=out)
    if centre is not None:
        torch.mm(rows, weights[centre], out=products[pairs:])
    return _sum(products, bags)


def _outer(
    rows: Tensor, gathered: Tensor, grads: Tensor, gathered_grads: Tensor, kernel_map: KernelMap
) -> Tensor:
    """Σ over the pairs of each offset of rowᵀ · gradient: [K, C, D]."""
    weight = rows.new_zeros(kernel_map.size, rows.shape[1], grads.shape[1])
    slots = weight.unbind(0)
    counts = [count for _, count in kernel_map.segments]
    parts = zip(kernel_map.segments, gathered.split(counts), gathered_grads.split(counts), strict=True)
    for (k, count), part, grad in parts:
        if count:
            torch.mm(part.mT, grad, out=slots[k])
    if kernel_map.centre is not None:
        torch.mm(rows.mT, grads, out=slots[kernel_map.centre])
    return weight


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.map, ctx.transposed = kernel_map, transposed
        source = kernel_map.outputs if transposed else kernel_map.inputs
        bags = kernel_map.in_bags() if transposed else kernel_map.out_bags()
        return _product(x, x.index_select(0, source), weight, kernel_map, bags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        kernel_map, transposed, dy = ctx.map, ctx.transposed, grads[0].contiguous()
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # under create_graph: the same sums through differentiable functions
            dx = _Convolution.apply(dy, weight.mT, kernel_map, not transposed) if needs_x else None
            dw = _WeightGradient.apply(x, dy, kernel_map, transposed) if needs_weight else None
            return dx, dw, None, None
        source, target = kernel_map.inputs, kernel_map.outputs
        bags = kernel_map.out_bags() if transposed else kernel_map.in_bags() if needs_x else None
        if transposed:
            source, target = target, source
        gathered_dy = dy.index_select(0, target)
        dx = dw = None
        if needs_x:
            assert bags is not None
            dx = _product(dy, gathered_dy, weight.mT, kernel_map, bags)
        if needs_weight:
            dw = _outer(x, x.index_select(0, source), dy, gathered_dy, kernel_map)
        return dx, dw, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, kernel_map: KernelMap, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, dy)
        ctx.map, ctx.transposed = kernel_map, transposed
        source, target = kernel_map.inputs, kernel_map.outputs
        if transposed:
            source, target = target, source
        return _outer(x, x.index_select(0, source), dy, dy.index_select(0, target), kernel_map)

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
