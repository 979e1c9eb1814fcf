from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.errors import ConfigError, DataError, MissingDependencyError

# before mmengine itself: it keeps the deprecation warnings of mmengine's own imports away
pytest.importorskip("stillhouse.core.integrations.mmengine", exc_type=MissingDependencyError)

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from stillhouse.core.integrations.mmengine import (
    PlainStateHook,
    StepData,
    as_mm_model,
    fit_result,
    optim_wrappers,
    runner_for,
)
from stillhouse.core.testing import TinyMLP, ToyDistiller, TwoRoleDistiller, run_script, toy_data
from stillhouse.core.train import (
    FitResult,
    Losses,
    NonFiniteLossError,
    OptimConfig,
    SeededLoader,
    Step,
    TrainConfig,
    Trainer,
    load_checkpoint,
)

OPTIM = {
    "student": OptimConfig(name="adamw", lr=1e-2, warmup_steps=2),
    "critic": OptimConfig(name="sgd", lr=1e-2, schedule="multistep", milestones=(3, 7)),
}
CONFIG = TrainConfig(
    steps=12, accumulate=2, ema=0.9, clip_norm=0.5, checkpoint_every=4, log_every=3, seed=7, keep=3, threads=1
)


def loader(seed: int = 7) -> SeededLoader:
    return SeededLoader(toy_data(40), batch_size=6, seed=seed)  # six batches an epoch, three steps


def mm_fit(
    distiller: Any, out: Path, optim: Any = OPTIM, config: TrainConfig = CONFIG, **options: Any
) -> FitResult:
    runner = runner_for(distiller, loader(), optim, config, out=out, quiet=True, **options)
    runner.train()
    return fit_result(runner)


def same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def rows(result: FitResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]


def weights(distiller: Any) -> dict[str, dict[str, Tensor]]:
    return {name: dict(network.state_dict()) for name, network in distiller.trainable().items()}


class Module(nn.Module):
    """A distiller that is an `nn.Module`, with its teacher and a buffer of its own inside; with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(TinyMLP(seed=1), nn.BatchNorm1d(4))
        self.teacher = TinyMLP(hidden=32, seed=9)
        self.register_buffer("calls", torch.zeros(()))

    def trainable(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def frozen(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher}

    def roles(self, step: int) -> tuple[str, ...]:
        return ("student", "student") if step % 3 == 2 else ("student",)  # twice in one step is allowed

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        self.calls += 1
        assert not self.teacher.training
        mse = (self.student(batch[0]) - self.teacher(batch[0])).square().mean()
        return Losses(mse, {"mse": mse})


class Counted(ToyDistiller):
    """A sum over the samples that count, divided by how many count in the whole step."""

    def num_items(self, batch: Any) -> int:
        return int((batch[1] != 3).sum())

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        x, y = batch
        each = nn.functional.cross_entropy(self.student(x), y, reduction="none")
        ce = (each * (y != 3)).sum() / step.num_items
        return Losses(ce, {"ce": ce})


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "one role": (lambda: ToyDistiller(dropout=0.3), OPTIM["student"], {"accumulate": 1, "ema": None}),
    "two roles": (lambda: TwoRoleDistiller(ratio=3, dropout=0.3), OPTIM, {}),
    "bf16": (lambda: TwoRoleDistiller(dropout=0.3), OPTIM, {"precision": "bf16-mixed"}),
    "counted": (Counted, OPTIM["student"], {}),
    "module": (Module, OPTIM["student"], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_runner_and_trainer_make_the_same_bits(case: str, tmp_path: Path) -> None:
    make, optim, values = CASES[case]
    config = TrainConfig(**{**{name: getattr(CONFIG, name) for name in CONFIG.__slots__}, **values})
    a, b = make(), make()
    expected = Trainer(config, out=tmp_path / "a").fit(a, loader(), optim)
    result = mm_fit(b, tmp_path / "b", optim, config)
    same(weights(b), weights(a))
    assert rows(result) == rows(expected)
    assert result.step == 12
    assert expected.checkpoint is not None
    assert result.checkpoint is not None
    same(load_checkpoint(result.checkpoint).parts, load_checkpoint(expected.checkpoint).parts)
    assert (tmp_path / "b" / "log.jsonl").read_text().count("\n") == len(result.history)
    changed = (weights(b)[role][key] for role in b.trainable() for key in weights(b)[role])
    start = (weights(make())[role][key] for role in b.trainable() for key in weights(b)[role])
    assert any(not torch.equal(x, y) for x, y in zip(changed, start, strict=True))


class PowerCut(RuntimeError):
    """Stands for whatever stops a run."""


class Fragile(TwoRoleDistiller):
    """Stops at a given (step, role)."""

    def __init__(self, stop: tuple[int, str] | None = None) -> None:
        super().__init__(ratio=3, dropout=0.3)
        self.stop = stop

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        if (step.index, role) == self.stop:
            raise PowerCut
        return super().loss(role, batch, step)


@pytest.mark.parametrize("begun", ["runner", "trainer"])
@pytest.mark.parametrize("ended", ["runner", "trainer"])
def test_either_ends_what_the_other_began(begun: str, ended: str, tmp_path: Path) -> None:
    def fit(engine: str, out: Path, distiller: Any) -> FitResult:
        if engine == "runner":
            return mm_fit(distiller, out)
        return Trainer(CONFIG, out=out).fit(distiller, loader(), OPTIM)

    whole, parted = Fragile(), Fragile()
    expected = Trainer(CONFIG, out=tmp_path / "whole").fit(whole, loader(), OPTIM)
    with pytest.raises(PowerCut):
        fit(begun, tmp_path / "parted", Fragile((9, "student")))
    result = fit(ended, tmp_path / "parted", parted)
    same(weights(parted), weights(whole))
    assert rows(result) == rows(expected)
    assert parted.passes == whole.passes == 4
    assert expected.checkpoint is not None
    assert result.checkpoint is not None
    same(load_checkpoint(result.checkpoint).parts, load_checkpoint(expected.checkpoint).parts)


def test_resume_refuses_what_it_cannot_go_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PowerCut):
        mm_fit(Fragile((5, "critic")), tmp_path)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        mm_fit(Fragile(), tmp_path, resume=False)
    with pytest.raises(ConfigError, match="trained the roles"):
        mm_fit(ToyDistiller(), tmp_path, OPTIM["student"])
    with pytest.raises(DataError, match="no checkpoint here"):
        mm_fit(Fragile(), tmp_path / "new", resume=tmp_path)
    assert "resuming with another" not in caplog.text
    changed = TrainConfig(steps=8, accumulate=2, seed=7, threads=1)
    mm_fit(Fragile(), tmp_path, config=changed)
    assert "resuming with another steps, clip_norm, ema" in caplog.text


SCRIPT = """
import sys, time
from pathlib import Path
from stillhouse.core.integrations.mmengine import runner_for
from mmengine.hooks import Hook
from stillhouse.core.testing import TwoRoleDistiller, toy_data
from stillhouse.core.train import OptimConfig, SeededLoader, TrainConfig

