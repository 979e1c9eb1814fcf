from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.core.errors import MissingDependencyError

# before mmengine itself: it keeps the deprecation warnings of mmengine's own imports away
pytest.importorskip("stillhouse.core.integrations.mmengine", exc_type=MissingDependencyError)

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from stillhouse.core.integrations.mmengine import as_mm_model, fit_result, runner_for
from stillhouse.core.testing import TinyMLP, ToyDistiller, TwoRoleDistiller, run_ranks, toy_data
from stillhouse.core.train import Losses, OptimConfig, SeededLoader, Step, TrainConfig, Trainer


class Counted(ToyDistiller):
    """A sum over the samples that count, divided by how many count in the whole step."""

    def num_items(self, batch: Any) -> int:
        return int((batch[1] != 3).sum())

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        x, y = batch
        each = nn.functional.cross_entropy(self.student(x), y, reduction="none")
        ce = (each * (y != 3)).sum() / step.num_items
        return Losses(ce, {"ce": ce})


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (ToyDistiller, {}),
    "alternating": (TwoRoleDistiller, {"accumulate": 2, "clip_norm": 0.3, "ema": 0.8}),
    "counted": (Counted, {"accumulate": 2}),
}


def fit(case: str, engine: str, world: int, out: Path, make: Any = None) -> dict[str, Any]:
    settings = CASES[case][1]
    config = TrainConfig(
        **{"steps": 6, "devices": world, "accelerator": "cpu", "log_every": 3, "threads": 1, **settings}
    )
    distiller = (make or CASES[case][0])()
    data, optim = SeededLoader(toy_data(), batch_size=8, seed=1), OptimConfig(lr=1e-2, warmup_steps=2)
    if engine == "trainer":
        result = Trainer(config, out=out).fit(distiller, data, optim)
    else:
        runner = runner_for(distiller, data, optim, config, out=out, quiet=True)
        runner.train()
        result = fit_result(runner)
    return {
        "weights": {name: dict(network.state_dict()) for name, network in distiller.trainable().items()},
        "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in result.history],
        "step": result.step,
    }


class Stopping(TwoRoleDistiller):
    """Dropout, so that each rank's generator matters; stops once where asked to."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__(ratio=2, dropout=0.3)
        self.stop = stop

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        if step.index == self.stop:
            raise InterruptedError
        return super().loss(role, batch, step)


def resumed(out: Path) -> bool:
    def run(name: str, stop: int | None = None) -> dict[str, Tensor]:
        distiller = Stopping(stop)
        config = TrainConfig(
            steps=6, devices=2, accelerator="cpu", checkpoint_every=2, ema=0.9, log_every=2, threads=1
        )
        data = SeededLoader(toy_data(), batch_size=8, seed=1)
        runner_for(distiller, data, OptimConfig(lr=1e-2), config, out=out / name, quiet=True).train()
        return dict(distiller.student.state_dict())

    whole = run("whole")
    stopped = False
    try:
        run("parted", stop=5)
    except InterruptedError:
        stopped = True
    parted = run("parted")
    return stopped and all(torch.equal(value, parted[key]) for key, value in whole.items())


def stock(out: Path, launcher: str) -> dict[str, Tensor]:
    """A Runner of one's own, whose loader gives every rank the same batches."""
    distiller = TwoRoleDistiller()
    runner = Runner(
        model=as_mm_model(distiller),
        work_dir=str(out),
        train_dataloader=torch.utils.data.DataLoader(toy_data(), batch_size=8),
        train_cfg={"by_epoch": False, "max_iters": 4},
        optim_wrapper=OptimWrapperDict(
            student=OptimWrapper(torch.optim.SGD(distiller.student.parameters(), lr=0.1)),
            critic=OptimWrapper(torch.optim.SGD(distiller.critic.parameters(), lr=0.1)),
        ),
        launcher=launcher,
        log_level="ERROR",
        cfg={"model_wrapper_cfg": {"type": "RoleParallel"}},
    )
    runner.train()
    return {f"{n}.{k}": v for n, net in distiller.trainable().items() for k, v in net.state_dict().items()}


def on_ranks(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{case} {engine}": fit(case, engine, 2, out / f"{case}-{engine}")
        for case in CASES
        for engine in ("trainer", "runner")
    }
    return {**found, "resumed": resumed(out), "stock": stock(out / "stock", "pytorch")}


def test_two_processes_equal_one_and_the_trainer_and_resume(tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, tmp_path, timeout=300)
    assert first["resumed"]
    assert second["resumed"]
    for case in CASES:
        alone = fit(case, "runner", 1, tmp_path / f"{case}-alone")
        many = first[f"{case} runner"]
        assert many["step"] == 6
        for role, state in many["weights"].items():
            for key, value in state.items():
                assert torch.equal(value, second[f"{case} runner"]["weights"][role][key])  # ranks agree
                assert torch.equal(value, first[f"{case} trainer"]["weights"][role][key])  # and the Trainer
                torch.testing.assert_close(value, alone["weights"][role][key], rtol=1e-4, atol=2e-6)
        assert many["rows"] == first[f"{case} trainer"]["rows"]
        for a, b in zip(many["rows"], alone["rows"], strict=True):
            assert (a["step"], a["role"]) == (b["step"], b["role"])
            assert a["total"] == pytest.approx(b["total"], rel=1e-4)
    for key, value in stock(tmp_path / "stock-alone", "none").items():
        torch.testing.assert_close(first["stock"][key], value, rtol=1e-5, atol=1e-7)
        assert torch.equal(first["stock"][key], second["stock"][key])
    # the same, were the global batch another one: the comparison can fail
    other = fit("plain", "runner", 1, tmp_path / "other", lambda: ToyDistiller(TinyMLP(seed=5)))
    assert not torch.allclose(
        other["weights"]["student"]["head.weight"], first["plain runner"]["weights"]["student"]["head.weight"]
    )
