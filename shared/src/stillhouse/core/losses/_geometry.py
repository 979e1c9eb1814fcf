"""Directions, norms and shape checks of the feature and relation losses; every gradient here is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ._reduction import check_floating


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """Divide `x` by its Euclidean norm along `dim`; a zero vector stays zero and gets gradient zero.

    `F.normalize` divides by max(norm, 1e-12), whose gradient at a zero vector is 1e12. The vector is first
    divided by its largest entry (held constant: a direction does not depend on scale), so that squares
    neither overflow nor vanish.
    """
    largest = x.detach().abs().amax(dim, keepdim=True)
    nonzero = largest > 0
    scaled = x / torch.where(nonzero, largest, 1.0)
    length = torch.where(nonzero, scaled.square().sum(dim, keepdim=True), 1.0).sqrt()
    return torch.where(nonzero, scaled / length, 0.0)


def norm(x: Tensor, dim: int = -1) -> Tensor:
    """Euclidean norm along `dim` whose gradient at a zero vector is zero instead of NaN."""
    squares = x.square().sum(dim)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def check_same_width(student: Tensor, teacher: Tensor) -> None:
    """Raise unless student and teacher are floating tensors of one shape; the remedy is a projection."""
    check_floating("student", student)
    check_floating("teacher", teacher)
    if student.dim() == 0 or student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; they must be equal "
            "with at least one dimension: map the student to the teacher's width with a projection first"
        )


def check_embeddings(student: Tensor, teacher: Tensor, *, min_items: int = 1) -> None:
    """Raise unless student [B, Ds] and teacher [B, Dt] describe the same B ≥ `min_items` items."""
    for name, x in (("student", student), ("teacher", teacher)):
        check_floating(name, x)
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} must be embeddings [B, D], got shape {list(x.shape)}; use .flatten(1)")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student holds {student.shape[0]} items and teacher {teacher.shape[0]}; row i of both must be "
            "the same item"
        )
    if student.shape[0] < min_items:
        raise ValueError(f"this loss needs at least {min_items} items in a batch, got {student.shape[0]}")
