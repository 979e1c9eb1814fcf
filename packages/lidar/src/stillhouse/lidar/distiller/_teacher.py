"""LiDiff's teacher: a noise net and the encoder of the partial scan, trained to tell the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stillhouse.core.train import Losses, Step

from ..losses import noise_loss
from ..process import LocalProcess
from ._parts import clouds, noised


class TeacherDistiller:
    """Trains noise net and partial encoder together: one role, "teacher".

    Args:
        noise_net: `noise_net(x_t [B, N, 3], condition, t [B])` → ε `[B, N, 3]`.
        encoder: `encoder(partial [B, n, 3])` → condition with `drop(which [B])`, which puts the condition
            that stands for none in the place of some.
        process: the diffusion; LiDiff's local one by default.
        moment: weight of the regulariser of the noise's moments (reference: 5).
        drop_condition: probability in [0, 1) with which a pair is trained without its condition (reference:
            0.1 for a whole batch, and never at batch size 1).

    Batches: {"partial": `[B, n, 3]`, "full": `[B, N, 3]`} in metres.

    Source: PRBonn/LiDiff models.py.
    """

    def __init__(
        self,
        noise_net: nn.Module,
        encoder: nn.Module,
        process: LocalProcess | None = None,
        *,
        moment: float = 5.0,
        drop_condition: float = 0.1,
    ) -> None:
        if not 0 <= drop_condition < 1:
            raise ValueError(f"drop_condition is {drop_condition}; it must lie in [0, 1)")
        self.process = LocalProcess() if process is None else process
        self.moment, self.drop_condition = moment, drop_condition
        self.networks = nn.ModuleDict({"noise": noise_net, "encoder": encoder})

    def trainable(self) -> Mapping[str, nn.Module]:
        """Noise net and encoder."""
        return {"teacher": self.networks}

    def frozen(self) -> Mapping[str, nn.Module]:
        """Nothing."""
        return {}

    def roles(self, step: int) -> Sequence[str]:
        """Always the teacher."""
        return ("teacher",)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Noise the true points, tell the noise."""
        partial, full, _ = clouds(batch)
        condition = self.networks["encoder"](partial)
        if self.drop_condition:
            condition = condition.drop(torch.rand(len(partial)) < self.drop_condition)
        x_t, t, eps = noised(self.process, full)
        parts = noise_loss(self.networks["noise"](x_t, condition, t), eps, moment=self.moment)
        return Losses(parts.total, {"noise": parts.noise, "moments": parts.moments})
