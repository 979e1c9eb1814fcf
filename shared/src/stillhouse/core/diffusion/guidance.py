"""Classifier-free guidance: constant, drawn at random, or on an interval of times only.

    D_w = D_u + w·(D_c − D_u)          w = 1 is no guidance, w = 0 the unconditional answer

Some papers write (1 + w)·D_c − w·D_u, where no guidance is w = 0: `convention="extra"` reads scales so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ._shape import like, per_sample
from .denoiser import Denoiser
from .prediction import Prediction
from .schedules import NoiseSchedule

Scale = float | tuple[float, float]


class Guidance:
    """How strongly, where and in which convention a denoiser is guided.

    Args:
        scale: w; a pair (low, high) is drawn uniformly, one value a call, see `draw`.
        convention: "standard": w = 1 is none. "extra": w = 0 is none.
        interval: (t_low, t_high), both included: outside of it the conditional answer is taken alone.
        cond_drop: probability in [0, 1) of training without the condition, see `drop`.

    Raises:
        ValueError: a scale that is not finite, a pair in the wrong order, an unknown convention.

    Example:
        >>> Guidance(2.0).weight(), Guidance(1.0, convention="extra").weight()
        (2.0, 2.0)
    """

    def __init__(
        self,
        scale: Scale = 1.0,
        *,
        convention: Literal["standard", "extra"] = "standard",
        interval: tuple[float, float] | None = None,
        cond_drop: float = 0.0,
    ) -> None:
        ends = scale if isinstance(scale, tuple) else (scale, scale)
        if len(ends) != 2 or not all(math.isfinite(w) for w in ends) or ends[0] > ends[1]:
            raise ValueError(f"scale is {scale!r}; give a finite number or a pair (low, high)")
        if convention not in ("standard", "extra"):
            raise ValueError(f"convention is {convention!r}; allowed: 'standard', 'extra'")
        if interval is not None and not (len(interval) == 2 and interval[0] <= interval[1]):
            raise ValueError(f"interval is {interval!r}; give (t_low, t_high) with t_low ≤ t_high")
        if not 0 <= cond_drop < 1:
            raise ValueError(f"cond_drop is {cond_drop}; it must lie in [0, 1)")
        self.scale, self.convention, self.interval, self.cond_drop = scale, convention, interval, cond_drop

    def weight(self, scale: float | None = None) -> float:
        """w in the standard convention; a random scale has to be given."""
        if scale is None:
            if isinstance(self.scale, tuple):
                raise ValueError(f"the scale is drawn from {self.scale}; draw() one and give it")
            scale = self.scale
        return float(scale) + (1.0 if self.convention == "extra" else 0.0)

    def draw(self, generator: torch.Generator | None = None) -> float:
        """A scale in this object's convention: the constant one, or uniform between the two ends."""
        if not isinstance(self.scale, tuple):
            return float(self.scale)
        low, high = self.scale
        device = "cpu" if generator is None else generator.device
        return low + (high - low) * float(torch.rand((), generator=generator, device=device))

    def drop(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """bool `[B]`: which samples train without their condition."""
        device = "cpu" if generator is None else generator.device
        return torch.rand(batch, generator=generator, device=device) < self.cond_drop

    def __call__(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor | float,
        cond: Any,
        null_cond: Any,
        scale: float | None = None,
        *,
        out: Prediction = Prediction.X0,
    ) -> Tensor:
        """D_u + w·(D_c − D_u), with one network evaluation where one is enough, else two.

        Args:
            denoiser: who is asked.
            x_t: `[B, *S]`.
            t: `[B]` or a number.
            cond: the condition.
            null_cond: what stands for no condition.
            scale: in this object's convention; None takes the constant one.
            out: kind of prediction; guidance is the same in any of them, being linear.

        Returns:
            `[B, *S]`.
        """
        w = self.weight(scale)
        time = per_sample(t, x_t)
        inside = torch.ones_like(time, dtype=torch.bool)
        if self.interval is not None:
            inside = (time >= self.interval[0]) & (time <= self.interval[1])
        if w == 1.0 or not bool(inside.any()):
            return denoiser(x_t, t, cond, out=out)
        if w == 0.0 and bool(inside.all()):
            return denoiser(x_t, t, null_cond, out=out)
        with_cond = denoiser(x_t, t, cond, out=out)
        without = denoiser(x_t, t, null_cond, out=out)
        weights = torch.where(inside, w, 1.0).to(without.dtype)
        return without + like(weights, without) * (with_cond - without)

    def bind(self, denoiser: Denoiser, null_cond: Any, scale: float | None = None) -> GuidedDenoiser:
        """The guided denoiser as a denoiser, for solvers, maps and samplers."""
        return GuidedDenoiser(denoiser, self, null_cond, scale)


class GuidedDenoiser:
    """A denoiser whose answer is guided; made by `Guidance.bind`, or with a function of its own.

    Args:
        denoiser: who is asked.
        guidance: a `Guidance`, or any function with its signature.
        null_cond: what stands for no condition.
        scale: fixed scale, or None for the guidance's own.
    """

    schedule: NoiseSchedule
    prediction: Prediction

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: Callable[..., Tensor],
        null_cond: Any,
        scale: float | None = None,
    ) -> None:
        self.denoiser, self.guidance, self.null_cond, self.scale = denoiser, guidance, null_cond, scale
        self.schedule, self.prediction = denoiser.schedule, denoiser.prediction

    def __call__(
        self, x_t: Tensor, t: Tensor | float, cond: Any = None, *, out: Prediction = Prediction.X0
    ) -> Tensor:
        """Guided prediction of kind `out`."""
        return self.guidance(self.denoiser, x_t, t, cond, self.null_cond, self.scale, out=out)
