"""A second network that holds the moving average of another, as the target of consistency training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Decay = Callable[[int], float]


def constant_decay(decay: float) -> Decay:
    """The same decay at every update.

    Raises:
        ValueError: not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must lie in [0, 1)")
    return lambda update: decay


def power_decay(gamma: float) -> Decay:
    """(1 − 1/n)^{γ + 1} at the n-th update: the average spans a fixed share of the run, whatever its length.

    Args:
        gamma: γ ≥ 0; 0 is the plain mean of all weights so far.

    Source: Karras et al., EDM2, 2024, equation 123 and its neighbours.

    Example:
        >>> decay = power_decay(0.0)
        >>> decay(1), decay(4)
        (0.0, 0.75)
    """
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must be ≥ 0")
    return lambda update: (1 - 1 / update) ** (gamma + 1)


class EMA(nn.Module):
    """A frozen copy of a network whose parameters follow it: ē ← d·ē + (1 − d)·θ.

    The average that the trainer keeps for evaluation is `stillhouse.core.train`'s; this one is a network, to
    be called in a loss. Buffers are copied as they are.

    Args:
        network: the one to follow.
        decay: a number, or a function of the one-based update (`constant_decay`, `power_decay`).
        start: updates before the average starts; until then it equals the network.

    Attributes:
        network: the averaged copy, in eval mode and without gradient.
        updates: updates so far.

    Example:
        >>> live = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(live.weight, 0.0)
        >>> ema = EMA(live, 0.9)
        >>> _ = nn.init.constant_(live.weight, 1.0)
        >>> ema.update(live)
        >>> round(ema.network.weight.item(), 3)
        0.1
    """

    def __init__(self, network: nn.Module, decay: float | Decay, *, start: int = 0) -> None:
        super().__init__()
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start is {start!r}; it must be an integer ≥ 0")
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay if callable(decay) else constant_decay(decay)
        self.start = start
        self.register_buffer("_updates", torch.zeros((), dtype=torch.int64))

    _updates: Tensor

    @property
    def updates(self) -> int:
        """Updates so far."""
        return int(self._updates)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take the present weights of `network` in."""
        self._updates += 1
        n = self.updates - self.start
        decay = 0.0 if n <= 0 else self.decay(n)
        means: list[Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(means, [p.detach() for p in network.parameters()], 1 - decay)
        for mean, value in zip(self.network.buffers(), network.buffers(), strict=True):
            mean.copy_(value)

    def train(self, mode: bool = True) -> EMA:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, *inputs: Any) -> Any:
        """The averaged network's answer."""
        return self.network(*inputs)
