"""What a teacher says: logits, a sparse part of them, embeddings, hidden states or relations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..losses.topk import SparseTeacher as SparseTeacher


@dataclass(frozen=True, slots=True)
class DenseSignal:
    """Logits over the whole vocabulary.

    Attributes:
        logits: [..., V], raw, or log-probabilities at T = 1 when `log_values`.
        log_values: Only log-probabilities are known. Over the whole vocabulary these are logits too: a
            softmax of them at any temperature is exact.
    """

    logits: Tensor
    log_values: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingSignal:
    """One vector a sample.

    Attributes:
        values: [N, D].
    """

    values: Tensor


@dataclass(frozen=True, slots=True)
class HiddenSignal:
    """Hidden states or feature maps by name.

    Attributes:
        values: Name → [N, ...].
    """

    values: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class RelationSignal:
    """Relations between positions or samples, such as attention maps or similarities.

    Attributes:
        values: [..., L, L].
        log_values: The entries are logarithms.
    """

    values: Tensor
    log_values: bool = False


TeacherSignal = DenseSignal | SparseTeacher | EmbeddingSignal | HiddenSignal | RelationSignal


def to_device(signal: TeacherSignal, device: torch.device | str) -> TeacherSignal:
    """Moves every tensor of a signal to a device; the rest is kept.

    Example:
        >>> to_device(DenseSignal(torch.zeros(1, 2)), "cpu")
        DenseSignal(logits=tensor([[0., 0.]]), log_values=False)
    """
    moved: dict[str, Any] = {}
    for field in fields(signal):
        value = getattr(signal, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, Mapping):
            moved[field.name] = {name: tensor.to(device, non_blocking=True) for name, tensor in value.items()}
    return replace(signal, **moved)
