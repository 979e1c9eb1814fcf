from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import nn

from stillhouse.core.errors import ConfigError
from stillhouse.core.testing import TinyConvNet, TinyMLP, ToyDistiller, TwoRoleDistiller, toy_data
from stillhouse.core.train import (
    EMA,
    Callback,
    Distiller,
    Losses,
    OptimConfig,
    ProgressBar,
    SeededLoader,
    Step,
    TrainConfig,
    Trainer,
)


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 12, "threads": 1, **values})


def loader(**values: Any) -> SeededLoader:
    return SeededLoader(toy_data(), **{"batch_size": 8, **values})


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


# -- roles -----------------------------------------------------------------------------------------


class Recorder(TwoRoleDistiller):
    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.seen: list[tuple[int, str, int, int]] = []
        self.grads: list[tuple[str, bool]] = []
        self.batches: list[tuple[int, str, float]] = []

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        self.seen.append((step.index, role, step.micro, step.update))
        self.batches.append((step.index, role, float(batch[0].sum())))
        return super().loss(role, batch, step)

    def after_update(self, role: str, step: Step) -> None:
        other = self.critic if role == "student" else self.student
        self.grads.append((role, any(p.grad is not None and bool(p.grad.any()) for p in other.parameters())))
        super().after_update(role, step)


def test_roles_are_updated_in_order_with_their_own_counters() -> None:
    distiller = Recorder(ratio=3)
    trainer = Trainer(config(steps=4, accumulate=2), out=None)
    trainer.fit(distiller, loader(), OptimConfig())
    expected = [
        *[(0, "critic", m, 0) for m in (0, 1)],
        *[(0, "student", m, 0) for m in (0, 1)],
        *[(1, "critic", m, 1) for m in (0, 1)],
        *[(2, "critic", m, 2) for m in (0, 1)],
        *[(3, "critic", m, 3) for m in (0, 1)],
        *[(3, "student", m, 1) for m in (0, 1)],
    ]
    assert distiller.seen == expected
    assert trainer.role_updates == {"student": 2, "critic": 4}
    assert not any(leaked for _, leaked in distiller.grads)  # a role's update leaves no gradient in the other
    by_step: dict[tuple[int, str], list[float]] = {}
    for index, role, total in distiller.batches:
        by_step.setdefault((index, role), []).append(total)
    assert by_step[0, "critic"] == by_step[0, "student"]  # all roles of a step see the same batches
    assert all(p.requires_grad for n in distiller.trainable().values() for p in n.parameters())


def test_each_role_has_its_own_optimizer_and_a_schedule_of_its_own_length() -> None:
    optim = {
        "student": OptimConfig(lr=1.0, schedule="linear", name="sgd", momentum=0.0),
        "critic": OptimConfig(lr=0.5, schedule="linear"),
    }
    trainer = Trainer(config(steps=6, log_every=1), out=None)
    history = trainer.fit(TwoRoleDistiller(ratio=3), loader(), optim).history
    rates = {role: [row["lr"] for row in history if row["role"] == role] for role in ("student", "critic")}
    assert rates["student"] == pytest.approx([1.0, 0.5])  # two updates in six steps
    assert rates["critic"] == pytest.approx([0.5 * (1 - k / 6) for k in range(6)])


def test_two_roles_equal_a_hand_written_alternating_loop() -> None:
    trained, bare = TwoRoleDistiller(ratio=2), TwoRoleDistiller(ratio=2)
    optim = OptimConfig(lr=1e-2, schedule="constant")
    Trainer(config(steps=10), out=None).fit(trained, loader(), optim)
    optimizers = {
        k: torch.optim.AdamW(n.parameters(), lr=1e-2, weight_decay=0.0) for k, n in bare.trainable().items()
    }
    batches = iter(loader())
    for index in range(10):
        batch = next(batches)
        for role in bare.roles(index):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            bare.loss(role, batch, None).total.backward()  # type: ignore[arg-type]
            optimizers[role].step()
    for role in ("student", "critic"):
        assert torch.equal(weights(trained.trainable()[role]), weights(bare.trainable()[role])), role


def test_wrong_roles_are_named() -> None:
    class Wrong(ToyDistiller):
        def roles(self, step: int) -> Sequence[str]:
            return ("student",) if step < 3 else ("criticc",)

    with pytest.raises(ValueError, match=r"roles\(3\) names 'criticc'"):
        Trainer(config(), out=None).fit(Wrong(), loader(), OptimConfig())
    with pytest.raises(ConfigError, match="optim names the roles"):
        Trainer(config(), out=None).fit(ToyDistiller(), loader(), {"teacher": OptimConfig()})