class Slow(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        time.sleep(0.01)

config = TrainConfig(steps=40, accumulate=2, ema=0.95, checkpoint_every=3, log_every=1, seed=5, threads=1)
loader = SeededLoader(toy_data(40), batch_size=6, seed=5)
out = Path(sys.argv[1])
distiller = TwoRoleDistiller(dropout=0.2)
runner_for(distiller, loader, OptimConfig(), config, out=out, hooks=[Slow()], quiet=True).train()
"""


def test_kill_9_at_a_random_step_then_resume(tmp_path: Path) -> None:
    parted, log = tmp_path / "parted", tmp_path / "parted" / "log.jsonl"
    length = random.Random().randrange(200, 4000)  # another moment in every run of this test
    result = run_script(
        ["-c", SCRIPT, parted], kill_when=lambda: log.exists() and log.stat().st_size >= length
    )
    assert result.returncode == -9, result.stderr
    ended = run_script(["-W", "error", "-c", SCRIPT, parted])
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr  # a user's terminal stays quiet, too

    config = TrainConfig(steps=40, accumulate=2, ema=0.95, checkpoint_every=3, log_every=1, seed=5, threads=1)
    runner = runner_for(
        TwoRoleDistiller(dropout=0.2),
        SeededLoader(toy_data(40), batch_size=6, seed=5),
        OptimConfig(),
        config,
        out=tmp_path / "whole",
        quiet=True,
    )
    runner.train()
    folders = (tmp_path / "parted", tmp_path / "whole")
    ends = [load_checkpoint(folder / "checkpoints" / "step-00000040") for folder in folders]
    same(ends[0].parts, ends[1].parts)


class Watch(Hook):
    """Keeps what the hooks of mmengine get."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Tensor]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.outputs.append(outputs)


def test_roles_alternate_and_terms_are_unweighted(tmp_path: Path) -> None:
    distiller, watch = TwoRoleDistiller(ratio=3), Watch()
    config = TrainConfig(steps=7, log_every=7, threads=1)
    runner = runner_for(distiller, loader(), OPTIM, config, out=tmp_path, hooks=[watch], quiet=True)
    model = runner.model.module
    runner.train()
    assert model.updates == {"student": 3, "critic": 7}
    assert distiller.passes == 3
    assert [sorted({key.split(".")[0] for key in output}) for output in watch.outputs] == [
        ["critic", "student"] if step % 3 == 0 else ["critic"] for step in range(7)
    ]
    last = watch.outputs[6]
    total = last["student.ce"] + 0.5 * last["student.adversarial"]
    torch.testing.assert_close(last["student.loss"], total)
    assert runner.message_hub.get_scalar("train/student.ce").current() == last["student.ce"].item()
    assert all(p.requires_grad for network in distiller.trainable().values() for p in network.parameters())


@pytest.mark.parametrize("make", [TwoRoleDistiller, Module])
def test_the_teacher_is_in_no_state_and_no_optimizer(make: Any, tmp_path: Path) -> None:
    distiller = make()
    optim = OptimConfig()
    runner = runner_for(distiller, loader(), optim, TrainConfig(steps=2, threads=1), out=tmp_path, quiet=True)
    before = {k: v.clone() for k, v in distiller.teacher.state_dict().items()}
    runner.train()
    same(dict(distiller.teacher.state_dict()), before)
    assert not distiller.teacher.training
    ids = {id(p) for p in distiller.teacher.parameters()}
    held = [group["params"] for w in runner.optim_wrapper.values() for group in w.optimizer.param_groups]
    assert not ids & {id(p) for params in held for p in params}
    model = runner.model.module
    assert not ids & {id(p) for p in model.parameters()}
    assert {key.split(".")[0] for key in model.state_dict()} == {"networks", "progress"}
    checkpoint = fit_result(runner).checkpoint
    assert checkpoint is not None
    parts = load_checkpoint(checkpoint).parts
    tensors = [t for name, part in parts.items() if name.startswith("weights") for t in part.values()]
    assert not any(t.shape == v.shape and torch.equal(t, v) for t in tensors for v in before.values())
    assert not any("teacher" in name for name in parts)
    assert "teacher" not in (checkpoint / "state.json").read_text()


def test_bf16_makes_no_grad_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a GradScaler was made")

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", refuse)
    seen: list[torch.dtype] = []

    class Peek(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            seen.append(self.student(batch[0]).dtype)
            return super().loss(role, batch, step)

    config = TrainConfig(steps=3, precision="bf16-mixed", threads=1)
    result = mm_fit(Peek(), tmp_path, OPTIM["student"], config)
    assert seen == [torch.bfloat16] * 3
    assert result.step == 3
    with pytest.raises(ConfigError, match='"16-mixed"; under mmengine it is one of 32-true, bf16-mixed'):
        mm_fit(Peek(), tmp_path / "b", OPTIM["student"], TrainConfig(precision="16-mixed"))


def test_evaluation_sees_averaged_weights_and_changes_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, bool, float]] = []

    def evaluate(distiller: Any, step: int) -> dict[str, float]:
        value = distiller.student.head.weight.sum().item()
        seen.append((step, distiller.student.training, torch.is_grad_enabled(), value))
        return {"draw": torch.rand(()).item()}

    config = TrainConfig(steps=6, ema=0.5, evaluate_every=2, log_every=2, threads=1)
    a, b = ToyDistiller(dropout=0.3), ToyDistiller(dropout=0.3)
    expected = Trainer(config, out=tmp_path / "a").fit(a, loader(), OPTIM["student"], evaluate=evaluate)
    trainer_saw, seen[:] = list(seen), []
    result = mm_fit(b, tmp_path / "b", OPTIM["student"], config, evaluate=evaluate)
    assert seen == trainer_saw
    assert [entry[:3] for entry in seen] == [(step, False, False) for step in (2, 4, 6)]
    assert rows(result) == rows(expected)
    same(weights(b), weights(a))


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Bad(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            losses = super().loss(role, batch, step)
            if step.index == 5:
                losses.terms["kd"] = losses.terms["kd"] * float("nan")
            return losses

    config = TrainConfig(steps=12, checkpoint_every=2, log_every=100, threads=1)
    with pytest.raises(NonFiniteLossError, match="role 'student' is not finite at step 5: term 'kd'"):
        mm_fit(Bad(), tmp_path, OPTIM["student"], config)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def stock(out: Path, iterations: int, *, resume: bool = False, plain: bool = True) -> TwoRoleDistiller:
    """mmengine's own loop, loader, schedule and checkpoints around the model."""
    distiller = TwoRoleDistiller(ratio=2)
    optim = OptimWrapperDict(
        student=OptimWrapper(torch.optim.SGD(distiller.student.parameters(), lr=0.1, momentum=0.9)),
        critic=OptimWrapper(torch.optim.AdamW(distiller.critic.parameters(), lr=0.01)),
    )
    decay = {"type": "LinearLR", "start_factor": 1.0, "end_factor": 0.1, "end": 6, "by_epoch": False}
    runner = Runner(
        model=as_mm_model(distiller),
        work_dir=str(out),
        train_dataloader=torch.utils.data.DataLoader(toy_data(64), batch_size=8),
        train_cfg={"by_epoch": False, "max_iters": iterations},
        optim_wrapper=optim,
        param_scheduler={"student": [decay], "critic": [decay]},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 3, "by_epoch": False}},
        custom_hooks=[PlainStateHook()] if plain else [],
        log_processor={"by_epoch": False},
        log_level="ERROR",
        resume=resume,
        experiment_name=f"stock-{out.name}-{iterations}",
    )
    runner.train()
    return distiller


