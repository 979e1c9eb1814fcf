"""The mathematics of each divergence: value per row and closed-form gradient, from log-probabilities.

Legend: N rows, V classes; `log_q` [N, V] student, `log_p` [N, V] teacher, both normalised over V; u = z/T
the tempered student logits, q = softmax(u).

Every gradient with respect to u has one shape. With w_v = q_v · ∂L/∂q_v, the softmax gives
∂L/∂u = w − q·Σw, so that a constant added to ∂L/∂q drops out. The forms below write w.

Support. An entry whose weight is exactly zero contributes zero, whatever stands beside it (0·∞ = 0). Where
the divergence itself is infinite (mass of the first distribution where the second has none), the value is
+inf and the gradient stays finite: forward KL keeps q − p, reverse KL gives that row a zero gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

INF = float("inf")


class Form(Protocol):
    """One divergence: `values` is differentiable in `log_q`; `closed` gives the values and the gradient in
    u."""

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the value of each row, [N], differentiable with respect to `log_q` alone."""

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value of each row, [N], and the gradient with respect to u, [N, V]."""


def expect(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return Σ_v weight·(first − second) over the entries of positive weight, [N].

    Entries of zero weight are replaced *before* the subtraction, so that neither −inf − (−inf) nor its
    gradient is ever formed.
    """
    empty = weight <= 0
    difference = first.masked_fill(empty, 0.0) - second.masked_fill(empty, 0.0)
    return (weight * difference).sum(-1)


def log_mix(weight_p: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log(weight_p·p + (1 − weight_p)·q) without leaving log-space; −inf where both are −inf."""
    empty = (log_p == -INF) & (log_q == -INF)
    first = log_p.masked_fill(empty, 0.0) + _log(weight_p)
    second = log_q.masked_fill(empty, 0.0) + _log1p(-weight_p)
    return torch.logaddexp(first, second).masked_fill(empty, -INF)


def safe_logsumexp(x: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension; −inf with a zero gradient where every entry is −inf."""
    empty = (x == -INF).all(-1, keepdim=True)
    return torch.logsumexp(x.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -INF)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -INF


def _log1p(x: float) -> float:
    return math.log1p(x) if x > -1 else -INF


def _centre(weight: Tensor, q: Tensor) -> Tensor:
    """Return w − q·Σw: from w = q·∂L/∂q to the gradient in u."""
    return weight - q * weight.sum(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """Σ p (log p − log q); without the entropy the cross-entropy −Σ p log q. ∂/∂u = q − p for both."""

    entropy: bool = True

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Value per row, [N]."""
        return expect(log_p.exp(), log_p if self.entropy else torch.zeros_like(log_p), log_q)

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value per row, [N], and gradient in u, [N, V]."""
        return self.values(log_q, log_p), log_q.exp() - log_p.exp()


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """Σ q (log q − log p). ∂/∂u = q (log q − log p − KL); zero for a row whose value is infinite."""

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Value per row, [N]."""
        q = log_q.exp()
        outside = (log_p == -INF) & (q > 0)
        infinite = outside.any(-1)
        values = expect(q.masked_fill(infinite[..., None], 0.0), log_q, log_p)
        return values.masked_fill(infinite, INF)

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value per row, [N], and gradient in u, [N, V]."""
        q = log_q.exp()
        empty = q <= 0
        weight = q * (log_q.masked_fill(empty, 0.0) - log_p.masked_fill(empty, 0.0))
        values = weight.sum(-1)
        gradient = weight - q * values[..., None]
        return values, gradient.masked_fill((values == INF)[..., None], 0.0)


@dataclass(frozen=True, slots=True)
class JensenShannon:
    """β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q, 0 < β < 1. w = (1−β)·q·(log q − log m)."""

    beta: float

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Value per row, [N]."""
        log_m = log_mix(self.beta, log_p, log_q)
        teacher, student = expect(log_p.exp(), log_p, log_m), expect(log_q.exp(), log_q, log_m)
        return self.beta * teacher + (1 - self.beta) * student

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value per row, [N], and gradient in u, [N, V]."""
        log_m, q = log_mix(self.beta, log_p, log_q), log_q.exp()
        empty = q <= 0
        weight = (1 - self.beta) * q * (log_q.masked_fill(empty, 0.0) - log_m.masked_fill(empty, 0.0))
        values = self.beta * expect(log_p.exp(), log_p, log_m) + weight.sum(-1)
        return values, _centre(weight, q)


@dataclass(frozen=True, slots=True)
class SkewForwardKL:
    """KL(p‖m), m = αp + (1−α)q, 0 ≤ α < 1; without the entropy −Σ p log m. w = −(1−α)·p·q/m."""

    alpha: float
    entropy: bool = True

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Value per row, [N]."""
        log_m = log_mix(self.alpha, log_p, log_q)
        return expect(log_p.exp(), log_p if self.entropy else torch.zeros_like(log_p), log_m)

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value per row, [N], and gradient in u, [N, V]."""
        log_m, p = log_mix(self.alpha, log_p, log_q), log_p.exp()
        values = expect(p, log_p if self.entropy else torch.zeros_like(log_p), log_m)
        share = (log_q - log_m.masked_fill(log_m == -INF, 0.0) + math.log1p(-self.alpha)).exp()
        return values, _centre(-p * share, log_q.exp())


@dataclass(frozen=True, slots=True)
class SkewReverseKL:
    """KL(q‖m), m = (1−α)p + αq, 0 < α < 1. w = q (log q − log m) − α·q²/m."""

    alpha: float

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Value per row, [N]."""
        return expect(log_q.exp(), log_q, log_mix(1 - self.alpha, log_p, log_q))

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value per row, [N], and gradient in u, [N, V]."""
        log_m, q = log_mix(1 - self.alpha, log_p, log_q), log_q.exp()
        empty = q <= 0
        ratio = log_q.masked_fill(empty, 0.0) - log_m.masked_fill(empty, 0.0)
        weight = q * ratio
        return weight.sum(-1), _centre(weight - self.alpha * q * ratio.exp(), q)


@dataclass(frozen=True, slots=True)
class TotalVariation:
    """½ Σ |p − q|. w = ½·q·sign(q − p), with sign(0) = 0."""

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Value per row, [N]."""
        return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value per row, [N], and gradient in u, [N, V]."""
        q = log_q.exp()
        difference = q - log_p.exp()
        return 0.5 * difference.abs().sum(-1), _centre(0.5 * q * difference.sign(), q)


@dataclass(frozen=True, slots=True)
class AlphaDivergence:
    """Σ [αp + (1−α)q − p^α q^{1−α}] / (α(1−α)), 0 < α < 1. w = −p^α q^{1−α}/α.

    Summed entry by entry: each bracket is non-negative (weighted arithmetic against geometric mean),
    whereas 1 − Σ p^α q^{1−α} cancels near p = q.
    """

    alpha: float

    def values(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Value per row, [N]."""
        return self._values(log_q.exp(), log_p.exp(), self._geometric(log_q, log_p))

    def closed(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Value per row, [N], and gradient in u, [N, V]."""
        q, geometric = log_q.exp(), self._geometric(log_q, log_p)
        return self._values(q, log_p.exp(), geometric), _centre(-geometric / self.alpha, q)

    def _geometric(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return (self.alpha * log_p + (1 - self.alpha) * log_q).exp()

    def _values(self, q: Tensor, p: Tensor, geometric: Tensor) -> Tensor:
        a = self.alpha
        return (a * p + (1 - a) * q - geometric).sum(-1) / (a * (1 - a))