# -- what a step does ------------------------------------------------------------------------------


def test_accumulation_equals_the_large_batch() -> None:
    parts, whole = ToyDistiller(), ToyDistiller()
    small = SeededLoader(toy_data(), batch_size=4, shuffle=False)
    large = SeededLoader(toy_data(), batch_size=16, shuffle=False)
    optim = OptimConfig(name="sgd", lr=0.1)
    Trainer(config(accumulate=4), out=None).fit(parts, small, optim)
    Trainer(config(), out=None).fit(whole, large, optim)
    torch.testing.assert_close(weights(parts.student), weights(whole.student), rtol=1e-5, atol=1e-6)


class Masked(ToyDistiller):
    """A sum over the samples that count, divided by how many count in the whole step."""

    def __init__(self, counted: bool = True) -> None:
        super().__init__()
        if counted:
            self.num_items = lambda batch: int((batch[1] != 3).sum())

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        x, y = batch
        kept = y != 3
        each = nn.functional.cross_entropy(self.student(x), y, reduction="none")
        count = step.num_items if step.num_items is not None else max(int(kept.sum()), 1)
        ce = (each * kept).sum() / count
        return Losses(ce, {"ce": ce})


def test_global_count_makes_ragged_micro_batches_equal_the_large_batch() -> None:
    optim = OptimConfig(name="sgd", lr=0.1)

    def run(counted: bool, size: int, accumulate: int) -> torch.Tensor:
        distiller = Masked(counted)
        data = SeededLoader(toy_data(), batch_size=size, shuffle=False)
        Trainer(config(accumulate=accumulate), out=None).fit(distiller, data, optim)
        return weights(distiller.student)

    whole = run(True, 16, 1)
    torch.testing.assert_close(run(True, 2, 8), whole, rtol=1e-5, atol=1e-6)
    assert (run(False, 2, 8) - whole).abs().max() > 1e-3  # a mean of means is another objective


def test_clipping_bounds_the_update_and_logs_the_norm() -> None:
    distiller = ToyDistiller(kd_weight=50.0)
    before = weights(distiller.student)
    optim = OptimConfig(name="sgd", lr=1.0, momentum=0.0, schedule="constant")
    result = Trainer(config(steps=1, clip_norm=0.01), out=None).fit(distiller, loader(), optim)
    assert (weights(distiller.student) - before).norm().item() == pytest.approx(0.01, rel=1e-4)
    free = ToyDistiller(kd_weight=50.0)
    Trainer(config(steps=1), out=None).fit(free, loader(), optim)
    norm = (weights(free.student) - before).norm().item()
    assert norm > 1
    assert result.history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(precision: str) -> None:
    distiller = ToyDistiller()
    optim = OptimConfig(lr=2e-2, schedule="constant")
    result = Trainer(config(steps=80, precision=precision), out=None).fit(distiller, loader(), optim)
    assert result.history[-1]["total"] < 0.7 * result.history[0]["total"]
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {p.dtype for p in distiller.student.parameters()} == {dtype}


def test_half_precision_without_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        Trainer(config(precision="16-mixed", accelerator="cpu"), out=None).fit(
            ToyDistiller(), loader(), OptimConfig()
        )