def test_the_model_in_a_runner_of_ones_own_resumes_from_plain_checkpoints(tmp_path: Path) -> None:
    whole = stock(tmp_path / "whole", 6)
    stock(tmp_path / "parted", 3)
    file = tmp_path / "parted" / "iter_3.pth"
    saved = torch.load(file, weights_only=True)
    assert not any("teacher" in key for key in saved["state_dict"])
    assert saved["state_dict"]["progress"].tolist() == [3, 2, 3]
    assert saved["distiller"] == {"passes": 2}
    parted = stock(tmp_path / "parted", 6, resume=True)
    same(weights(parted), weights(whole))
    assert parted.passes == whole.passes == 3


def test_mmengine_alone_cannot_resume_what_it_wrote(tmp_path: Path) -> None:
    """The defect that `PlainStateHook` mends; where this fails, mmengine has mended it."""
    stock(tmp_path, 3, plain=False)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        stock(tmp_path, 6, resume=True, plain=False)


def test_wrong_use_is_told(tmp_path: Path) -> None:
    model = as_mm_model(TwoRoleDistiller())
    with pytest.raises(TypeError, match="RoleParallel"):
        model({}, mode="loss")
    batch = next(iter(loader()))
    one = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="one wrapper a role"):
        model.train_step(batch, one)
    accumulating = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2)
    with pytest.raises(ValueError, match="accumulate in the data"):
        as_mm_model(ToyDistiller()).train_step(batch, accumulating)
    with pytest.raises(ConfigError, match=r"optim names the roles \['student'\]"):
        optim_wrappers(TwoRoleDistiller(), {"student": OptimConfig()}, TrainConfig())
    with pytest.raises(ConfigError, match="fsdp2"):
        mm_fit(ToyDistiller(), tmp_path, config=TrainConfig(strategy="fsdp2"))
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        mm_fit(ToyDistiller(), tmp_path, config=TrainConfig(devices=2))


