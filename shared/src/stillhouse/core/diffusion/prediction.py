"""What a network predicts, and conversion from one kind of prediction to another, in float64.

With x_t = α·x₀ + σ·ε:

| kind  | value                     | needs            |
|-------|---------------------------|------------------|
| X0    | x₀                        |                  |
| EPS   | ε                         |                  |
| FLOW  | ε − x₀                    |                  |
| V     | α·ε − σ·x₀                | α² + σ² = 1      |
| SCORE | −ε/σ = ∇ log p_t(x_t)     |                  |
| TRIG  | cos t·ε − sin t·x₀/σ_data | the Trig schedule |
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from ._shape import guarded, like, per_sample
from .schedules import NoiseSchedule, Trig


class Prediction(Enum):
    """Kind of a network's output; see the table at the head of the module."""

    X0 = "x0"
    EPS = "eps"
    V = "v"
    FLOW = "flow"
    SCORE = "score"
    TRIG = "trig"


def split(
    x_t: Tensor, out: Tensor, t: Tensor | float, kind: Prediction, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """(x₀, ε) in float64 that a prediction means, with α·x₀ + σ·ε = x_t wherever no division is guarded.

    Args:
        x_t: `[B, *S]`.
        out: the prediction, `[B, *S]`.
        t: `[B]` or a number, in the schedule's native time.
        kind: what `out` is.
        schedule: where α and σ come from.

    Raises:
        ValueError: the shapes differ, or the schedule has no prediction of this kind.
    """
    if out.shape != x_t.shape:
        raise ValueError(f"out has shape {list(out.shape)}, x_t {list(x_t.shape)}; they must be equal")
    _possible(kind, schedule)
    t = per_sample(t, x_t)
    a, s = like(schedule.alpha(t), x_t), like(schedule.sigma(t), x_t)
    x, y = x_t.double(), out.double()
    if kind is Prediction.X0:
        return y, (x - a * y) / guarded(s)
    if kind is Prediction.EPS:
        return (x - s * y) / guarded(a), y
    if kind is Prediction.SCORE:
        return (x + s.square() * y) / guarded(a), -s * y
    if kind is Prediction.FLOW:
        total = guarded(a + s)
        return (x - s * y) / total, (x + a * y) / total
    if kind is Prediction.V:
        return a * x - s * y, s * x + a * y
    data = schedule.sigma_data if isinstance(schedule, Trig) else 1.0
    sine = s / data
    return a * x - sine * data * y, (sine * x) / data + a * y


def convert(
    x_t: Tensor,
    out: Tensor,
    t: Tensor | float,
    src: Prediction,
    dst: Prediction,
    schedule: NoiseSchedule,
) -> Tensor:
    """The same prediction in another form.

    Goes through the pair (x₀, ε), so that a conversion divides only by what it must: EPS → SCORE never
    divides by α. Divisions are guarded at 1e-6.

    Args:
        x_t: `[B, *S]`.
        out: prediction of kind `src`, `[B, *S]`.
        t: `[B]` or a number.
        src: kind of `out`.
        dst: wanted kind.
        schedule: where α and σ come from.

    Returns:
        `[B, *S]` in the dtype of `out`; `out` itself when the kinds agree.

    Raises:
        ValueError: as `split`.

    Example:
        >>> import torch
        >>> from stillhouse.core.diffusion import RectifiedFlow
        >>> x_t, flow = torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> convert(x_t, flow, 0.5, Prediction.FLOW, Prediction.X0, RectifiedFlow())
        tensor([[0.]])
    """
    if src is dst:
        _possible(src, schedule)
        return out
    _possible(dst, schedule)
    x0, eps = split(x_t, out, t, src, schedule)
    if dst is Prediction.X0:
        return x0.to(out.dtype)
    if dst is Prediction.EPS:
        return eps.to(out.dtype)
    if dst is Prediction.FLOW:
        return (eps - x0).to(out.dtype)
    t = per_sample(t, x_t)
    a, s = like(schedule.alpha(t), x_t), like(schedule.sigma(t), x_t)
    if dst is Prediction.SCORE:
        return (-eps / guarded(s)).to(out.dtype)
    if dst is Prediction.V:
        return (a * eps - s * x0).to(out.dtype)
    data = schedule.sigma_data if isinstance(schedule, Trig) else 1.0
    return (a * eps - s / data * x0 / data).to(out.dtype)


def _possible(kind: Prediction, schedule: NoiseSchedule) -> None:
    if kind is Prediction.V and not schedule.variance_preserving:
        raise ValueError(f"Prediction.V needs α² + σ² = 1, which {schedule!r} does not have; use FLOW")
    if kind is Prediction.TRIG and not isinstance(schedule, Trig):
        raise ValueError(f"Prediction.TRIG belongs to the Trig schedule, not to {schedule!r}")
