"""Times: the grid a sampler walks (`StepSchedule`) and the distributions that training draws from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import NoiseSchedule


@dataclass(frozen=True, slots=True, eq=False)
class StepSchedule:
    """Times of a sampler, from noise to data.

    Attributes:
        times: `[N + 1]` float64, falling strictly; the last is where the sample is taken (0, as a rule).

    Raises:
        ValueError: fewer than two times, or times that do not fall.

    Example:
        >>> StepSchedule.uniform(4).times.tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    times: Tensor

    def __post_init__(self) -> None:
        times = torch.as_tensor(self.times, dtype=torch.float64)
        if times.dim() != 1 or len(times) < 2:
            raise ValueError(f"times has shape {list(times.shape)}; give [N + 1] with N ≥ 1")
        if not bool((times[1:] < times[:-1]).all()):
            raise ValueError(f"times is {times.tolist()}; it must fall strictly")
        object.__setattr__(self, "times", times)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times) - 1

    @classmethod
    def uniform(cls, steps: int, schedule: NoiseSchedule | None = None) -> StepSchedule:
        """Equal steps from t_max to t_min of a schedule, or from 1 to 0."""
        _at_least_one("steps", steps)
        high, low = (1.0, 0.0) if schedule is None else (schedule.t_max, schedule.t_min)
        return cls(torch.linspace(high, low, steps + 1, dtype=torch.float64))

    @classmethod
    def shifted(cls, steps: int, shift: float) -> StepSchedule:
        """Equal steps of t, then t ← shift·t/(1 + (shift − 1)·t), on [0, 1]."""
        if not shift > 0:
            raise ValueError(f"shift is {shift}; it must be > 0")
        t = cls.uniform(steps).times
        return cls(shift * t / (1 + (shift - 1) * t))

    @classmethod
    def karras(
        cls, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> StepSchedule:
        """EDM's levels, (σ_max^{1/ρ} + i/(N−1)·(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, then 0."""
        _at_least_one("steps", steps)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min, sigma_max are {sigma_min}, {sigma_max}; need 0 < sigma_min < sigma_max"
            )
        i = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
        levels = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
        return cls(torch.cat([levels, levels.new_zeros(1)]))

    def segments(self, k: int) -> list[StepSchedule]:
        """The grid cut into k consecutive parts of equally many steps.

        Raises:
            ValueError: k does not divide N.
        """
        _at_least_one("k", k)
        if self.steps % k:
            raise ValueError(f"k is {k}; it must divide the {self.steps} steps")
        size = self.steps // k
        return [StepSchedule(self.times[i * size : (i + 1) * size + 1]) for i in range(k)]

    def phase_bounds(self, k: int) -> list[tuple[float, float]]:
        """(t_{k−1}, t_k) of each of the k segments, from noise to data."""
        return [(float(part.times[0]), float(part.times[-1])) for part in self.segments(k)]


class TimeSampler(ABC):
    """A distribution of training times."""

    @abstractmethod
    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """`[B]` float64 times; drawn on the generator's device, or on the CPU."""

    def __call__(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """The same as `sample`."""
        return self.sample(batch, generator)


class UniformTimes(TimeSampler):
    """Uniform on [low, high].

    Example:
        >>> t = UniformTimes(0.02, 0.98)(4, torch.Generator().manual_seed(0))
        >>> t.shape, t.dtype, bool((t >= 0.02).all())
        (torch.Size([4]), torch.float64, True)
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not low <= high:
            raise ValueError(f"low, high are {low}, {high}; need low ≤ high")
        self.low, self.high = low, high

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """low + (high − low)·u."""
        return self.low + (self.high - self.low) * _rand(batch, generator)


class IndexTimes(TimeSampler):
    """A whole number, uniform in low … high − 1: the times of networks trained on DDPM's indices."""

    def __init__(self, high: int, low: int = 0) -> None:
        if not low < high:
            raise ValueError(f"low, high are {low}, {high}; need low < high")
        self.low, self.high = low, high

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Integers as float64."""
        device = "cpu" if generator is None else generator.device
        draw = torch.randint(self.low, self.high, (batch,), generator=generator, device=device)
        return draw.double()


class LogitNormalTimes(TimeSampler):
    """sigmoid(mean + std·n) with n ~ N(0, 1); a positive mean favours noise."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not std > 0:
            raise ValueError(f"std is {std}; it must be > 0")
        self.mean, self.std = mean, std

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Times in (0, 1)."""
        device = "cpu" if generator is None else generator.device
        n = torch.randn(batch, generator=generator, dtype=torch.float64, device=device)
        return torch.sigmoid(self.mean + self.std * n)


class ShiftedTimes(TimeSampler):
    """Another sampler's times in [0, 1], moved by t ← shift·t/(1 + (shift − 1)·t)."""

    def __init__(self, base: TimeSampler, shift: float) -> None:
        if not shift > 0:
            raise ValueError(f"shift is {shift}; it must be > 0")
        self.base, self.shift = base, shift

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Shifted times."""
        t = self.base.sample(batch, generator)
        return self.shift * t / (1 + (self.shift - 1) * t)


class KarrasTimes(TimeSampler):
    """A uniform index into EDM's grid of noise levels."""

    def __init__(
        self, steps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> None:
        self.levels = StepSchedule.karras(steps, sigma_min, sigma_max, rho).times[:-1]

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise levels."""
        device = "cpu" if generator is None else generator.device
        index = torch.randint(len(self.levels), (batch,), generator=generator, device=device)
        return self.levels.to(device)[index]


class StratifiedTimes(TimeSampler):
    """One uniform draw between each pair of neighbouring nodes, after the first node itself (TBCM's route).

    Args:
        nodes: `[M]` falling times, the first of them the noise end.

    `sample(M)` gives the first node and M − 1 stratified draws, falling; the batch has to be M.
    """

    def __init__(self, nodes: Sequence[float] | Tensor) -> None:
        self.nodes = StepSchedule(torch.as_tensor(nodes, dtype=torch.float64)).times

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """`[M]` falling times.

        Raises:
            ValueError: batch is not the number of nodes.
        """
        if batch != len(self.nodes):
            raise ValueError(f"batch is {batch}; a route over {len(self.nodes)} nodes has one time a node")
        device = "cpu" if generator is None else generator.device
        nodes = self.nodes.to(device)
        draws = nodes[1:] + (nodes[:-1] - nodes[1:]) * _rand(batch - 1, generator)
        return torch.cat([nodes[:1], draws])


def trig_route(steps: int, shift: float = 2.5) -> Tensor:
    """TBCM's reference nodes: flow levels σ on a shifted grid, t = atan(σ/(1 − σ)), the first π/2.

    Returns:
        `[steps]` falling angles.
    """
    sigma = StepSchedule.shifted(steps, shift).times[:-1]
    angles = torch.atan2(sigma, 1 - sigma)
    angles[0] = math.pi / 2
    return angles


def _rand(batch: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.rand(batch, generator=generator, dtype=torch.float64, device=device)


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer ≥ 1")
