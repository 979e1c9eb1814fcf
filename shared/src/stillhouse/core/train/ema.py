"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import gathered, local, placed


class EMA:
    """Average ē ← d·ē + (1 − d)·θ of the parameters θ that are trained; everything else follows the network.

    After n updates ē = dⁿ·θ₀ + (1 − d)·Σᵢ dⁿ⁻ⁱ·θᵢ. The average starts at the network's weights, so that it
    needs no bias correction; buffers (running statistics) and frozen parameters are not averaged. Works on
    sharded parameters.

    Args:
        network: the network; its trainable parameters are followed.
        decay: d, strictly between 0 and 1.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 0.0)
        >>> ema = EMA(layer, decay=0.9)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> ema.update()
        >>> with ema.applied():
        ...     print(f"{layer.weight.item():.3f}")
        0.100
        >>> layer.weight.item()
        1.0
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; it must lie strictly between 0 and 1")
        self.decay = decay
        self._live = {name: p for name, p in network.named_parameters() if p.requires_grad}
        # half-precision weights are averaged in float32, where a step of (1 − d)·θ does not vanish
        self._mean = {name: _wide(p.detach()).clone() for name, p in self._live.items()}

    @property
    def names(self) -> set[str]:
        """Names of the averaged parameters."""
        return set(self._mean)

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights into the average."""
        means = [local(mean) for mean in self._mean.values()]
        live = [_wide(local(p.detach())) for p in self._live.values()]
        torch._foreach_lerp_(means, live, 1 - self.decay)

    @torch.no_grad()
    def copy_to_network(self) -> None:
        """Give the network the averaged weights for good."""
        for name, parameter in self._live.items():
            local(parameter.detach()).copy_(local(self._mean[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside the block and its own ones after it."""
        kept = [local(p.detach()).clone() for p in self._live.values()]
        self.copy_to_network()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._live.values(), kept, strict=True):
                    local(parameter.detach()).copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged parameters by name; sharded ones are gathered, then every rank has to call it."""
        return gathered(self._mean)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the names are not those of the network's trainable parameters.
        """
        if state.keys() != self._mean.keys():
            odd = sorted(state.keys() ^ self._mean.keys())
            raise ValueError(f"the average does not fit the network: {odd[:5]} are in one of them only")
        for name, mean in self._mean.items():
            local(mean).copy_(local(placed(state[name], mean)))


def _wide(tensor: Tensor) -> Tensor:
    """Float32 of a half-precision tensor; any other tensor itself."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
