"""Sampling with a flow map over a step schedule, counting network evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from .evaluations import count_evaluations
from .flow_maps import FlowMap
from .times import StepSchedule

Mode = Literal["ode", "sde", "tcd"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a sampler gives.

    Attributes:
        x: `[B, *S]` at the last time.
        evaluations: network evaluations of the whole batch; a guided step counts two.
        path: the N + 1 states, where they were asked for.
    """

    x: Tensor
    evaluations: int
    path: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def sample(
    student: FlowMap,
    z: Tensor,
    steps: StepSchedule,
    mode: Mode = "ode",
    *,
    gamma: float = 0.3,
    cond: Any = None,
    generator: torch.Generator | None = None,
    return_path: bool = False,
) -> Sample:
    """Walk the steps from noise to data.

    Args:
        student: the map.
        z: start at steps.times[0], `[B, *S]`: σ(t₀)·ε for the pure noise of a schedule with α(t₀) = 0.
        steps: the times.
        mode: "ode" jumps from time to time; "sde" jumps to the last time and noises again with fresh noise
            (the few-step sampler of consistency models and DMD); "tcd" jumps a share γ further than the next
            time and noises back up to it (γ = 0 is "ode", 1 is "sde").
        gamma: γ in [0, 1], for "tcd".
        cond: condition.
        generator: for the fresh noise.
        return_path: keep the states.

    Returns:
        A `Sample`.

    Source of "tcd": Zheng et al., Trajectory Consistency Distillation, 2024, whose s is an index rounded
    down; here it is the time (1 − γ)·t.

    Example:
        >>> from stillhouse.core.diffusion import FunctionDenoiser, Prediction, RectifiedFlow, X0Map
        >>> teacher = FunctionDenoiser(lambda x, t, cond: 2 + 0 * x, RectifiedFlow(), Prediction.X0)
        >>> result = sample(X0Map(teacher), torch.zeros(1, 1), StepSchedule.uniform(4))
        >>> result.x, result.evaluations
        (tensor([[2.]]), 4)
    """
    if mode not in ("ode", "sde", "tcd"):
        raise ValueError(f"mode is {mode!r}; allowed: 'ode', 'sde', 'tcd'")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must lie in [0, 1]")
    schedule = student.schedule
    schedule.check(steps.times, "steps")
    share = {"ode": 0.0, "sde": 1.0, "tcd": gamma}[mode]
    times, end = steps.times.tolist(), float(steps.times[-1])
    path, x = [z], z
    with count_evaluations() as made:
        for t, s in pairwise(times):
            low = s - share * (s - end)
            x = student.jump(x, t, low, cond)
            if low < s:
                fresh = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
                x = schedule.renoise(x, low, s, fresh)
            if return_path:
                path.append(x)
    return Sample(x, made.count, path if return_path else [])
