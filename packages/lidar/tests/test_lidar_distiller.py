"""The distillers on tiny point networks: who trains, who never moves, which gradients flow, the log."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.testing import assert_gradient, assert_no_gradient
from stillhouse.core.train import Distiller, OptimConfig, Step, TrainConfig, Trainer
from stillhouse.lidar.distiller import (
    RefineDistiller,
    ScoreConfig,
    ScoreDistiller,
    SinglePassConfig,
    SinglePassDistiller,
    TeacherDistiller,
    TeacherPreferenceDistiller,
)
from stillhouse.lidar.nearest import chamfer_distances
from stillhouse.lidar.networks import NetworkConfig, NoiseNet, PartialEncoder, RefineNet, SinglePassNet
from stillhouse.lidar.process import LocalProcess, VPProcess
from stillhouse.lidar.samplers import sample


@dataclass
class TinyCondition:
    """`[B, 6]`; zeros stand for none."""

    value: Tensor

    def drop(self, which: Tensor) -> TinyCondition:
        return TinyCondition(torch.where(which[:, None], torch.zeros_like(self.value), self.value))

    def null(self) -> TinyCondition:
        return TinyCondition(torch.zeros_like(self.value))


class TinyEncoder(nn.Module):
    """Mean and spread of the partial points."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, partial: Tensor) -> TinyCondition:
        return TinyCondition(self.norm(self.linear(torch.cat([partial.mean(1), partial.std(1)], 1))))

    def null(self, batch_size: int) -> TinyCondition:
        return TinyCondition(torch.zeros(batch_size, 6))


class TinyNoise(nn.Module):
    """A point-wise perceptron with batch normalisation."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3 + 6 + 2, width), nn.BatchNorm1d(width)
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor, condition: TinyCondition, t: Tensor) -> Tensor:
        batch, count, _ = x.shape
        time = torch.stack([t / 1000, (t / 1000).square()], 1).to(x.dtype)
        context = torch.cat([condition.value, time], 1)[:, None].expand(batch, count, 8)
        hidden = self.first(torch.cat([x, context], 2)).flatten(0, 1)
        return self.last(self.norm(hidden)).reshape(batch, count, 3)


class TinySinglePass(nn.Module):
    """Each partial point to `factor` points near it; two stages."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.offsets, self.factor = nn.Linear(3, 3 * factor), factor

    def forward(self, partial: Tensor, *, total: int, return_coarse: bool) -> tuple[Tensor, Tensor]:
        assert return_coarse
        assert total == partial.shape[1] * self.factor
        offsets = self.offsets(partial).reshape(*partial.shape[:2], self.factor, 3)
        coarse = (partial[:, :, None] + offsets).flatten(1, 2)
        return coarse + 0.1 * offsets.flatten(1, 2), coarse


def pair(seed: int = 0, batch: int = 2) -> dict[str, Tensor]:
    """A ring of radius 2 m and a part of it."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(batch, 48, generator=generator)
    full = torch.stack(
        [2 * angle.cos(), 2 * angle.sin(), 0.1 * torch.randn(batch, 48, generator=generator)], 2
    )
    return {"partial": full[:, :24].clone(), "full": full}


def step(role: str) -> Step:
    return Step(
        index=0, total=10, epoch=0, role=role, micro=0, accumulate=1, num_items=None,
        device=torch.device("cpu"), rank=0, world_size=1,
    )  # fmt: skip


def networks() -> tuple[TinyNoise, TinyNoise, TinyEncoder]:
    """(student, teacher, encoder), the student a copy."""
    torch.manual_seed(0)
    teacher, encoder = TinyNoise(), TinyEncoder()
    return copy.deepcopy(teacher), teacher, encoder


class Endless:
    """Batches for ever."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (pair(seed) for seed in itertools.count())


def state(*modules: nn.Module) -> list[Tensor]:
    return [v.clone() for module in modules for v in (*module.parameters(), *module.buffers())]


def make(name: str) -> Distiller:
    student, teacher, encoder = networks()
    if name == "teacher":
        return TeacherDistiller(teacher, encoder)
    if name == "refine":
        return RefineDistiller(Refine())
    if name == "preference":
        return TeacherPreferenceDistiller(student, encoder, reference=teacher)
    if name == "single":
        config = SinglePassConfig(terms=("denoise", "completion"))
        return SinglePassDistiller(TinySinglePass(), teacher, encoder, config)
    if name == "single_alone":
        return SinglePassDistiller(TinySinglePass())
    return ScoreDistiller(student, teacher, encoder, ScoreConfig(method=name))  # type: ignore[arg-type]