def test_eval_and_train_keep_the_modes_of_parts() -> None:
    distiller = ToyDistiller()
    model = as_mm_model(distiller)
    distiller.student.dropout.eval()
    model.train()
    assert not distiller.student.dropout.training
    model.eval()
    assert not distiller.student.training
    model.train()
    assert distiller.student.training
    assert not distiller.student.dropout.training


def test_step_data_draws_the_micro_batches_of_a_step() -> None:
    data = StepData(SeededLoader(list(range(8)), batch_size=2, shuffle=False), accumulate=3)
    steps = iter(data)
    found = [[(batch.tolist(), epoch) for batch, epoch in next(steps).micro] for _ in range(2)]
    assert found[0] == [([0, 1], 0), ([2, 3], 0), ([4, 5], 0)]
    assert found[1] == [([6, 7], 0), ([0, 1], 1), ([2, 3], 1)]
    assert len(data) == 1


@pytest.mark.parametrize("blocked", ["cv2", "mmengine"])
def test_a_missing_library_is_named_with_the_line_that_installs_it(blocked: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{blocked!r}] = None\n"
        "from stillhouse.core.errors import MissingDependencyError\n"
        "import stillhouse.core.integrations\n"
        "try:\n"
        "    import stillhouse.core.integrations.mmengine\n"
        "except MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    result = run_script(["-W", "error", "-c", code])
    assert result.returncode == 0, result.stderr
    assert f"needs {blocked}" in result.stdout
    assert 'pip install "stillhouse-core[mmengine]"' in result.stdout
