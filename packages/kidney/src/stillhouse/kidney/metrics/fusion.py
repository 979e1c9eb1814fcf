"""Merging the views of one stone (surface and section) into one embedding.

Embeddings of one stone and one view are averaged first, so that a stone with many patches of one view counts
no more than another. Unlike the sampler-position pairing found in earlier multi-view code for kidney stones,
a stone is only ever joined with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._check import as_embeddings, as_names

FUSIONS = ("max", "mean", "concat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """One embedding per stone.

    Attributes:
        embeddings: L2-normalised [S, d], or [S, V·d] for "concat".
        stones: stone of each row, sorted.
        views: the V view names in the order of the concatenation.
        complete: bool [S], whether the stone has every view.
        rows: for each stone the rows of the input that went into it.
    """

    embeddings: Tensor
    stones: tuple[str, ...]
    views: tuple[str, ...]
    complete: Tensor
    rows: tuple[tuple[int, ...], ...]


def fuse_views(
    embeddings: Tensor,
    stones: Sequence[str] | np.ndarray,
    views: Sequence[str] | np.ndarray,
    how: str = "max",
    *,
    all_views: Sequence[str] | None = None,
) -> Fused:
    """Fuse all embeddings of each stone: mean within a view, then `how` across views, then L2 norm.

    "max" is the element-wise maximum (Lopez-Tiro et al., multi-view fusion of kidney stones), "mean" the
    average, "concat" the views side by side. A stone that lacks a view keeps what it has; "concat" puts zeros
    where the view is missing, so a concatenated embedding is comparable only with others of the same
    `all_views`.

    Args:
        embeddings: [N, d].
        stones: stone id of each row [N].
        views: view of each row [N].
        how: "max", "mean" or "concat".
        all_views: the views a complete stone has; default: those that occur.

    Returns:
        A `Fused` with one row per stone.

    Raises:
        ValueError: unknown `how`, lengths that differ, or a view that is not in `all_views`.

    Example:
        >>> fused = fuse_views(torch.eye(2), ["s1", "s1"], ["section", "surface"], "max")
        >>> fused.embeddings.round(decimals=3).tolist(), fused.complete.tolist()
        ([[0.7070000171661377, 0.7070000171661377]], [True])
    """
    if how not in FUSIONS:
        raise ValueError(f"how is {how!r}; choose one of {', '.join(FUSIONS)}")
    embeddings = as_embeddings("embeddings", embeddings)
    stone_names = as_names("stones", stones, len(embeddings))
    view_names = as_names("views", views, len(embeddings))
    if stone_names is None or view_names is None:
        raise ValueError("stones and views must be given: fusion joins the views of one stone")
    order = tuple(sorted(set(view_names))) if all_views is None else tuple(dict.fromkeys(all_views))
    unknown = sorted(set(view_names) - set(order))
    if unknown:
        raise ValueError(f"views holds {unknown[0]!r}, which is not one of {', '.join(order)}")

    members: dict[str, list[int]] = {}
    for row, stone in enumerate(stone_names):
        members.setdefault(stone, []).append(row)
    fused, complete = [], []
    names = tuple(sorted(members))
    for stone in names:
        rows = members[stone]
        means = {
            view: embeddings[own].mean(dim=0)
            for view in order
            if (own := [r for r in rows if view_names[r] == view])
        }
        if how == "concat":
            blank = torch.zeros(embeddings.shape[1], dtype=embeddings.dtype)
            fused.append(torch.cat([means.get(view, blank) for view in order]))
        else:
            stack = torch.stack(list(means.values()))
            fused.append(stack.amax(dim=0) if how == "max" else stack.mean(dim=0))
        complete.append(len(means) == len(order))
    width = embeddings.shape[1] * (len(order) if how == "concat" else 1)
    rows_of = tuple(tuple(members[stone]) for stone in names)
    stacked = torch.stack(fused) if fused else embeddings.new_zeros(0, width)
    return Fused(
        embeddings=normalize(stacked, dim=1),
        stones=names,
        views=order,
        complete=torch.tensor(complete, dtype=torch.bool),
        rows=rows_of,
    )