class Refine(nn.Module):
    """Three points from each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 9)

    def forward(self, points: Tensor) -> Tensor:
        return points[:, :, None] + self.linear(points).tanh().reshape(*points.shape[:2], 3, 3)


NAMES = ["teacher", "refine", "preference", "vsd", "scorelidar", "distillation_dpo", "single", "single_alone"]


@pytest.mark.parametrize("name", NAMES)
def test_every_role_trains_its_own_networks_and_nothing_frozen_moves(name: str) -> None:
    distiller = make(name)
    assert isinstance(distiller, Distiller)
    frozen = list(distiller.frozen().values())
    before, start = state(*frozen), {k: state(v) for k, v in distiller.trainable().items()}
    for module in frozen:
        module.train()  # a careless parent
    config = TrainConfig(steps=4, threads=1, log_every=1)
    result = Trainer(config, out=None, quiet=True).fit(distiller, Endless(), OptimConfig(lr=1e-3))
    assert all(torch.equal(a, b) for a, b in zip(before, state(*frozen), strict=True))
    assert not any(part.training for module in frozen for part in module.modules())
    for role, module in distiller.trainable().items():
        assert any(not torch.equal(a, b) for a, b in zip(start[role], state(module), strict=True)), role
    assert all(math.isfinite(row["total"]) for row in result.history if "total" in row)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_all_of_a_role_and_end_there(name: str) -> None:
    distiller = make(name)
    for role, module in distiller.trainable().items():
        torch.manual_seed(1)
        if name == "teacher":
            distiller.drop_condition = 0.0  # type: ignore[attr-defined]
        if name in ("vsd", "scorelidar", "distillation_dpo") and role == "student":
            differ(distiller)  # at the start the auxiliary nets equal the teacher: T2
        loss = distiller.loss(role, pair(), step(role)).total
        others = [m for other, m in distiller.trainable().items() if other != role]
        live = [p for n, p in module.named_parameters() if not n.startswith("first.bias")]
        live = [p for p in live if not (name == "teacher" and p is module["encoder"].linear.bias)]
        assert_gradient(loss, live)
        for other in (*others, *distiller.frozen().values()):
            for parameter in other.parameters():
                parameter.requires_grad_(True)
            assert_no_gradient(loss, other)


def differ(distiller: Any) -> None:
    with torch.no_grad():
        for critic in distiller.critics.values():
            for parameter in critic.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("method", ["vsd", "distillation_dpo"])
def test_t2_a_student_stands_still_while_its_auxiliary_nets_equal_the_teacher(method: str) -> None:
    distiller = make(method)
    loss = distiller.loss("student", pair(), step("student")).total
    for gradient in torch.autograd.grad(loss, list(distiller.trainable()["student"].parameters())):
        assert float(gradient.abs().max()) == 0.0


def test_frozen_normalisation_keeps_its_statistics_and_batch_moves_them() -> None:
    for norm in ("frozen", "batch"):
        student, teacher, encoder = networks()
        distiller = ScoreDistiller(student, teacher, encoder, ScoreConfig(norm=norm))  # type: ignore[arg-type]
        student.train()
        before = student.norm.running_mean.clone()
        distiller.loss("student", pair(), step("student"))
        assert torch.equal(before, student.norm.running_mean) == (norm == "frozen")
        assert student.training  # as it was
        before = student.norm.running_mean.clone()
        distiller.loss("critic", pair(), step("critic"))
        assert torch.equal(before, student.norm.running_mean)  # the critic's turn never moves the student


def test_roles_alternate_by_the_ratio() -> None:
    student, teacher, encoder = networks()
    distiller = ScoreDistiller(student, teacher, encoder, ScoreConfig(ratio=3))
    turns = [tuple(distiller.roles(i)) for i in range(4)]
    assert turns == [("critic", "student"), ("critic",), ("critic",), ("critic", "student")]
    assert set(distiller.critics) == {"winner", "loser"}
    assert set(ScoreDistiller(student, teacher, encoder, ScoreConfig(method="vsd")).critics) == {"winner"}


def test_the_winner_is_the_one_with_the_smaller_distance_and_ties_are_logged() -> None:
    student, teacher, encoder = networks()
    seen: list[Tensor] = []

    def metric(points: Tensor, full: Tensor) -> Tensor:
        seen.append(points)
        # first call: the first completion of each scan; the second scan's first one loses
        return torch.tensor([1.0, 2.0]) if len(seen) == 1 else torch.tensor([1.0, 1.0])

    distiller = ScoreDistiller(student, teacher, encoder, metric=metric)
    winner, loser, distance, flip, tie = distiller._pair(
        encoder(pair()["partial"]), pair()["full"], pair()["full"], grad=False
    )
    assert torch.equal(winner[0], seen[0][0])
    assert torch.equal(winner[1], seen[1][1])
    assert torch.equal(loser[1], seen[0][1])
    assert (float(distance), float(flip), float(tie)) == (1.0, 0.5, 0.5)


def test_pair_noise_is_the_same_scaled_or_independent() -> None:
    for kind in ("scaled_1.1", "independent"):
        student, teacher, encoder = networks()
        distiller = ScoreDistiller(student, teacher, encoder, ScoreConfig(pair_noise=kind))  # type: ignore[arg-type]
        noises: list[Tensor] = []
        distiller.generate = lambda c, s, noise, grad, kept=noises: kept.append(noise) or noise  # type: ignore
        distiller._pair(None, torch.zeros(1, 200, 3), torch.zeros(1, 200, 3), grad=False)
        assert torch.equal(noises[1], 1.1 * noises[0]) == (kind == "scaled_1.1")


def test_an_unbounded_objective_warns_and_bad_settings_are_named() -> None:
    with pytest.warns(UserWarning, match="no lower bound"):
        ScoreConfig(loser_weight=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ScoreConfig(loser_weight=1.0, anchor=1.0)
    for options, message in (
        ({"method": "dpo"}, "method"),
        ({"loser_weight": -0.1}, "loser_weight"),
        ({"ratio": 0}, "ratio"),
        ({"pair_noise": "same"}, "pair_noise"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreConfig(**options)  # type: ignore[arg-type]
    student, teacher, encoder = networks()
    with pytest.raises(ValueError, match="does not go with"):
        ScoreDistiller(student, teacher, encoder, process=VPProcess())
    with pytest.raises(ValueError, match="critics"):
        ScoreDistiller(student, teacher, encoder, critics={"winner": copy.deepcopy(teacher)})
    with pytest.raises(ValueError, match="belong together"):
        SinglePassDistiller(TinySinglePass(), teacher)
    with pytest.raises(ValueError, match="terms"):
        SinglePassConfig(terms=("logits",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ends at"):
        SinglePassDistiller(TinySinglePass(), teacher, encoder, SinglePassConfig(levels=(0.1, 2.0)))
    with pytest.raises(ValueError, match="drop_condition"):
        TeacherDistiller(teacher, encoder, drop_condition=1.0)


def test_a_condition_is_dropped_as_often_as_it_says_also_at_batch_size_one() -> None:
    _, teacher, _ = networks()
    dropped = 0

    class Watching(TinyEncoder):
        def forward(self, partial: Tensor) -> TinyCondition:
            condition = super().forward(partial)
            drop = condition.drop

            def counting(which: Tensor) -> TinyCondition:
                nonlocal dropped
                dropped += int(which.sum())
                return drop(which)

            condition.drop = counting  # type: ignore[method-assign]
            return condition

    distiller = TeacherDistiller(teacher, Watching().eval(), drop_condition=0.3)
    torch.manual_seed(0)
    for _ in range(400):
        distiller.loss("teacher", pair(batch=1), step("teacher"))
    assert dropped / 400 == pytest.approx(0.3, abs=0.08)


class Ideal(nn.Module):
    """The noise net of a world whose points are N(centre, s²), for any schedule of the local process."""

    def __init__(self, centre: float, spread: float) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.tensor(centre))
        self.log_spread = nn.Parameter(torch.tensor(math.log(spread)))
        self.process = LocalProcess()

    def forward(self, x: Tensor, condition: Any, t: Tensor) -> Tensor:
        sigma = self.process.sigma(t.double())[:, None, None].to(x.dtype)
        return sigma * (x - self.centre) / (sigma**2 + (2 * self.log_spread).exp())


class NoCondition(nn.Module):
    """An encoder without anything to say."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("empty", torch.zeros(1))

    def forward(self, partial: Tensor) -> None:
        return None

    def null(self, batch_size: int) -> None:
        return None


