"""Generations of distillation as operators on probability distributions (Recursive Meta-Distillation,
arXiv 2601.13100).

A student p of one generation is the teacher of the next; an *anchor* q, the base teacher, keeps the chain
from drifting. Known of that paper here is its abstract: anchored chains contract in KL towards the anchor.
Which inequality holds for which operator, and in which direction of the divergence, is worked out below and
tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class DistillationOperator(Protocol):
    """One generation: from the previous student and the anchor to the next student."""

    def __call__(self, p_prev: Tensor, anchor: Tensor) -> Tensor:
        """Next distribution [..., K] from the previous one and the anchor, both [..., K]."""
        ...


@dataclass(frozen=True)
class LinearAnchoring:
    """``p' = (1 − a) p + a q``.

    By convexity ``KL(q‖p') ≤ (1 − a) KL(q‖p)`` and ``KL(p'‖q) ≤ (1 − a) KL(p‖q)``. Near the anchor the
    divergence is quadratic, and its asymptotic rate is (1 − a)².

    Args:
        a: Share of the anchor, in [0, 1].
    """

    a: float

    def __post_init__(self) -> None:
        _check_share(self.a)

    def __call__(self, p_prev: Tensor, anchor: Tensor) -> Tensor:
        """Next distribution [..., K]."""
        return (1.0 - self.a) * p_prev + self.a * anchor


@dataclass(frozen=True)
class GeometricAnchoring:
    """``p' ∝ p^(1−a) q^a``: the mean of the logits.

    ``KL(q‖p') = (1 − a) KL(q‖p) + log Z`` with ``Z = Σ p^(1−a) q^a ≤ 1``, so that the forward divergence
    contracts by 1 − a. The reverse does **not**: ``KL(p'‖q) ≤ KL(p‖q)`` is all that holds in general.

    Args:
        a: Weight of the anchor, in [0, 1].
    """

    a: float

    def __post_init__(self) -> None:
        _check_share(self.a)

    def __call__(self, p_prev: Tensor, anchor: Tensor) -> Tensor:
        """Next distribution [..., K]."""
        if self.a in (0.0, 1.0):
            return p_prev.clone() if self.a == 0.0 else anchor.clone()
        return torch.softmax((1.0 - self.a) * p_prev.log() + self.a * anchor.log(), -1)


@dataclass(frozen=True)
class Temperature:
    """``p' ∝ p^(1/T)``: no anchor. T > 1 flattens towards the uniform distribution, T < 1 sharpens towards a
    vertex.

    Args:
        temperature: T > 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature!r}")

    def __call__(self, p_prev: Tensor, anchor: Tensor) -> Tensor:
        """Next distribution [..., K]; the anchor is not used."""
        return torch.softmax(p_prev.log() / self.temperature, -1)


def iterate(operator: DistillationOperator, start: Tensor, anchor: Tensor, generations: int) -> list[Tensor]:
    """Applies an operator again and again.

    Args:
        operator: One generation.
        start: First student [..., K].
        anchor: Base teacher [..., K].
        generations: How many, ≥ 0.

    Returns:
        `start` and the students after it, ``generations + 1`` tensors.

    Raises:
        ValueError: A distribution that is none, or a negative number of generations.

    Example:
        >>> q, p = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        >>> [round(x[0].item(), 4) for x in iterate(LinearAnchoring(0.5), p, q, 3)]
        [0.9, 0.7, 0.6, 0.55]
    """
    if generations < 0:
        raise ValueError(f"generations must be ≥ 0, got {generations!r}")
    _check_distribution("start", start)
    _check_distribution("anchor", anchor)
    chain = [start]
    for _ in range(generations):
        chain.append(operator(chain[-1], anchor))
    return chain


def combine_anchors(
    anchors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    kind: Literal["linear", "geometric"] = "linear",
) -> Tensor:
    """Makes one anchor of several base teachers: ``Σ w_k q_k`` or the normalised ``Π q_k^{w_k}``.

    Args:
        anchors: Distributions [..., K].
        weights: Non-negative, normalised here; None weighs equally.
        kind: Which mean.

    Raises:
        ValueError: Weights that do not fit, or an unknown kind.
    """
    if kind not in ("linear", "geometric"):
        raise ValueError(f'kind must be "linear" or "geometric", got {kind!r}')
    w = [1.0] * len(anchors) if weights is None else [float(weight) for weight in weights]
    if not anchors or len(w) != len(anchors) or min(w) < 0 or sum(w) <= 0:
        raise ValueError(f"weights must be {len(anchors)} non-negative numbers, not all zero, got {w}")
    for index, anchor in enumerate(anchors):
        _check_distribution(f"anchors[{index}]", anchor)
    used = [(weight / sum(w), anchor) for weight, anchor in zip(w, anchors, strict=True) if weight > 0]
    if kind == "linear":
        return torch.stack([weight * anchor for weight, anchor in used]).sum(0)
    return torch.softmax(torch.stack([weight * anchor.log() for weight, anchor in used]).sum(0), -1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """``Σ p (log p − log q)`` over the last dimension; 0 log 0 = 0, and +∞ where p has mass and q none.

    Args:
        p: Distribution [..., K].
        q: Distribution [..., K].

    Returns:
        [...].
    """
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)


def resample(p: Tensor, draws: int, generator: torch.Generator | None = None) -> Tensor:
    """The empirical distribution of a finite sample: what a generation really learns of the one before.

    Args:
        p: Distribution [K] or [N, K].
        draws: Sample size ≥ 1.
        generator: Source of randomness.

    Returns:
        Of the shape of p.
    """
    if draws < 1:
        raise ValueError(f"draws must be ≥ 1, got {draws!r}")
    ids = torch.multinomial(p, draws, replacement=True, generator=generator)
    return torch.zeros_like(p).scatter_add_(-1, ids, torch.full_like(ids, 1.0 / draws, dtype=p.dtype))


def _check_share(a: float) -> None:
    if not 0.0 <= a <= 1.0:
        raise ValueError(f"a must lie in [0, 1], got {a!r}")


def _check_distribution(name: str, p: Tensor) -> None:
    if not p.is_floating_point() or bool((p < 0).any()) or bool(((p.sum(-1) - 1).abs() > 1e-5).any()):
        raise ValueError(f"{name} must hold non-negative numbers that sum to 1 over the last dimension")
