"""The refinement net: several points from each, on the surface rather than about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stillhouse.core.train import Losses, Step

from ..nearest import chamfer_loss


class RefineDistiller:
    """Trains the refinement net on jittered true clouds: one role, "refine".

    Args:
        network: `network(points [B, N, 3])` → `[B, N, K, 3]`, K points for each.
        jitter: standard deviation of the noise on the input, metres (reference: 0.2).
        clip: largest noise of a coordinate, metres (reference: 0.3).
        squared: squared distances in the Chamfer loss (reference).

    Batches: {"full": `[B, N, 3]`}; the target is the same cloud without noise.

    Source: PRBonn/LiDiff models_refine.py, which jitters an aggregate of 40 scans and thins the target.
    """

    def __init__(
        self, network: nn.Module, *, jitter: float = 0.2, clip: float = 0.3, squared: bool = True
    ) -> None:
        for name, value in (("jitter", jitter), ("clip", clip)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be > 0 metres")
        self.network, self.jitter, self.clip, self.squared = network, jitter, clip, squared

    def trainable(self) -> Mapping[str, nn.Module]:
        """The refinement net."""
        return {"refine": self.network}

    def frozen(self) -> Mapping[str, nn.Module]:
        """Nothing."""
        return {}

    def roles(self, step: int) -> Sequence[str]:
        """Always the refinement net."""
        return ("refine",)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Chamfer distance of what it makes of the jittered cloud."""
        full = batch["full"]
        noise = (self.jitter * torch.randn_like(full)).clamp(-self.clip, self.clip)
        refined = self.network(full + noise).flatten(1, 2)
        value = chamfer_loss(refined, full, squared=self.squared)
        return Losses(value, {"chamfer": value})
