"""Score teachers and students on the same sweeps: quality, network evaluations, seconds.

All contenders complete a sweep before the next sweep is begun, in an order that turns from sweep to sweep, so
that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.core.metrics import bootstrap_interval

from .config import LidarConfig
from .fit import Teacher, map_cache, pair_config
from .io import ScanSource
from .metrics import evaluate_cloud
from .networks import NoiseNet, SinglePassNet
from .pairs import Pair, evaluation_pair
from .process import LocalProcess, tile
from .samplers import keep_scene, sample

Family = Literal["teacher", "few_step", "single_pass"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Something that completes a thinned sweep.

    Attributes:
        name: of the network, as a row of the table has it.
        family: "teacher", "few_step" or "single_pass".
        steps: sampler steps; 1 for a single pass.
        guidance: w; 1 is none.
        parameters: of the networks that run.
        complete: `complete(partial [1, n, 3], generator)` → (points [1, N, 3], network evaluations).
    """

    name: str
    family: Family
    steps: int
    guidance: float
    parameters: int
    complete: Callable[[Tensor, torch.Generator], tuple[Tensor, int]]

    @property
    def title(self) -> str:
        """Name with the number of steps."""
        return self.name if self.family == "single_pass" else f"{self.name}, {_steps(self.steps)}"