def test_mixed_precision_computes_in_bfloat16_and_leaves_the_batch_alone() -> None:
    class Look(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            assert batch[0].dtype == torch.float32
            assert self.student(batch[0]).dtype == torch.bfloat16
            return super().loss(role, batch, step)

    Trainer(config(steps=2, precision="bf16-mixed"), out=None).fit(Look(), loader(), OptimConfig())


def test_losses_are_checked() -> None:
    class Vector(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            return Losses(self.student(batch[0]).sum(dim=1), {})

    class Detached(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            return Losses(torch.tensor(1.0), {})

    class Plain(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            return super().loss(role, batch, step).total  # type: ignore[return-value]

    class VectorTerm(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            losses = super().loss(role, batch, step)
            return Losses(losses.total, {"each": torch.zeros(3)})

    for kind, error, message in (
        (Vector, ValueError, r"shape \(8,\)"),
        (Detached, ValueError, "requires_grad = False"),
        (Plain, TypeError, "must return Losses"),
        (VectorTerm, ValueError, "term 'each' has shape"),
    ):
        with pytest.raises(error, match=message):
            Trainer(config(), out=None).fit(kind(), loader(), OptimConfig())


# -- average ---------------------------------------------------------------------------------------


def test_ema_has_its_closed_form() -> None:
    d = 0.8
    distiller, plain = ToyDistiller(), ToyDistiller()
    path: list[torch.Tensor] = [weights(plain.student)]

    class Path_(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            path.append(weights(plain.student))

    Trainer(config(), out=None, callbacks=[Path_()]).fit(plain, loader(), OptimConfig())
    Trainer(config(ema=d), out=None).fit(distiller, loader(), OptimConfig())
    expected = d**12 * path[0].double() + (1 - d) * sum(
        d ** (12 - i) * path[i].double() for i in range(1, 13)
    )
    torch.testing.assert_close(weights(distiller.student).double(), expected, rtol=0, atol=1e-6)


def test_ema_of_half_precision_weights_does_not_stall() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(layer.weight)
    ema = EMA(layer, 0.999)
    nn.init.ones_(layer.weight)
    for _ in range(1000):
        ema.update()
    assert ema.state_dict()["weight"].item() == pytest.approx(1 - 0.999**1000, rel=1e-3)
    with ema.applied():
        assert layer.weight.item() == pytest.approx(0.632, abs=0.004)
    assert layer.weight.item() == 1.0


def test_evaluation_sees_the_average_in_eval_mode_and_changes_nothing() -> None:
    seen: list[tuple[int, bool, bool, torch.Tensor]] = []

    def evaluate(distiller: Distiller, step: int) -> dict[str, float]:
        student = distiller.trainable()["student"]
        torch.rand(7)
        seen.append((step, student.training, torch.is_grad_enabled(), weights(student)))
        return {"accuracy": 0.5}

    looked, blind = ToyDistiller(dropout=0.3), ToyDistiller(dropout=0.3)
    looked.student.dropout.eval()  # type: ignore[union-attr, operator]
    trainer = Trainer(config(ema=0.9, evaluate_every=5), out=None)
    result = trainer.fit(looked, loader(), OptimConfig(), evaluate=evaluate)
    Trainer(config(ema=0.9), out=None).fit(blind, loader(), OptimConfig())
    assert torch.equal(weights(looked.student), weights(blind.student))
    assert [(step, training, grad) for step, training, grad, _ in seen] == [
        (s, False, False) for s in (5, 10, 12)
    ]
    assert torch.equal(seen[-1][3], weights(looked.student))  # what is delivered is what was evaluated
    assert looked.student.training
    assert [row for row in result.history if "evaluate" in row][-1] == {
        "step": 12,
        "evaluate": {"accuracy": 0.5},
    }


# -- teachers --------------------------------------------------------------------------------------


class ModuleDistiller(nn.Module):
    """An `nn.Module` that holds everything, puts everything in train mode, and has a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        inner = ToyDistiller()
        self.student, self.teacher = inner.student, nn.Sequential(inner.teacher, nn.Dropout(0.9))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("bank", torch.zeros(4, 4))

    def trainable(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def roles(self, step: int) -> Sequence[str]:
        return ("student",)

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        self.train()
        assert not any(m.training for m in self.teacher.modules())
        self.calls += 1
        x, _ = batch
        loss = (self.student(x) - self.teacher(x)).square().mean()
        return Losses(loss, {"l2": loss})


def test_frozen_teacher_stays_out_of_everything(tmp_path: Path) -> None:
    distiller = ModuleDistiller()
    before = weights(distiller.teacher)
    trainer = Trainer(config(ema=0.9), out=tmp_path)
    result = trainer.fit(distiller, loader(), OptimConfig())
    assert torch.equal(weights(distiller.teacher), before)
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    assert result.checkpoint is not None
    teacher = [t for t in distiller.teacher.state_dict().values() if t.numel() > 4]
    names = []
    for file in result.checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                names.append(name)
                value = tensors.get_tensor(name)
                assert not any(t.shape == value.shape and torch.equal(t, value) for t in teacher), name
    assert len([n for n in names if n.startswith("weights.")]) == 4
    assert sorted(n for n in names if n.startswith("distiller")) == ["distiller.bank", "distiller.calls"]
    assert len([n for n in names if n.startswith("optimizer.")]) == 3 * 4
    assert not any("teacher" in n for n in names)
    distiller.teacher.train()
    assert distiller.teacher.training  # the fit is over

    resumed = ModuleDistiller()
    Trainer(config(ema=0.9), out=tmp_path).fit(resumed, loader(), OptimConfig())
    assert resumed.calls.item() == 12
    assert torch.equal(weights(resumed.student), weights(distiller.student))


def test_teacher_that_shares_weights_with_a_student_is_refused() -> None:
    distiller = ToyDistiller()
    distiller.teacher = distiller.student  # type: ignore[assignment]
    with pytest.raises(ValueError, match="share parameters"):
        Trainer(config(), out=None).fit(distiller, loader(), OptimConfig())


def test_forgotten_projector_is_told(caplog: pytest.LogCaptureFixture) -> None:
    distiller = ToyDistiller()
    Trainer(config(steps=1), out=None).fit(distiller, loader(), OptimConfig())
    assert "belong to no role" not in caplog.text
    distiller.projector = nn.Linear(2, 2)  # type: ignore[attr-defined]
    Trainer(config(steps=1), out=None).fit(distiller, loader(), OptimConfig())
    assert (
        "2 parameters need a gradient and belong to no role: projector.weight, projector.bias" in caplog.text
    )


def test_tied_weights_and_channels_last_resume_exactly(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TinyConvNet(channels=1, seed=3)
            self.again = self.net.body  # the same convolution under two names

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x.view(-1, 1, 2, 4))

    def make() -> ToyDistiller:
        return ToyDistiller(Net().to(memory_format=torch.channels_last))  # type: ignore[call-overload]

    whole, parted = make(), make()
    Trainer(config(), out=None).fit(whole, loader(), OptimConfig(lr=1e-2, schedule="constant"))
    Trainer(config(steps=5), out=tmp_path).fit(make(), loader(), OptimConfig(lr=1e-2, schedule="constant"))
    trainer = Trainer(config(), out=tmp_path)
    trainer.fit(parted, loader(), OptimConfig(lr=1e-2, schedule="constant"))
    assert torch.equal(weights(whole.student), weights(parted.student))
    assert parted.student.again is parted.student.net.body
    optimizer = trainer._roles["student"].optimizer
    states = [optimizer.state[p] for p in parted.student.parameters() if p.dim() == 4]
    assert all(s["exp_avg"].is_contiguous(memory_format=torch.channels_last) for s in states)


# -- logs ------------------------------------------------------------------------------------------


def test_callbacks_are_called_in_order(tmp_path: Path) -> None:
    calls: list[str] = []

    class All(Callback):
        def on_fit_start(self, trainer: Trainer, distiller: Distiller) -> None:
            calls.append(f"start {trainer.step}")

        def on_step_end(self, trainer: Trainer, step: int) -> None:
            calls.append(f"step {step}")

        def on_evaluate(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
            calls.append(f"evaluate {step} {metrics['a']}")

        def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
            calls.append(path.name)

        def on_fit_end(self, trainer: Trainer, result: Any) -> None:
            calls.append(f"end {result.step} {result.checkpoint.name}")

    trainer = Trainer(config(steps=3, checkpoint_every=2), out=tmp_path, callbacks=[All()])
    trainer.fit(ToyDistiller(), loader(), OptimConfig(), evaluate=lambda d, s: {"a": 1.0})
    assert calls == [
        *("start 0", "step 1", "step 2", "step-00000002", "step 3", "evaluate 3 1.0", "step-00000003"),
        "end 3 step-00000003",
    ]


def test_nothing_is_written_without_a_folder_or_to_the_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = Trainer(config(), out=None).fit(ToyDistiller(), loader(), OptimConfig())
    assert result.checkpoint is None
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("patience", [0.0, 1e6])
def test_progress_bar_appears_after_its_patience(patience: float) -> None:
    terminal = io.StringIO()
    bar = ProgressBar(patience, console=Console(file=terminal, force_terminal=True, width=100))
    trainer = Trainer(config(steps=5), out=None, quiet=True, callbacks=[bar])
    trainer.fit(ToyDistiller(), loader(), OptimConfig())
    bar.close()
    assert ("training" in terminal.getvalue()) == (patience == 0.0)


def test_seed_decides_the_run() -> None:
    ends = []
    for seed in (1, 1, 2):
        distiller = ToyDistiller(dropout=0.5)
        Trainer(config(seed=seed), out=None).fit(distiller, loader(), OptimConfig())
        ends.append(weights(distiller.student))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_steps_carry_epoch_and_totals() -> None:
    epochs: Counter[int] = Counter()

    class Look(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            assert (step.total, step.accumulate, step.num_items, step.rank, step.world_size) == (
                12,
                1,
                None,
                0,
                1,
            )
            epochs[step.epoch] += 1
            return super().loss(role, batch, step)

    Trainer(config(), out=None).fit(Look(), SeededLoader(toy_data(40), batch_size=8), OptimConfig())
    assert epochs == {0: 5, 1: 5, 2: 2}


def test_weights_are_what_the_network_holds() -> None:
    distiller = ToyDistiller(TinyMLP(seed=4))
    trainer = Trainer(config(), out=None)
    trainer.fit(distiller, loader(), OptimConfig())
    for key, value in trainer.weights("student").items():
        assert torch.equal(value, distiller.student.state_dict()[key])
