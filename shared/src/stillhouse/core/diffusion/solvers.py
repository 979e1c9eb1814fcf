"""Solvers of the probability-flow ODE: DDIM, Euler, Heun.

For a rectified flow, DDIM and Euler are the same step. DDIM is exact for a denoiser that always answers the
same x₀, on any schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ._shape import like, per_sample
from .denoiser import Denoiser, velocity
from .prediction import split
from .schedules import NoiseSchedule


def ddim_jump(x_t: Tensor, x0: Tensor, eps: Tensor, s: Tensor | float, schedule: NoiseSchedule) -> Tensor:
    """x_s = α_s·x₀ + σ_s·ε, in the dtype of x_t.

    Args:
        x_t: `[B, *S]`; gives dtype and device.
        x0: predicted x₀, float64.
        eps: the noise it implies, float64.
        s: target time, `[B]` or a number.
        schedule: where α and σ come from.
    """
    s = per_sample(s, x_t, "s")
    a, b = like(schedule.alpha(s), x_t), like(schedule.sigma(s), x_t)
    return (a * x0 + b * eps).to(x_t.dtype)


class OdeSolver(ABC):
    """Moves x from one time to another along a denoiser's ODE."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None
    ) -> Tensor:
        """x at time s from x at time t; `x [B, *S]`, times `[B]` or numbers, in either direction."""

    def solve(
        self, denoiser: Denoiser, x: Tensor, times: Tensor, cond: Any = None, *, return_path: bool = False
    ) -> Any:
        """Steps through all times in order.

        Args:
            denoiser: whose ODE.
            x: start at times[0], `[B, *S]`.
            times: `[N + 1]`; N steps are made.
            cond: condition of the denoiser.
            return_path: also return the list of the N + 1 states.

        Returns:
            The last state, or (last state, path).

        Raises:
            ValueError: fewer than two times.
        """
        if times.dim() != 1 or len(times) < 2:
            raise ValueError(f"times has shape {list(times.shape)}; give [N + 1] with N ≥ 1")
        path = [x]
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            x = self.step(denoiser, x, t, s, cond)
            if return_path:
                path.append(x)
        return (x, path) if return_path else x


class DDIM(OdeSolver):
    """x_s = α_s·x₀(x_t) + σ_s·ε(x_t), deterministic DDIM; one evaluation a step.

    Source: Song et al., DDIM, ICLR 2021, equation 12 with η = 0.

    Example:
        >>> import torch
        >>> from stillhouse.core.diffusion import FunctionDenoiser, Prediction, RectifiedFlow
        >>> always_two = FunctionDenoiser(lambda x, t, cond: 2 + 0 * x, RectifiedFlow(), Prediction.X0)
        >>> DDIM().step(always_two, torch.tensor([[0.5]]), 1.0, 0.0)
        tensor([[2.]])
    """

    def step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None
    ) -> Tensor:
        """One jump."""
        flow = denoiser(x, t, cond, out=denoiser.prediction)
        x0, eps = split(x, flow, t, denoiser.prediction, denoiser.schedule)
        return ddim_jump(x, x0, eps, s, denoiser.schedule)


class Euler(OdeSolver):
    """x_s = x_t + (s − t)·dx/dt in the schedule's time; one evaluation a step."""

    def step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None
    ) -> Tensor:
        """One step."""
        delta = per_sample(s, x, "s") - per_sample(t, x)
        return (x + like(delta, x) * velocity(denoiser, x, t, cond)).to(x.dtype)


class Heun(OdeSolver):
    """The trapezoidal rule on an Euler step; two evaluations a step, one on a step that ends where σ = 0.

    Source: Karras et al., EDM, 2022, algorithm 1.
    """

    def step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Any = None
    ) -> Tensor:
        """One step."""
        delta = like(per_sample(s, x, "s") - per_sample(t, x), x)
        first = velocity(denoiser, x, t, cond)
        ahead = (x + delta * first).to(x.dtype)
        if bool((denoiser.schedule.sigma(per_sample(s, x, "s")) == 0).any()):
            return ahead
        second = velocity(denoiser, ahead, s, cond)
        return (x + delta * (first.double() + second.double()) / 2).to(x.dtype)