@dataclass(slots=True)
class Scored:
    """What a contender made of the test sweeps.

    Attributes:
        contender: who.
        values: metric → one value a sweep.
        groups: the drive of each sweep.
        seconds: of each sweep.
        evaluations: network evaluations of one sweep.
        clouds: completed clouds of the first sweep of each drive, by drive.
    """

    contender: Contender
    values: dict[str, list[float]] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: int = 0
    clouds: dict[str, np.ndarray] = field(default_factory=dict)

    def interval(self, metric: str, *, resamples: int = 2000) -> dict[str, float | None]:
        """Mean over the sweeps with the bootstrap interval over drives; no interval with one drive."""
        values = np.asarray(self.values[metric], dtype=np.float64)
        if len(set(self.groups)) < 2:
            return {"estimate": float(np.nanmean(values)), "low": None, "high": None}
        found = bootstrap_interval(values, groups=np.asarray(self.groups), resamples=resamples)
        return {"estimate": found.estimate, "low": found.low, "high": found.high}


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def diffusion_contender(
    name: str,
    family: Family,
    noise: NoiseNet,
    teacher: Teacher,
    config: LidarConfig,
    *,
    steps: int,
    guidance: float,
    process: LocalProcess | None = None,
) -> Contender:
    """A noise net with the teacher's encoder, sampled in `steps` steps."""
    process = teacher.process if process is None else process

    def complete(partial: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        condition = teacher.encoder(partial)
        result = sample(
            noise,
            condition,
            tile(partial, partial.shape[1] * config.data.factor),
            steps=steps,
            sampler=config.evaluate.sampler,
            guidance=guidance,
            null=None if guidance == 1 else condition.null(),
            process=process,
            generator=generator,
        )
        return result.points, result.evaluations

    return Contender(
        name=name,
        family=family,
        steps=steps,
        guidance=guidance,
        parameters=parameters(noise, teacher.encoder),
        complete=complete,
    )


def single_contender(name: str, network: SinglePassNet) -> Contender:
    """A single-pass network."""

    def complete(partial: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        return network(partial, generator=generator), 1

    return Contender(
        name=name,
        family="single_pass",
        steps=1,
        guidance=1.0,
        parameters=parameters(network),
        complete=complete,
    )


def refined(contender: Contender, teacher: Teacher) -> Contender:
    """The same with the refinement net behind it."""
    refine = teacher.refine
    if refine is None:
        raise ValueError("the teacher has no refinement net; set model.refine_channels")

    def complete(partial: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        points, evaluations = contender.complete(partial, generator)
        return refine(points).flatten(1, 2), evaluations + 1

    return Contender(
        name=f"{contender.name}{REFINED}",
        family=contender.family,
        steps=contender.steps,
        guidance=contender.guidance,
        parameters=contender.parameters + parameters(refine),
        complete=complete,
    )


def parameters(*networks: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for network in networks for p in network.parameters())


def scene_pairs(
    config: LidarConfig, sources: Sequence[ScanSource], *, scans: int | None = None
) -> list[tuple[str, Pair]]:
    """Thinned sweeps with their ground truth, (name of the drive, pair), spread over each drive."""
    settings, cache = pair_config(config, augment=False), map_cache(config)
    pairs = []
    for source in sources:
        map_points = cache.get(source)
        if source.poses is None:
            raise ValueError(f"{source.name}: has no poses")
        wanted = min(config.evaluate.scans if scans is None else scans, len(source))
        for index in np.unique(np.linspace(0, len(source) - 1, wanted).round().astype(int)):
            pair = evaluation_pair(source[int(index)], map_points, source.poses[index], settings)
            pairs.append((source.name, pair))
    return pairs


@torch.no_grad()
def score(
    contenders: Sequence[Contender],
    pairs: Sequence[tuple[str, Pair]],
    config: LidarConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Scored]:
    """Let every contender complete every sweep.

    Args:
        contenders: who; their networks on `device` and in evaluation mode.
        pairs: (drive, pair) as `scene_pairs` has them.
        config: `data.max_range` and `evaluate` are used.
        seed: of the starting noise, the same for all contenders.
        device: where the networks are.
        progress: called as `progress(done, total)` over the sweeps.

    Returns:
        One `Scored` for each contender, in their order.
    """
    rows = [Scored(contender) for contender in contenders]
    for number, (drive, pair) in enumerate(pairs):
        partial = torch.from_numpy(pair.partial)[None].to(device)
        turn = number % max(1, len(rows))
        for row in (*rows[turn:], *rows[:turn]):
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            begun = time.perf_counter()
            points, row.evaluations = row.contender.complete(partial, generator)
            if points.is_cuda:
                torch.cuda.synchronize()
            row.seconds.append(time.perf_counter() - begun)
            kept = points[0][keep_scene(points[0], partial[0], max_range=config.data.max_range)]
            cloud = kept.float().cpu().numpy()
            found = evaluate_cloud(
                cloud, pair.full, convention=config.evaluate.convention, levels=config.evaluate.levels
            )
            for metric, value in found.items():
                if value is not None:
                    row.values.setdefault(metric, []).append(float(value))
            row.groups.append(drive)
            row.clouds.setdefault(drive, cloud)
        if progress is not None:
            progress(number + 1, len(pairs))
    return rows


def contenders_of(config: LidarConfig, teacher: Teacher, students: Mapping[str, Any]) -> list[Contender]:
    """The rows of a run's table: the teacher at each number of steps, then each student.

    Args:
        config: `evaluate` says how many steps and how much guidance.
        teacher: the teacher.
        students: networks by the name of their method.
    """
    evaluate = config.evaluate
    rows = [
        diffusion_contender(
            "teacher",
            "teacher",
            teacher.noise,
            teacher,
            config,
            steps=steps,
            guidance=evaluate.teacher_guidance,
        )
        for steps in evaluate.teacher_steps
    ]
    for method, network in students.items():
        if isinstance(network, SinglePassNet):
            rows.append(single_contender(TITLES[method], network))
            continue
        rows += [
            diffusion_contender(
                TITLES[method],
                "few_step",
                network,
                teacher,
                config,
                steps=steps,
                guidance=evaluate.student_guidance,
            )
            for steps in evaluate.student_steps
        ]
    if teacher.refine is not None:
        rows += [refined(row, teacher) for row in rows if _is_refined(row, config)]
    return rows


def _is_refined(row: Contender, config: LidarConfig) -> bool:
    """Whether a row is also shown with refinement: the slowest teacher, and students as they are used."""
    if row.family == "teacher":
        return row.steps == max(config.evaluate.teacher_steps)
    return row.family == "single_pass" or row.steps == config.evaluate.steps


REFINED = ", refined"
TITLES = {
    "distillation_dpo": "Distillation-DPO student",
    "vsd": "VSD student",
    "scorelidar": "ScoreLiDAR student",
    "single_pass": "single-pass student",
    "single_pass_alone": "single-pass network without a teacher",
}
