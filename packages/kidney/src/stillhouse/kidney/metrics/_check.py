"""Checks that the metric functions share: shapes, finite numbers, one label and one group per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def as_embeddings(name: str, value: Tensor | np.ndarray) -> Tensor:
    """Return `value` as a detached float CPU tensor [N, d]; half precision becomes float32.

    Args:
        name: the argument's name, for the message.
        value: tensor or array [N, d].

    Returns:
        float32 or float64 [N, d].

    Raises:
        ValueError: the shape is not [N, d] with d ≥ 1, or an entry is NaN or infinite.
    """
    tensor = torch.as_tensor(value).detach().cpu()
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have the shape [N, d], got {tuple(tensor.shape)}")
    if tensor.dtype != torch.float64:
        tensor = tensor.to(torch.float32)
    finite = torch.isfinite(tensor).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name}[{row}] holds NaN or infinity; embeddings must be finite")
    return tensor


def as_labels(name: str, value: Tensor | np.ndarray | Sequence[int], count: int) -> Tensor:
    """Return integer labels [count], each ≥ 0.

    Args:
        name: the argument's name, for the message.
        value: integers [count].
        count: how many there must be.

    Returns:
        int64 [count].

    Raises:
        TypeError: the labels are not integers.
        ValueError: their number is not `count`, or one is negative.
    """
    labels = torch.as_tensor(value).detach().cpu().reshape(-1)
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if len(labels) != count:
        raise ValueError(
            f"{name} must hold one label per embedding: {count} embeddings, {len(labels)} labels"
        )
    labels = labels.to(torch.int64)
    if count and int(labels.min()) < 0:
        raise ValueError(
            f"{name} holds {int(labels.min())}; leave items without a label out, labels start at 0"
        )
    return labels


def as_names(name: str, value: Sequence[str] | np.ndarray | None, count: int) -> np.ndarray | None:
    """Return group or view names as an array of strings [count], or None.

    Args:
        name: the argument's name, for the message.
        value: names [count] or None.
        count: how many there must be.

    Returns:
        array of str [count], or None for None.

    Raises:
        ValueError: their number is not `count`.
    """
    if value is None:
        return None
    names = np.asarray([str(item) for item in value], dtype=object)
    if len(names) != count:
        raise ValueError(f"{name} must hold one name per embedding: {count} embeddings, {len(names)} names")
    return names
