"""The single-pass student: a light network that completes a scan at once, with or without the teacher's help.

What a diffusion teacher can give such a network, beside the ground truth it was itself trained on:

- "denoise": where the student's points are noised a little, the teacher says where they came from. The step
  from a point to the teacher's x̂ is the gradient of the teacher's log density at that noise level: it pulls
  points onto the surfaces the teacher believes in, and tells them apart from the space between. One extra
  evaluation a step.
- "completion": the teacher's own completion of the same scan as a second target of the Chamfer distance; it
  covers what the drive never saw. A full sampling a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.core.diffusion import score_matching_surrogate
from stillhouse.core.teacher import freeze
from stillhouse.core.train import Losses, Step

from ..nearest import chamfer_loss
from ..process import LocalProcess, tile
from ..samplers import sample
from ._parts import null_condition

Term = Literal["denoise", "completion"]


@dataclass(kw_only=True, slots=True, frozen=True)
class SinglePassConfig:
    """Settings of `SinglePassDistiller`.

    Attributes:
        terms: what the teacher gives: "denoise", "completion", or both; see the head of the module.
        weight: weight of each term beside the Chamfer distance to the ground truth.
        levels: (low, high): noise levels σ in metres at which the teacher is asked to denoise.
        guidance: w of the teacher's guidance; 1 is none.
        steps: sampler steps of "completion".
        backward: weight of the target-to-points half of the Chamfer distance, see `nearest.chamfer_loss`.
        squared: squared distances in it.
        coarse: weight of the Chamfer distance of what goes into the refinement.
    """

    terms: tuple[Term, ...] = ("denoise",)
    weight: float = 0.5
    levels: tuple[float, float] = (0.05, 0.5)
    guidance: float = 1.0
    steps: int = 4
    backward: float = 1.0
    squared: bool = False
    coarse: float = 0.5

    def __post_init__(self) -> None:
        if not self.terms or not set(self.terms) <= {"denoise", "completion"}:
            raise ValueError(f"terms is {self.terms!r}; name 'denoise', 'completion' or both")
        if not 0 < self.levels[0] <= self.levels[1]:
            raise ValueError(f"levels is {self.levels!r}; need 0 < low ≤ high metres")
        for name in ("weight", "coarse"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a finite number ≥ 0")
        for name, least in (("steps", 1), ("backward", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least {least}")


class SinglePassDistiller:
    """Trains a single-pass network: one role, "student".

    Args:
        student: `student(partial [B, n, 3], total=N, return_coarse=True)` → (completion `[B, N, 3]`, what
            went into its refinement `[B, N, 3]`).
        teacher: frozen noise net, or None for the baseline without a teacher.
        encoder: the teacher's frozen partial encoder.
        config: settings.
        process: the teacher's diffusion.

    Batches: {"partial": `[B, n, 3]`, "full": `[B, N, 3]`} in metres.

    Raises:
        ValueError: a teacher without its encoder.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        encoder: nn.Module | None = None,
        config: SinglePassConfig | None = None,
        process: LocalProcess | None = None,
    ) -> None:
        if (teacher is None) != (encoder is None):
            raise ValueError("teacher and encoder belong together; give both or neither")
        self.student = student
        self.teacher = None if teacher is None else freeze(teacher)
        self.encoder = None if encoder is None else freeze(encoder)
        self.config = SinglePassConfig() if config is None else config
        self.process = LocalProcess() if process is None else process
        if self.process.kind != "local":
            raise ValueError("the single-pass student learns from a teacher of the local process")
        schedule = self.process.schedule
        top = float(schedule.sigma(schedule.t_max))
        if self.config.levels[1] > top:
            raise ValueError(f"levels is {self.config.levels!r}; the process ends at σ = {top:.3f} m")

    def trainable(self) -> Mapping[str, nn.Module]:
        """The student."""
        return {"student": self.student}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher and its encoder, where there is one."""
        if self.teacher is None or self.encoder is None:
            return {}
        return {"teacher": self.teacher, "encoder": self.encoder}

    def roles(self, step: int) -> Sequence[str]:
        """Always the student."""
        return ("student",)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Chamfer distance to the ground truth, and what the teacher says."""
        config, partial, full = self.config, batch["partial"], batch["full"]
        points, coarse = self.student(partial, total=full.shape[1], return_coarse=True)
        terms = {"chamfer": self._chamfer(points, full)}
        weights = {"chamfer": 1.0}
        if config.coarse:
            terms["coarse"] = self._chamfer(coarse, full)
            weights["coarse"] = config.coarse
        if self.teacher is not None and self.encoder is not None and config.weight:
            with torch.no_grad():
                condition = self.encoder(partial)
            if "denoise" in config.terms:
                terms["denoise"] = self._denoise(points, condition)
                weights["denoise"] = config.weight
            if "completion" in config.terms:
                terms["completion"] = self._chamfer(points, self._completion(condition, partial, full))
                weights["completion"] = config.weight
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return Losses(total, terms, weights=weights, task="chamfer")

    def _chamfer(self, points: Tensor, target: Tensor) -> Tensor:
        return chamfer_loss(points, target, squared=self.config.squared, backward=self.config.backward)

    def _denoise(self, points: Tensor, condition: Any) -> Tensor:
        """A loss with the gradient ε̂(x + σ·ε) − ε = (x − x̂)/σ in the points: −σ times the teacher's score."""
        config = self.config
        with torch.no_grad():
            low, high = config.levels
            level = low * (high / low) ** torch.rand(len(points), dtype=torch.float64)
            t = self.process.schedule.t_from_log_snr(-2 * level.log()).round().long().to(points.device)
            sigma = self.process.sigma(t).to(points.dtype)
            eps = torch.randn_like(points)
            x_t = self.process.add_noise(points.detach(), eps, t)
            predicted = self._ask(x_t, condition, t)
            # x − x̂ without the noise that is known: σ·(ε̂ − ε), of the same mean and less variance
            clean = points.detach() - sigma[:, None, None] * (predicted - eps)
        return score_matching_surrogate(points, points.detach(), clean, 1.0 / sigma, normaliser="none")

    def _ask(self, x_t: Tensor, condition: Any, t: Tensor) -> Tensor:
        assert self.teacher is not None
        assert self.encoder is not None
        predicted = self.teacher(x_t, condition, t)
        if self.config.guidance == 1.0:
            return predicted
        without = self.teacher(x_t, null_condition(self.encoder, len(x_t)), t)
        return without + self.config.guidance * (predicted - without)

    @torch.no_grad()
    def _completion(self, condition: Any, partial: Tensor, full: Tensor) -> Tensor:
        assert self.teacher is not None
        assert self.encoder is not None
        return sample(
            self.teacher,
            condition,
            tile(partial, full.shape[1]),
            steps=self.config.steps,
            process=self.process,
            guidance=self.config.guidance,
            null=None if self.config.guidance == 1.0 else null_condition(self.encoder, len(partial)),
        ).points