class Shift(nn.Module):
    """A one-step student x = a + b·z in the guise of a noise net, for a scan at the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.3))
        self.top = float(LocalProcess().sigma(999.0))

    def forward(self, x: Tensor, condition: Any, t: Tensor) -> Tensor:
        # x = σ·z at the start, and the sampler returns x − σ·ε̂
        return (x - (self.a + self.b * x / self.top)) / self.top


@pytest.mark.parametrize("kind", ["teacher", "preference", "score", "single", "refine"])
def test_the_package_s_own_networks_fit_the_distillers(kind: str) -> None:
    torch.manual_seed(0)
    widths = NetworkConfig(channels=(8, 8, 16, 8, 8), voxel=0.5, point_offsets=True, factor=2)
    noise, encoder = NoiseNet(widths), PartialEncoder(widths)
    distiller: Distiller
    if kind == "teacher":
        distiller = TeacherDistiller(noise, encoder, drop_condition=0.5)
    elif kind == "preference":
        distiller = TeacherPreferenceDistiller(noise, encoder, guidance=2.0)
    elif kind == "score":
        config = ScoreConfig(guidance=2.0, student_steps=2, pair_weight="sigmoid", data=0.1)
        distiller = ScoreDistiller(copy.deepcopy(noise), noise, encoder, config)
    elif kind == "single":
        single = SinglePassConfig(terms=("denoise", "completion"), guidance=2.0)
        distiller = SinglePassDistiller(SinglePassNet(widths), noise, encoder, single)
    else:
        distiller = RefineDistiller(RefineNet(widths))
    before = state(*distiller.frozen().values())
    for role, module in distiller.trainable().items():
        loss = distiller.loss(role, pair(), step(role))
        assert math.isfinite(float(loss.total.detach()))
        assert_gradient(
            loss.total, [p for n, p in module.named_parameters() if "head" in n and "weight" in n]
        )
    assert all(torch.equal(a, b) for a, b in zip(before, state(*distiller.frozen().values()), strict=True))


@pytest.mark.parametrize("method", ["vsd", "distillation_dpo"])
def test_the_loop_finds_the_teacher_s_distribution(method: str) -> None:
    """Roles, auxiliary nets and surrogate together: a, b from (0.3, 0.3) to the teacher's (0, 0.1)."""
    student, teacher = Shift(), Ideal(0.0, 0.1)
    critics = {name: Ideal(0.3, 0.3) for name in (("winner", "loser") if method != "vsd" else ("winner",))}
    config = ScoreConfig(method=method, loser_weight=0.25)  # type: ignore[arg-type]
    distiller = ScoreDistiller(
        student, teacher, NoCondition(), config, critics=critics, metric=lambda p, q: p.norm(dim=2).mean(1)
    )
    batch = {"partial": torch.zeros(64, 16, 3), "full": torch.zeros(64, 16, 3)}
    optim = {
        "student": OptimConfig(name="adam", lr=2e-3, schedule="cosine"),
        "critic": OptimConfig(name="adam", lr=2e-2, schedule="constant"),
    }
    trainer = Trainer(TrainConfig(steps=600, threads=1, log_every=100), out=None, quiet=True)
    result = trainer.fit(distiller, itertools.repeat(batch), optim)
    assert float(student.a.detach()) == pytest.approx(0.0, abs=0.02)
    assert float(student.b.detach()) == pytest.approx(0.1, abs=0.02)
    fisher = [row["terms"]["fisher"] for row in result.history if row.get("role") == "student"]
    assert fisher[-1] < 0.1 * fisher[0]


