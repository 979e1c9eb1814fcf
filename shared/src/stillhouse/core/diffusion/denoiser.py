"""The one face that teacher, critic and student have: a network with its schedule and kind of prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ._shape import per_sample
from .evaluations import tally
from .prediction import Prediction, convert
from .schedules import NoiseSchedule

Condition = Mapping[str, Tensor] | None


@runtime_checkable
class Denoiser(Protocol):
    """A network that knows its noise schedule and what it predicts; the caller picks the output it wants.

    Attributes:
        schedule: where α and σ come from.
        prediction: what the network itself gives.
    """

    schedule: NoiseSchedule
    prediction: Prediction

    def __call__(
        self, x_t: Tensor, t: Tensor | float, cond: Any = None, *, out: Prediction = Prediction.X0
    ) -> Tensor:
        """Prediction of kind `out` for `x_t [B, *S]` at `t [B]`, `[B, *S]`."""
        ...


class NetworkDenoiser(nn.Module):
    """Gives a network the face of a `Denoiser`.

    Args:
        network: `network(x_t, t, cond)` → `[B, *S]`; t arrives as `[B]` float32 times `time_scale`. A network
            that takes a second time (a flow map) is called with `r=` as well, one with feature taps with
            `features=`, one with a variance head with `logvar=True`, each only where the caller asks.
        schedule: where α and σ come from.
        prediction: what the network gives.
        time_scale: factor on t before the network sees it, for example 1000.

    Example:
        >>> from stillhouse.core.diffusion import RectifiedFlow
        >>> class Zero(nn.Module):
        ...     def forward(self, x, t, cond):
        ...         return torch.zeros_like(x)
        >>> teacher = NetworkDenoiser(Zero(), RectifiedFlow(), Prediction.FLOW)
        >>> teacher(torch.ones(1, 2), 0.5)
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.time_scale = time_scale

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | float,
        cond: Any = None,
        *,
        r: Tensor | float | None = None,
        out: Prediction = Prediction.X0,
        features: Sequence[int] = (),
        logvar: bool = False,
    ) -> Any:
        """Prediction of kind `out`, `[B, *S]`.

        Args:
            x_t: `[B, *S]`.
            t: `[B]` or a number, native time.
            cond: handed to the network as it is.
            r: second time of a flow map, `[B]` or a number.
            out: wanted kind.
            features: layers whose activations the network returns beside its output.
            logvar: the network returns its log-variance beside its output.

        Returns:
            The prediction, or a tuple (prediction, whatever else the network returned).
        """
        time = per_sample(t, x_t)
        extra: dict[str, Any] = {}
        if r is not None:
            extra["r"] = (per_sample(r, x_t, "r") * self.time_scale).float()
        if features:
            extra["features"] = tuple(features)
        if logvar:
            extra["logvar"] = True
        tally()
        answer = self.network(x_t, (time * self.time_scale).float(), cond, **extra)
        raw, *rest = answer if isinstance(answer, tuple) else (answer,)
        prediction = convert(x_t, raw, time, self.prediction, out, self.schedule)
        return (prediction, *rest) if rest else prediction


class FunctionDenoiser:
    """A `Denoiser` from a plain function, for oracles and for parts without parameters.

    Args:
        function: `function(x_t, t [B] float64, cond)` → `[B, *S]`.
        schedule: where α and σ come from.
        prediction: what the function gives.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Any], Tensor],
        schedule: NoiseSchedule,
        prediction: Prediction,
    ) -> None:
        self.function, self.schedule, self.prediction = function, schedule, prediction

    def __call__(
        self, x_t: Tensor, t: Tensor | float, cond: Any = None, *, out: Prediction = Prediction.X0
    ) -> Tensor:
        """Prediction of kind `out`, `[B, *S]`."""
        time = per_sample(t, x_t)
        tally()
        raw = self.function(x_t, time, cond)
        return convert(x_t, raw, time, self.prediction, out, self.schedule)


def velocity(denoiser: Denoiser, x_t: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
    """dx/dt of the probability-flow ODE by a denoiser, in the schedule's own time: α′·x₀ + σ′·ε.

    Args:
        denoiser: teacher or student.
        x_t: `[B, *S]`.
        t: `[B]` or a number; at t_min some schedules have an infinite slope.
        cond: condition of the denoiser.

    Returns:
        `[B, *S]`, towards the noise.
    """
    flow = denoiser(x_t, t, cond, out=Prediction.FLOW)
    schedule = denoiser.schedule
    eps = convert(x_t, flow, t, Prediction.FLOW, Prediction.EPS, schedule)
    return schedule.velocity(eps - flow, eps, t)


def at_level(schedule: NoiseSchedule, other: NoiseSchedule, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """Time of `other` with the signal-to-noise ratio that `schedule` has at `t`, and the factor on x.

    x_other = factor · x has the same (x₀, ε): factor = α_other/α, or σ_other/σ where α is 0.

    Returns:
        (time, factor), float64, in the shape of t.
    """
    time = other.t_from_log_snr(schedule.log_snr(t))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    use_alpha = alpha > sigma
    factor = torch.where(
        use_alpha,
        other.alpha(time) / torch.where(use_alpha, alpha, 1.0),
        other.sigma(time) / torch.where(use_alpha, 1.0, sigma),
    )
    return time, factor
