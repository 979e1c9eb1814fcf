"""Few-step students by score distillation: plain VSD, ScoreLiDAR, Distillation-DPO.

The student G completes the scan in a step or a few; auxiliary noise nets follow what G makes; the difference
of the teacher's and an auxiliary net's noise prediction, at the noised completion, is the gradient of G's
points.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stillhouse.core.diffusion import UpdateSchedule
from stillhouse.core.teacher import freeze
from stillhouse.core.train import Losses, Step

from ..losses import PairWeight, distillation_dpo_loss, keypoints, point_loss, scene_loss, vsd_loss
from ..nearest import chamfer_distances, chamfer_loss
from ..process import LocalProcess
from ..samplers import SamplerName, sample
from ._parts import Norm, clouds, mode, noised, null_condition

Method = Literal["vsd", "scorelidar", "distillation_dpo"]
Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass(kw_only=True, slots=True, frozen=True)
class ScoreConfig:
    """Settings of `ScoreDistiller`.

    Attributes:
        method: "vsd": the score term alone; "scorelidar": and the structural terms; "distillation_dpo": a
            winner and a loser with an auxiliary net each.
        loser_weight: λ of the loser (release: 1, which diverges in closed form).
        anchor: weight of an additional VSD term on the winner.
        pair_weight: "none", or "sigmoid" of the gap of the pair's Fisher divergences.
        beta: slope of that sigmoid.
        pair_noise: "scaled_1.1" starts the loser-to-be from the same noise times 1.1 (release); "independent"
            from noise of its own.
        ratio: updates of the auxiliary nets for each update of the student (release: 1).
        student_steps: sampler steps of the student in training; the last alone carries gradient.
        sampler: how the student's steps are made.
        guidance: w of the teacher's noise prediction in the score difference (release: 1, none).
        omega: ω(t) of the score term: "one", or "sigma" for σ_t.
        times: (low, high): the indices at which scores are compared, low ≤ t < high; None takes all.
        scene: weight of ScoreLiDAR's scene term (reference: 0.5).
        point: weight of its point term (reference: 0.01).
        match: how those two pair the points, see `losses.scene_loss`.
        data: weight of the Chamfer distance to the ground truth; 0 for none.
        norm: "frozen" keeps the normalisation statistics of the teacher in student and auxiliary nets;
            "batch" lets both use and gather those of their batches (release).
    """

    method: Method = "distillation_dpo"
    loser_weight: float = 0.25
    anchor: float = 0.0
    pair_weight: PairWeight = "none"
    beta: float = 1.0
    pair_noise: Literal["scaled_1.1", "independent"] = "scaled_1.1"
    ratio: int = 1
    student_steps: int = 1
    sampler: SamplerName = "local"
    guidance: float = 1.0
    omega: Literal["one", "sigma"] = "one"
    times: tuple[int, int] | None = None
    scene: float = 0.5
    point: float = 0.01
    match: Literal["index", "nearest"] = "nearest"
    data: float = 0.0
    norm: Norm = "frozen"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", get_args(Method)),
            ("pair_weight", get_args(PairWeight)),
            ("pair_noise", ("scaled_1.1", "independent")),
            ("sampler", get_args(SamplerName)),
            ("omega", ("one", "sigma")),
            ("match", ("index", "nearest")),
            ("norm", get_args(Norm)),
        ):
            if getattr(self, name) not in allowed:
                options = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {options}")
        for name in ("loser_weight", "anchor", "scene", "point", "data"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a finite number ≥ 0")
        for name in ("ratio", "student_steps"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        bounded = self.loser_weight < 0.9 or self.anchor > 0
        if self.method == "distillation_dpo" and not bounded:
            warnings.warn(
                f"loser_weight is {self.loser_weight} without an anchor: the objective has no lower bound "
                "and the student's spread may grow without end; 0.25 … 0.5, or an anchor of 1, keeps it",
                stacklevel=3,
            )


class ScoreDistiller:
    """Distils a noise net into a copy of itself that needs few steps: roles "student" and "critic".

    In each step the auxiliary nets are updated first, the student with them in every `ratio`-th step.

    Args:
        student: noise net to train; `student(x_t, condition, t)`.
        teacher: frozen noise net.
        encoder: frozen partial encoder, `encoder(partial)` → condition, `null()`.
        config: settings.
        process: the diffusion.
        metric: `metric(points, full)` → `[B]`, smaller is better: ranks a pair.
        critics: auxiliary nets by name, "winner" and with "distillation_dpo" also "loser"; copies of the
            teacher by default.

    Batches: {"partial": `[B, n, 3]`, "full": `[B, N, 3]`} in metres.

    Terms for the log: "score" is the surrogate, whose value means nothing; "fisher" is mean g², a distance
    from the teacher; "flip" is the share of pairs that the second completion wins, "tie" that of equal ones,
    "chamfer" the winner's distance in metres.

    Source: happyw1nd/DistillationDPO and happyw1nd/ScoreLiDAR, with the gradient they mean (`losses`).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        encoder: nn.Module,
        config: ScoreConfig | None = None,
        process: LocalProcess | None = None,
        *,
        metric: Metric = chamfer_distances,
        critics: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.config = ScoreConfig() if config is None else config
        self.process = LocalProcess() if process is None else process
        self.paired = self.config.method == "distillation_dpo"
        if (self.process.kind == "vp") != (self.config.sampler == "lidpm"):
            raise ValueError(
                f"sampler {self.config.sampler!r} does not go with the {self.process.kind!r} process"
            )
        names = ("winner", "loser") if self.paired else ("winner",)
        if critics is None:
            critics = {name: copy.deepcopy(teacher) for name in names}
            for critic in critics.values():
                _thaw(critic)
        if set(critics) != set(names):
            raise ValueError(
                f"critics are {sorted(critics)}; method {self.config.method!r} has {list(names)}"
            )
        self.student, self.critics = student, nn.ModuleDict(dict(critics))
        self.teacher, self.encoder, self.metric = freeze(teacher), freeze(encoder), metric
        self.schedule = UpdateSchedule(ratio=self.config.ratio, first="critic")

    def trainable(self) -> Mapping[str, nn.Module]:
        """The student; the auxiliary nets together."""
        return {"student": self.student, "critic": self.critics}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher and the partial encoder."""
        return {"teacher": self.teacher, "encoder": self.encoder}

    def roles(self, step: int) -> Sequence[str]:
        """The critic, then at every `ratio`-th step the student."""
        return self.schedule.roles(step)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Denoising of the student's completions, or the score difference."""
        partial, full, start = clouds(batch)
        with torch.no_grad():
            condition = self.encoder(partial)
        if role == "critic":
            return self._critic(condition, start, full)
        return self._student(condition, start, full)

    def generate(self, condition: Any, start: Tensor, noise: Tensor, *, grad: bool) -> Tensor:
        """The student's completion of tiled scans from standard normal noise, all `[B, N, 3]`."""
        return sample(
            self.student,
            condition,
            start,
            steps=self.config.student_steps,
            sampler=self.config.sampler,
            process=self.process,
            noise=noise,
            grad="last" if grad else "none",
        ).points

    def _pair(self, condition: Any, start: Tensor, full: Tensor, *, grad: bool) -> tuple[Tensor, ...]:
        """(winner, loser, distance of the winner, flips, ties); unpaired methods have one cloud for both."""
        z = torch.randn_like(start)
        training = grad and self.config.norm == "batch"
        with mode(self.student, training):
            first = self.generate(condition, start, z, grad=grad)
            if not self.paired:
                none = first.new_zeros(())
                return first, first, self.metric(first.detach(), full).mean(), none, none
            other = 1.1 * z if self.config.pair_noise == "scaled_1.1" else torch.randn_like(z)
            second = self.generate(condition, start, other, grad=grad)
        a, b = self.metric(first.detach(), full), self.metric(second.detach(), full)
        wins = (a <= b)[:, None, None]
        winner, loser = torch.where(wins, first, second), torch.where(wins, second, first)
        return winner, loser, torch.minimum(a, b).mean(), (a > b).float().mean(), (a == b).float().mean()

    def _critic(self, condition: Any, start: Tensor, full: Tensor) -> Losses:
        with torch.no_grad():
            winner, loser, distance, flip, tie = self._pair(condition, start, full, grad=False)
        terms: dict[str, Tensor] = {}
        with mode(self.critics, self.config.norm == "batch"):
            for name, points in (("winner", winner), ("loser", loser)):
                if name in self.critics:
                    x_t, t, eps = noised(self.process, points)  # times and noise of their own
                    terms[f"denoise_{name}"] = (self.critics[name](x_t, condition, t) - eps).square().mean()
        total = torch.stack(list(terms.values())).sum()
        return Losses(total, {**terms, "chamfer": distance, **self._log(flip, tie)})

    def _student(self, condition: Any, start: Tensor, full: Tensor) -> Losses:
        config = self.config
        winner, loser, distance, flip, tie = self._pair(condition, start, full, grad=True)
        with torch.no_grad(), mode(self.critics, False):
            t = self._times(len(winner), winner.device)
            eps = torch.randn_like(winner)
            omega = self.process.sigma(t).to(winner.dtype) if config.omega == "sigma" else 1.0
            g_w = self._difference("winner", winner.detach(), condition, t, eps)
            g_l = self._difference("loser", loser.detach(), condition, t, eps) if self.paired else g_w
        if self.paired:
            score = distillation_dpo_loss(
                winner,
                loser,
                g_w,
                g_l,
                loser_weight=config.loser_weight,
                anchor=config.anchor,
                pair_weight=config.pair_weight,
                beta=config.beta,
                omega=omega,
            )
        else:
            score = vsd_loss(winner, g_w, omega=omega)
        terms, weights = {"score": score}, {"score": 1.0}
        if config.method == "scorelidar":
            terms["scene"] = scene_loss(winner, full, match=config.match)
            terms["point"] = torch.stack(
                [
                    point_loss(p, q, keypoints(q), match=config.match)
                    for p, q in zip(winner, full, strict=True)
                ]
            ).mean()
            weights |= {"scene": config.scene, "point": config.point}
        if config.data:
            terms["data"] = chamfer_loss(winner, full)
            weights["data"] = config.data
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        terms |= {"fisher": g_w.square().mean(), "chamfer": distance, **self._log(flip, tie)}
        return Losses(total, terms)  # no weights: a surrogate's value says nothing about its size

    def _difference(self, name: str, x: Tensor, condition: Any, t: Tensor, eps: Tensor) -> Tensor:
        """ε_teacher − ε_aux at x noised with the given time and noise."""
        x_t = self.process.add_noise(x, eps, t)
        teacher = self.teacher(x_t, condition, t)
        if self.config.guidance != 1.0:
            without = self.teacher(x_t, null_condition(self.encoder, len(x)), t)
            teacher = without + self.config.guidance * (teacher - without)
        return teacher - self.critics[name](x_t, condition, t)

    def _times(self, batch: int, device: torch.device) -> Tensor:
        low, high = self.config.times or (0, self.process.steps)
        if not 0 <= low < high <= self.process.steps:
            raise ValueError(f"times is {(low, high)}; need 0 ≤ low < high ≤ {self.process.steps}")
        return torch.randint(low, high, (batch,), device=device)

    def _log(self, flip: Tensor, tie: Tensor) -> dict[str, Tensor]:
        return {"flip": flip, "tie": tie} if self.paired else {}


def _thaw(module: nn.Module) -> None:
    """Undo `freeze` on a copy: parts train again."""
    for part in module.modules():
        part.__dict__.pop("train", None)
    module.requires_grad_(True).train()
