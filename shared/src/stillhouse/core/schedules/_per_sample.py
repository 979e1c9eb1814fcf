"""Temperatures that differ from sample to sample."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ._scalar import Schedule, as_schedule


class PerSampleTemperature(ABC):
    """A temperature for each row, ``τ_i = T + β (mean(w) − w_i)``: rows of large w get a smaller temperature.

    Subclasses say what w is. The idea is Dynamic Temperature Distillation ("Preparing Lessons: Improve
    Knowledge Distillation with Better Supervision", arXiv:1911.07471); the names FLSW and CWSM and the
    formulas are those of TextBrewer's ``schedulers.py``, which calls them an adaptation of the paper: not
    checked against the paper itself.

    Nothing in that code keeps τ positive. Here it is clamped at `minimum`.

    Args:
        temperature: The base temperature T, a number or a schedule, positive.
        beta: Spread β, ≥ 0; 0 gives the base temperature everywhere.
        minimum: Smallest temperature that is returned, > 0.
    """

    def __init__(self, temperature: float | Schedule, beta: float, *, minimum: float = 0.1) -> None:
        if not beta >= 0.0:
            raise ValueError(f"beta must be ≥ 0, got {beta!r}")
        if not minimum > 0.0:
            raise ValueError(f"minimum must be positive, got {minimum!r}")
        self.temperature = as_schedule(temperature, "temperature")
        self.beta = float(beta)
        self.minimum = float(minimum)

    @abstractmethod
    def weight(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The weight w of each row: logits [..., V] → [...]."""

    @torch.no_grad()
    def __call__(
        self, student: Tensor, teacher: Tensor, *, step: int = 0, mask: Tensor | None = None
    ) -> Tensor:
        """Temperatures of a batch.

        Args:
            student: Student logits [..., V].
            teacher: Teacher logits [..., V].
            step: Optimizer step, for a scheduled base temperature.
            mask: [...] bool, True = counts. Masked rows do not enter mean(w) and get the base temperature.

        Returns:
            [..., 1] float32 without gradient, ready to divide logits by.

        Raises:
            ValueError: Shapes that do not agree.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                "student and teacher logits must have one shape, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        weight = self.weight(student.detach().float(), teacher.detach().float())
        base = self.temperature(step)
        if mask is None:
            centre = weight.mean()
        else:
            if mask.shape != weight.shape:
                raise ValueError(f"mask must have shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
            centre = torch.where(mask, weight, 0.0).sum() / mask.sum().clamp_min(1)
        tau = base + self.beta * (centre - weight)
        if mask is not None:
            tau = torch.where(mask, tau, base)
        return tau.clamp_min(self.minimum).unsqueeze(-1)


class FLSW(PerSampleTemperature):
    """``w = (1 − cos(z_s, z_t))^γ``: where student and teacher disagree the target is sharper.

    Args:
        temperature: Base temperature T.
        beta: Spread β, ≥ 0.
        gamma: Exponent γ, > 0.
        minimum: Smallest temperature that is returned, > 0.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> FLSW(4.0, beta=1.0, gamma=1.0)(student, teacher).squeeze(-1).tolist()
        [4.5, 3.5]
    """

    def __init__(
        self, temperature: float | Schedule, beta: float, gamma: float = 2.0, *, minimum: float = 0.1
    ) -> None:
        super().__init__(temperature, beta, minimum=minimum)
        if not gamma > 0.0:
            raise ValueError(f"gamma must be positive, got {gamma!r}")
        self.gamma = float(gamma)

    def weight(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(1 − cos)^γ`` of each row: [..., V] → [...]."""
        cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
        return (1.0 - cosine).clamp_min(0.0).pow(self.gamma)


class CWSM(PerSampleTemperature):
    """``w = 1 / (max softmax(z_s) + 1e−3)``: where the student is unsure the target is sharper.

    Args:
        temperature: Base temperature T.
        beta: Spread β, ≥ 0.
        minimum: Smallest temperature that is returned, > 0.
    """

    def weight(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``1 / (max softmax + 1e−3)`` of each row: [..., V] → [...]."""
        return 1.0 / (torch.softmax(student, dim=-1).amax(dim=-1) + 1e-3)
