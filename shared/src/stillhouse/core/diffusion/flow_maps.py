"""Students as maps: `jump(x_t, t, s)` carries a state from time t to an earlier time s in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ._shape import like, per_sample
from .denoiser import Denoiser
from .evaluations import tally
from .prediction import split
from .schedules import NoiseSchedule, Trig
from .solvers import ddim_jump


@runtime_checkable
class FlowMap(Protocol):
    """A student that jumps; `schedule` says what its times mean."""

    schedule: NoiseSchedule

    def jump(self, x_t: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None) -> Tensor:
        """x_s `[B, *S]` from x_t `[B, *S]` at times `[B]` or numbers, s ≤ t."""
        ...


class X0Map:
    """The DDIM jump of a denoiser's x₀: x_s = α_s·x₀ + σ_s·ε, the map of CTM, TCD, DMD and SwiftBrush.

    Args:
        denoiser: the student (a guided one counts two evaluations a jump).

    Example:
        >>> from stillhouse.core.diffusion import FunctionDenoiser, Prediction, RectifiedFlow
        >>> student = FunctionDenoiser(lambda x, t, cond: 0 * x, RectifiedFlow(), Prediction.X0)
        >>> X0Map(student).jump(torch.tensor([[3.0]]), 1.0, 0.5)
        tensor([[1.5000]])
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.schedule = denoiser.schedule

    def jump(self, x_t: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None) -> Tensor:
        """One evaluation, then the closed form."""
        kind = self.denoiser.prediction
        out = self.denoiser(x_t, t, cond, out=kind)
        x0, eps = split(x_t, out, t, kind, self.schedule)
        return ddim_jump(x_t, x0, eps, s, self.schedule)


class AverageVelocityMap:
    """x_s = x_t + (s − t)·u(x_t, t, s), with u the mean velocity over [s, t], towards the noise (MeanFlow).

    Args:
        network: `network(x_t, t, s, cond)` → `[B, *S]`.
        schedule: what the times mean.
    """

    def __init__(self, network: Callable[..., Tensor], schedule: NoiseSchedule) -> None:
        self.network, self.schedule = network, schedule

    def jump(self, x_t: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None) -> Tensor:
        """One evaluation."""
        t, s = per_sample(t, x_t), per_sample(s, x_t, "s")
        tally()
        return (x_t + like(s - t, x_t) * self.network(x_t, t, s, cond)).to(x_t.dtype)


class SignalMap:
    """BOOT's student y(z, s), which sees only the noise z: x_s = α_s·y(z, s) + σ_s·z.

    Args:
        network: `network(z, s, cond)` → the signal y `[B, *S]`.
        schedule: what the times mean.

    Raises:
        ValueError: a jump that does not start at the noise end.
    """

    def __init__(self, network: Callable[..., Tensor], schedule: NoiseSchedule) -> None:
        self.network, self.schedule = network, schedule

    def jump(self, x_t: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None) -> Tensor:
        """One evaluation, from x_t = σ(t_max)·z."""
        t, s = per_sample(t, x_t), per_sample(s, x_t, "s")
        if bool((t != self.schedule.t_max).any()):
            raise ValueError(
                f"a SignalMap jumps from t = {self.schedule.t_max:g} only; it sees nothing but z"
            )
        z = x_t.double() / like(self.schedule.sigma(t), x_t)
        tally()
        signal = self.network(z.to(x_t.dtype), s, cond)
        return ddim_jump(x_t, signal.double(), z, s, self.schedule)


class TrigMap:
    """The consistency jump of TrigFlow: x_s = cos(t − s)·x_t − sin(t − s)·σ_data·F(x_t/σ_data, t).

    Args:
        network: `network(x_t/σ_data, t, cond)` → F `[B, *S]`.
        schedule: the `Trig` schedule.
    """

    def __init__(self, network: Callable[..., Tensor], schedule: Trig) -> None:
        self.network, self.schedule = network, schedule

    def jump(self, x_t: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None) -> Tensor:
        """One evaluation."""
        t, s = per_sample(t, x_t), per_sample(s, x_t, "s")
        data = self.schedule.sigma_data
        tally()
        answer = self.network(x_t / data, t, cond)
        turn = like(t - s, x_t)
        return (turn.cos() * x_t - turn.sin() * data * answer).to(x_t.dtype)


@dataclass(frozen=True, slots=True)
class Policy:
    """ArcFlow's velocity inside one step: v(t) = Σ_k π_k·u_k·γ_k^{t_src − t}.

    Attributes:
        means: u `[B, K, *S]`.
        weights: π `[B, K]`, usually a softmax.
        log_gammas: log γ `[B, K]`; the first is 0 in the method (a constant velocity).
        source: t_src `[B]`.
    """

    means: Tensor
    weights: Tensor
    log_gammas: Tensor
    source: Tensor

    def velocity(self, t: Tensor | float) -> Tensor:
        """v(t) `[B, *S]`."""
        t = per_sample(t, self.means)
        factor = self.weights.double() * ((self.source - t)[:, None] * self.log_gammas.double()).exp()
        return self._sum(factor)

    def displacement(self, a: Tensor | float, b: Tensor | float) -> Tensor:
        """x_b − x_a = −Σ_k π_k·u_k·γ_k^{t_src − a}·(a − b)·expm1(q)/q with q = (a − b)·log γ_k, a ≥ b.

        Below |q| = 1e-4 the factor is its series 1 + q/2 + q²/6, where the reference clamps q (our choice).
        """
        a, b = per_sample(a, self.means, "a"), per_sample(b, self.means, "b")
        span = (a - b)[:, None]
        log_gammas = self.log_gammas.double()
        q = span * log_gammas
        small = q.abs() < 1e-4
        safe = torch.where(small, torch.ones_like(q), q)
        factor = torch.where(small, 1 + q / 2 + q.square() / 6, safe.expm1() / safe)
        scale = self.weights.double() * ((self.source - a)[:, None] * log_gammas).exp() * span * factor
        return -self._sum(scale)

    def _sum(self, scale: Tensor) -> Tensor:
        spread = scale.reshape(*scale.shape, *[1] * (self.means.dim() - 2))
        return (spread * self.means.double()).sum(1).to(self.means.dtype)


class PolicyMap:
    """ArcFlow: a network gives a `Policy`, whose displacement is integrated in closed form.

    Args:
        network: `network(x_t, t, cond)` → `Policy`.
        schedule: what the times mean.

    Source: ArcFlow, 2026 (pnotp/ArcFlow).
    """

    def __init__(self, network: Callable[..., Policy], schedule: NoiseSchedule) -> None:
        self.network, self.schedule = network, schedule

    def jump(self, x_t: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None) -> Tensor:
        """One evaluation, then the closed form."""
        t, s = per_sample(t, x_t), per_sample(s, x_t, "s")
        tally()
        return x_t + self.network(x_t, t, cond).displacement(t, s)
