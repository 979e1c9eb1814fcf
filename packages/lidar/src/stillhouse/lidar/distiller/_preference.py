"""Diffusion-DPO: the teacher is tuned to what the scene metric prefers, before it is distilled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.teacher import freeze
from stillhouse.core.train import Losses, Step

from ..losses import diffusion_dpo_loss
from ..nearest import chamfer_distances
from ..process import LocalProcess
from ..samplers import sample
from ._parts import clouds, mode, noised, null_condition

Metric = Callable[[Tensor, Tensor], Tensor]


class TeacherPreferenceDistiller:
    """Tunes the noise net on pairs that the network it started from makes: one role, "teacher".

    The reference network completes the scan twice; the completion with the smaller Chamfer distance wins.
    Winner and loser are noised at the same time, each with noise of its own.

    Args:
        noise_net: the network to tune.
        encoder: the frozen partial encoder.
        process: the diffusion.
        beta: βT of the sigmoid; the value of the paper's stage is not public.
        steps: sampler steps of the completions.
        guidance: w of their guidance.
        metric: `metric(points, full)` → `[B]`, smaller is better.
        reference: the frozen network it is held to; a copy of `noise_net` by default.

    Batches: {"partial": `[B, n, 3]`, "full": `[B, N, 3]`} in metres.

    Source: Wallace et al., Diffusion-DPO, 2023, as the stage that the Distillation-DPO release starts from;
    the training code of that stage is not public, so that pairs, β and steps are our reading.
    """

    def __init__(
        self,
        noise_net: nn.Module,
        encoder: nn.Module,
        process: LocalProcess | None = None,
        *,
        beta: float = 1.0,
        steps: int = 4,
        guidance: float = 1.0,
        metric: Metric = chamfer_distances,
        reference: nn.Module | None = None,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be > 0")
        self.network, self.encoder = noise_net, freeze(encoder)
        self.reference = freeze(copy.deepcopy(noise_net) if reference is None else reference)
        self.process = LocalProcess() if process is None else process
        self.beta, self.steps, self.guidance, self.metric = beta, steps, guidance, metric

    def trainable(self) -> Mapping[str, nn.Module]:
        """The noise net."""
        return {"teacher": self.network}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The reference network and the encoder."""
        return {"reference": self.reference, "encoder": self.encoder}

    def roles(self, step: int) -> Sequence[str]:
        """Always the teacher."""
        return ("teacher",)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Make a pair, rank it, prefer the winner."""
        with torch.no_grad():
            partial, full, start = clouds(batch)
            condition = self.encoder(partial)
            pair = [self._complete(condition, start) for _ in range(2)]
            scores = torch.stack([self.metric(points, full) for points in pair])
            first = (scores[0] <= scores[1])[:, None, None]
            x_w, x_l = torch.where(first, pair[0], pair[1]), torch.where(first, pair[1], pair[0])
            noised_w, t, eps_w = noised(self.process, x_w)
            noised_l, _, eps_l = noised(self.process, x_l, t)
            ref_w = _error(self.reference(noised_w, condition, t), eps_w)
            ref_l = _error(self.reference(noised_l, condition, t), eps_l)
        with mode(self.network, False):  # statistics of normalisation stay those of the reference
            own_w = _error(self.network(noised_w, condition, t), eps_w)
            own_l = _error(self.network(noised_l, condition, t), eps_l)
        value = diffusion_dpo_loss(own_w, own_l, ref_w, ref_l, beta=self.beta)
        right = ((own_w - ref_w) < (own_l - ref_l)).float().mean()
        gap = (scores[0] - scores[1]).abs().mean()
        terms = {"dpo": value, "winner": own_w.mean(), "preferred": right, "chamfer_gap": gap}
        return Losses(value, terms)

    def _complete(self, condition: Any, start: Tensor) -> Tensor:
        null = None if self.guidance == 1.0 else null_condition(self.encoder, len(start))
        return sample(
            self.reference,
            condition,
            start,
            steps=self.steps,
            sampler="lidpm" if self.process.kind == "vp" else "local",
            process=self.process,
            guidance=self.guidance,
            null=null,
        ).points


def _error(predicted: Tensor, eps: Tensor) -> Tensor:
    return (predicted - eps).square().flatten(1).mean(1)
