"""The objective, its schedules and its balancer inside the trainer: one checkpoint holds them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stillhouse.core.losses import DistillationLoss, Term, Uncertainty, forward_kl
from stillhouse.core.schedules import Linear, TaidAdaptive, Warmup
from stillhouse.core.teacher import FrozenTeacher, assert_frozen, weight_hash
from stillhouse.core.train import Losses, OptimConfig, SeededLoader, Step, TrainConfig, Trainer


class Method:
    def __init__(self, stop_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.teacher = FrozenTeacher(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
        self.student = nn.Linear(4, 3)
        self.t = TaidAdaptive(total=12, start=0.2, alpha=0.5)
        self.objective = DistillationLoss(
            {
                "ce": Term(nn.functional.cross_entropy, weight=0.5),
                "kd": Term(forward_kl, weight=Warmup(1.0, steps=5), temperature=Linear(4.0, 2.0, steps=10)),
                "size": Term(lambda size, coef: coef * size, settings={"coef": self.t}),
            },
            task="ce",
            balancer=Uncertainty(("ce", "kd", "size")),
        )
        self.network = nn.ModuleDict({"student": self.student, "objective": self.objective})
        self.stop_at = stop_at
        self.last = 0.0

    def trainable(self) -> dict[str, nn.Module]:
        return {"student": self.network}

    def frozen(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def loss(self, role: str, batch: tuple[Tensor, Tensor], step: Step) -> Losses:
        if step.index == self.stop_at:
            raise KeyboardInterrupt
        x, y = batch
        z = self.student(x)
        result = self.objective(
            {"ce": (z, y), "kd": (z, self.teacher(x)), "size": z.square().mean()}, step.index
        )
        self.last = float(result.terms["ce"].detach())
        return Losses(result.total, result.terms, result.weights, result.task)

    def after_update(self, role: str, step: Step) -> None:
        self.t.update(self.last, step.index)


def train(out: Path, stop_at: int | None = None) -> Method:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(48, 4, generator=generator), torch.randint(0, 3, (48,), generator=generator)
    )
    method = Method(stop_at)
    trainer = Trainer(TrainConfig(steps=12, checkpoint_every=3, ema=0.9), out=out, quiet=True)
    trainer.fit(method, SeededLoader(data, batch_size=8, seed=0), OptimConfig(lr=0.05))
    return method


def test_a_resumed_run_has_the_same_schedules_balancer_and_student(tmp_path: Path):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=7)
    resumed = train(tmp_path / "cut")
    assert resumed.t.state_dict() == whole.t.state_dict()
    assert resumed.t.t > 0.5  # it moved
    for mine, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert whole.objective.balancer.log_variance.abs().min() > 1e-3  # type: ignore[union-attr,operator]


def test_training_leaves_the_teacher_alone(tmp_path: Path):
    digest = weight_hash(Method().teacher)
    method = train(tmp_path)
    assert weight_hash(method.teacher) == digest
    assert_frozen(method.teacher, owners=[method.network])
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*.safetensors"))
    assert b"student.weight" in stored
    assert b"running_mean" not in stored
