"""Directions, norms and shape checks that the feature and relation losses share; every gradient here is finite.

Legend: B items in a batch, D width of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """Divide `x` by its Euclidean norm along `dim`; a zero vector stays zero and gets gradient zero.

    `F.normalize` divides by max(norm, 1e-12), whose gradient at a zero vector is 1e12. The vector is first divided by its
    largest entry (held constant: a direction does not depend on scale), so that squares neither overflow nor vanish.
    """
    largest = x.detach().abs().amax(dim, keepdim=True)
    nonzero = largest > 0
    scaled = x / torch.where(nonzero, largest, 1.0)
    norm = torch.where(nonzero, scaled.square().sum(dim, keepdim=True), 1.0).sqrt()
    return torch.where(nonzero, scaled / norm, 0.0)


def norm(x: Tensor, dim: int = -1) -> Tensor:
    """Euclidean norm along `dim` whose gradient at a zero vector is zero instead of NaN."""
    squares = x.square().sum(dim)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def check_pair(student: Tensor, teacher: Tensor, *, same_shape: bool, min_dim: int = 1) -> None:
    """Raise where two feature tensors cannot be compared: not floating point, too few axes, or shapes that differ."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
        if x.dim() < min_dim:
            raise ValueError(f"{name} must have at least {min_dim} axes, got shape {tuple(x.shape)}")
    if same_shape and student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} but teacher {tuple(teacher.shape)}; they must be equal: "
            "map the student to the teacher's width with a projection first"
        )


def check_embeddings(
    student: Tensor, teacher: Tensor, *, same_width: bool = False, min_items: int = 1
) -> None:
    """Raise unless student [B, Ds] and teacher [B, Dt] describe the same B ≥ `min_items` items."""
    check_pair(student, teacher, same_shape=False)
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 2:
            raise ValueError(
                f"{name} must be embeddings [B, D], got shape {tuple(x.shape)}; flatten it to two axes"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student holds {student.shape[0]} items and teacher {teacher.shape[0]}; row i of both must be the same item"
        )
    if student.shape[0] < min_items:
        raise ValueError(f"this loss needs at least {min_items} items in the batch, got {student.shape[0]}")
    if same_width and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student has width {student.shape[1]} but teacher {teacher.shape[1]}; "
            "map the student to the teacher's width with a projection first"
        )
