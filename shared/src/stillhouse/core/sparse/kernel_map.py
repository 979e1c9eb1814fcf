"""Which input voxel meets which output voxel under which kernel offset.

A map lists pairs grouped by offset, so that a convolution is: gather the inputs of all pairs, one matrix
product for each offset, sum the products of each output. The sums go through `Bags` (the pairs of each row,
one after the other), which is deterministic on every device, unlike an atomic `index_add_`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from ._keys import search, shift


@dataclass(frozen=True, slots=True)
class Bags:
    """Rows of a source, listed destination by destination.

    Attributes:
        order: int64 [P], source rows, those of destination 0 first.
        offsets: int64 [n + 1]; destination i sums `order[offsets[i]:offsets[i + 1]]`.
    """

    order: Tensor
    offsets: Tensor

    @staticmethod
    def of(index: Tensor, n: int, counts: Tensor | None = None) -> Bags:
        """Bags that send source row p to destination `index[p]` in [0, n).

        Args:
            index: int64 [P].
            n: number of destinations.
            counts: int64 [n], how often each occurs in `index`, where it is known.
        """
        if counts is None:
            counts = torch.bincount(index, minlength=n)
        offsets = counts.new_zeros(n + 1)
        torch.cumsum(counts, 0, out=offsets[1:])
        return Bags(torch.argsort(index, stable=True), offsets)


@dataclass(slots=True)
class KernelMap:
    """Pairs (input, output) of a sparse convolution, grouped by kernel offset.

    Attributes:
        inputs: int64 [P], input voxel of each pair.
        outputs: int64 [P], output voxel of each pair.
        segments: (kernel index, number of pairs) in the order of the pairs; the counts add up to P.
        size: number of kernel offsets K.
        n_inputs: number of input voxels.
        n_outputs: number of output voxels.
        centre: kernel index whose pairs are (i, i) for every voxel and are not listed; None where none is.
    """

    inputs: Tensor
    outputs: Tensor
    segments: tuple[tuple[int, int], ...]
    size: int
    n_inputs: int
    n_outputs: int
    centre: int | None = None
    _out_bags: Bags | None = field(default=None, repr=False)
    _in_bags: Bags | None = field(default=None, repr=False)
    _mirrored: bool = field(default=False, repr=False)  # second half of the pairs = first half, swapped

    @property
    def pairs(self) -> int:
        """Number of listed pairs P; those of the centre come on top."""
        return len(self.inputs)

    def out_bags(self) -> Bags:
        """Products of each output: rows 0 … P − 1 are pairs, P + i is the centre of voxel i."""
        if self._out_bags is None:
            self._out_bags = self._bags(self.outputs, self.n_outputs)
        return self._out_bags

    def in_bags(self) -> Bags:
        """Products of each input, for the gradient; rows as in `out_bags`."""
        if self._in_bags is None:
            if self._mirrored:
                bags, half = self.out_bags(), self.pairs // 2
                order = torch.where(bags.order < half, bags.order + half, bags.order - half)
                order = torch.where(bags.order < 2 * half, order, bags.order)
                self._in_bags = Bags(order, bags.offsets)
            else:
                self._in_bags = self._bags(self.inputs, self.n_inputs)
        return self._in_bags

    def _bags(self, index: Tensor, n: int) -> Bags:
        if self.centre is not None:
            index = torch.cat((index, torch.arange(n, device=index.device)))
        return Bags.of(index, n)


def submanifold_map(keys: Tensor, order: Tensor | None, kernel: int) -> KernelMap:
    """Pairs of a convolution whose outputs are its inputs: output p takes input p + offset.

    Only half of the offsets is searched; the other half holds the same pairs, swapped. One search serves a
    whole column of offsets along z, because its hits follow each other in the sorted keys.

    Args:
        keys: int64 [M], sorted, distinct.
        order: int64 [M], voxel that each sorted key belongs to; None where that is the position itself.
        kernel: odd side length k; the offsets run from −(k − 1)/2, z fastest.
    """
    radius, m = kernel // 2, len(keys)
    middle = kernel**3 // 2
    columns = [c for c in product(range(-radius, radius + 1), repeat=2) if c > (0, 0)]
    shifts = torch.tensor([shift(dx, dy, -radius) for dx, dy in columns], device=keys.device).view(-1, 1)
    bases = keys + shifts if columns else keys.new_zeros(0, m)
    starts = search(keys, bases)
    own = torch.arange(m, device=keys.device)  # the rest of the own column: z + 1 … z + radius
    bases = torch.cat(((keys + 1)[None], bases))
    starts = torch.cat(((own + 1)[None], starts))
    widths = [radius] + [kernel] * len(columns)
    table = _columns(keys, bases, starts, widths)
    found = (table >= 0).view(-1)
    counts = found.view(len(table), m).sum(1).tolist()
    hits = found.nonzero().squeeze(1)
    near, here = table.view(-1)[hits], hits % m
    if order is not None:
        near, here = order[near], order[here]
    segments = [(middle + 1 + i, count) for i, count in enumerate(counts)]
    segments += [(middle - 1 - i, count) for i, count in enumerate(counts)]
    return KernelMap(
        inputs=torch.cat((near, here)),
        outputs=torch.cat((here, near)),
        segments=tuple(segments),
        size=kernel**3,
        n_inputs=m,
        n_outputs=m,
        centre=middle,
        _mirrored=True,
    )


def window_map(keys: Tensor, order: Tensor | None, queries: Tensor, kernel: int) -> KernelMap:
    """Pairs of a convolution with other outputs than inputs: output j takes those around cell `queries[j]`.

    Args:
        keys: int64 [M], sorted keys of the inputs.
        order: as in `submanifold_map`.
        queries: int64 [M'], key of the middle cell of each output, distinct.
        kernel: odd side length.
    """
    radius = kernel // 2
    shifts = [shift(dx, dy, -radius) for dx, dy in product(range(-radius, radius + 1), repeat=2)]
    bases = queries + torch.tensor(shifts, device=keys.device).view(-1, 1)
    table = _columns(keys, bases, search(keys, bases), [kernel] * len(shifts))
    found = (table >= 0).view(-1)
    hits = found.nonzero().squeeze(1)
    near = table.view(-1)[hits]
    return KernelMap(
        inputs=near if order is None else order[near],
        outputs=hits % len(queries),
        segments=tuple(enumerate(found.view(len(table), -1).sum(1).tolist())),
        size=kernel**3,
        n_inputs=len(keys),
        n_outputs=len(queries),
    )


def _columns(keys: Tensor, bases: Tensor, starts: Tensor, widths: list[int]) -> Tensor:
    """Positions in `keys` of bases[c] + 0 … bases[c] + widths[c] − 1, or −1: int64 [Σ widths, queries].

    `starts` is the first position not below each base, so a hit is at most `width − 1` places further.
    """
    slots = torch.tensor(widths, device=keys.device).cumsum(0) - torch.tensor(widths, device=keys.device)
    width = torch.tensor(widths, device=keys.device).view(-1, 1)
    n = bases.shape[1]
    table = keys.new_full((sum(widths), n), -1)
    padded = torch.cat((keys, keys.new_full((max(widths, default=0) + 1,), torch.iinfo(torch.int64).max)))
    for step in range(max(widths, default=0)):
        place = starts + step
        ahead = padded[place] - bases
        column, query = ((ahead >= 0) & (ahead < width)).nonzero(as_tuple=True)
        table[slots[column] + ahead[column, query], query] = place[column, query]
    return table


def block_map(coords: Tensor, parents: Tensor, n_parents: int, stride: int) -> KernelMap:
    """Pairs of a convolution whose kernel is its stride: each voxel meets its parent alone.

    Args:
        coords: int64 [M, 4] of the children.
        parents: int64 [M], parent of each child.
        n_parents: number of parents.
        stride: side s of a block; kernel index (x mod s)·s² + (y mod s)·s + (z mod s), with a true modulus.
    """
    x, y, z = (coords[:, 1:] % stride).unbind(1)
    slot = (x * stride + y) * stride + z
    counts = torch.bincount(slot, minlength=stride**3).tolist()
    children = torch.argsort(slot, stable=True)
    return KernelMap(
        inputs=children,
        outputs=parents[children],
        segments=tuple(enumerate(counts)),
        size=stride**3,
        n_inputs=len(coords),
        n_outputs=n_parents,
    )