def test_a_trained_teacher_completes_better_than_noise() -> None:
    torch.manual_seed(0)
    teacher, encoder = TinyNoise(64), TinyEncoder()
    distiller = TeacherDistiller(teacher, encoder, moment=1.0)
    trainer = Trainer(TrainConfig(steps=400, threads=1, log_every=50), out=None, quiet=True)
    result = trainer.fit(distiller, Endless(), OptimConfig(lr=3e-3))
    noise = [row["terms"]["noise"] for row in result.history if "terms" in row]
    assert noise[-1] < 0.8 * noise[0]
    teacher.eval()
    encoder.eval()
    batch = pair(999)
    with torch.no_grad():
        made = sample(teacher, encoder(batch["partial"]), batch["full"], steps=8)
        start = batch["full"] + LocalProcess().sigma(999).float() * torch.randn_like(batch["full"])
    noisy = chamfer_distances(start, batch["full"])
    assert float((chamfer_distances(made.points, batch["full"]) / noisy).max()) < 0.7


def test_denoising_pulls_points_to_where_the_teacher_has_them() -> None:
    """The teacher's points are N(0, 0.1²) on each axis; the gradient of a point is −σ·score at its noise."""
    distiller = SinglePassDistiller(
        TinySinglePass(), Ideal(0.0, 0.1), NoCondition(), SinglePassConfig(levels=(0.2, 0.2))
    )
    x = torch.tensor([[[0.5, -0.4, 0.0]]]).expand(1, 4000, 3).clone().requires_grad_()
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(distiller._denoise(x, None), x)
    sigma = float(LocalProcess().sigma(LocalProcess().schedule.t_from_log_snr(-2 * math.log(0.2)).round()))
    expected = sigma * torch.tensor([0.5, -0.4, 0.0]) / (sigma**2 + 0.1**2)
    assert torch.allclose(gradient.sum(1)[0] * 3, expected, atol=0.03)
    assert sigma == pytest.approx(0.2, abs=2e-3)
