"""The diffusion of a point cloud: noise as an offset from each point (LiDiff), or plain DDPM (LiDPM).

    local:  x_t = p + σ_t·ε            vp:  x_t = √ᾱ_t·p + σ_t·ε            σ_t = √(1 − ᾱ_t)

Points are in metres, neither centred nor scaled. t is a whole number in 0 … T − 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stillhouse.core.diffusion import DiscreteVP, Local, NoiseSchedule

Kind = Literal["local", "vp"]


class LocalProcess:
    """LiDiff's process x_t = p + σ_t·ε over T steps of linear β.

    Args:
        beta_start: first β.
        beta_end: last β.
        steps: T.

    Attributes:
        schedule: α and σ at an index.
        kind: "local".
        steps: T.

    Source: Nunes et al., LiDiff, CVPR 2024 (PRBonn/LiDiff config.yaml): 3.5e-5 … 0.007 over 1000 steps.

    Example:
        >>> process = LocalProcess()
        >>> [round(float(process.sigma(t)), 4) for t in (0, 100, 999)]
        [0.0059, 0.195, 0.9852]
    """

    kind: Kind = "local"
    schedule: NoiseSchedule

    def __init__(self, beta_start: float = 3.5e-5, beta_end: float = 0.007, steps: int = 1000) -> None:
        self.beta_start, self.beta_end, self.steps = float(beta_start), float(beta_end), int(steps)
        self.schedule = self._schedule()

    def _schedule(self) -> NoiseSchedule:
        return Local.linear(self.beta_start, self.beta_end, self.steps)

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ_t, float64."""
        return self.schedule.sigma(t)

    def add_noise(self, points: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """x_t from clean points `[B, N, 3]`, noise of that shape and t `[B]` or a number."""
        return self.schedule.add_noise(points, eps, t)

    def clean(self, x_t: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The points that x_t and its noise imply, (x_t − σ_t·ε)/α_t."""
        time = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).reshape(-1, 1, 1)
        sigma, alpha = self.schedule.sigma(time), self.schedule.alpha(time)
        return (x_t - sigma.to(x_t.dtype) * eps) / alpha.to(x_t.dtype)

    def draw_times(
        self, batch: int, device: torch.device | str = "cpu", *, high: int | None = None
    ) -> Tensor:
        """Whole numbers, uniform in 0 … high − 1 (T − 1 by default), int64 `[batch]`."""
        return torch.randint(self.steps if high is None else high, (batch,), device=device)

    def times(self, steps: int, *, start: int | None = None) -> list[int]:
        """The indices that a sampler visits: `steps` equal parts of [0, start], without the 0.

        Args:
            steps: number of network evaluations, at most `start`.
            start: first index, T − 1 by default.

        Example:
            >>> LocalProcess().times(8)
            [999, 874, 749, 624, 500, 375, 250, 125]
        """
        start = self.steps - 1 if start is None else start
        if not 1 <= start < self.steps:
            raise ValueError(f"start is {start}; it must lie in 1 … {self.steps - 1}")
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= start:
            raise ValueError(f"steps is {steps!r}; it must be an integer in 1 … {start}")
        grid = torch.linspace(0, start, steps + 1, dtype=torch.float64).round().long()
        return grid.flip(0)[:-1].tolist()


class VPProcess(LocalProcess):
    """The variance-preserving process of DDPM on the same β: what LiDPM starts from a noised scan.

    Source: LiDPM, arXiv 2504.17791: x_t0 = √ᾱ·scan + √(1 − ᾱ)·z at an intermediate t0.
    """

    kind: Kind = "vp"

    def _schedule(self) -> NoiseSchedule:
        return DiscreteVP.linear(self.beta_start, self.beta_end, self.steps)


def tile(partial: Tensor, count: int) -> Tensor:
    """Partial points repeated to `count`: where the completion starts.

    Args:
        partial: `[B, n, 3]`.
        count: wanted points N ≥ n; the last repetition is cut where n does not divide it.

    Returns:
        `[B, N, 3]`, the whole list again and again.

    Example:
        >>> tile(torch.arange(6.0).reshape(1, 2, 3), 5).shape
        torch.Size([1, 5, 3])
    """
    if partial.dim() != 3 or partial.shape[2] != 3 or partial.shape[1] == 0:
        raise ValueError(f"partial has shape {list(partial.shape)}; give [B, n, 3] with n ≥ 1")
    if count < partial.shape[1]:
        raise ValueError(f"count is {count}; it must be at least the {partial.shape[1]} partial points")
    repeats = -(-count // partial.shape[1])
    return partial.repeat(1, repeats, 1)[:, :count]
