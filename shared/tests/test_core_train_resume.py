from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.testing import ToyDistiller, TwoRoleDistiller, run_script, toy_data
from stillhouse.core.train import (
    Callback,
    Losses,
    OptimConfig,
    SeededLoader,
    Step,
    TrainConfig,
    Trainer,
    latest_checkpoint,
    load_checkpoint,
)


class PowerCut(RuntimeError):
    """Stands for whatever stops a run."""


class Fragile(TwoRoleDistiller):
    """Draws from every global generator, and stops at a given (step, role, micro-batch)."""

    def __init__(self, stop: tuple[int, str, int] | None = None) -> None:
        super().__init__(ratio=3, dropout=0.3)
        self.stop = stop

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        if (step.index, role, step.micro) == self.stop:
            raise PowerCut
        x, y = batch
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()  # noqa: NPY002
        return super().loss(role, (x + 0.01 * noise, y), step)


CONFIG = TrainConfig(
    steps=20, accumulate=2, ema=0.9, clip_norm=1.0, checkpoint_every=4, log_every=3, seed=7, keep=3, threads=1
)
OPTIM = {
    "student": OptimConfig(name="adamw", lr=1e-2, warmup_steps=2),
    "critic": OptimConfig(name="sgd", lr=1e-2, schedule="multistep", milestones=(5, 11)),
}


def loader(workers: int = 0) -> SeededLoader:
    return SeededLoader(
        toy_data(40), batch_size=6, seed=7, workers=workers
    )  # six batches an epoch, three steps


def fit(out: Path, stop: tuple[int, str, int] | None = None, **options: Any) -> Any:
    distiller = Fragile(stop)
    return distiller, Trainer(CONFIG, out=out).fit(distiller, loader(), OPTIM, **options)


def same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
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


def rows(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "stop",
    [
        (2, "critic", 0),  # before any checkpoint: starts anew
        (4, "critic", 0),  # right after a checkpoint
        (6, "student", 0),  # between the roles of a step
        (9, "critic", 1),  # between the micro-batches of a step, at an epoch's border
        (15, "student", 1),  # after both
        (19, "critic", 1),  # in the last step
    ],
)
def test_resumed_run_is_bit_equal(
    stop: tuple[int, str, int], uninterrupted: tuple[Any, Any], tmp_path: Path
) -> None:
    with pytest.raises(PowerCut):
        fit(tmp_path, stop)
    distiller, result = fit(tmp_path)
    whole, expected = uninterrupted
    for role, network in distiller.trainable().items():
        same(network.state_dict(), whole.trainable()[role].state_dict(), role)
    assert distiller.passes == whole.passes == 7
    same(load_checkpoint(result.checkpoint).parts, load_checkpoint(expected.checkpoint).parts)
    assert rows(result.history) == rows(expected.history)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert rows([json.loads(line) for line in lines]) == rows(expected.history)


def test_resume_twice_and_from_a_named_checkpoint(uninterrupted: tuple[Any, Any], tmp_path: Path) -> None:
    for stop in ((5, "critic", 0), (10, "critic", 0)):
        with pytest.raises(PowerCut):
            fit(tmp_path, stop)
    named = tmp_path / "checkpoints" / "step-00000004"
    distiller, result = fit(tmp_path / "other", resume=named)
    same(load_checkpoint(result.checkpoint).parts, load_checkpoint(uninterrupted[1].checkpoint).parts)
    assert distiller.passes == 7


def test_a_broken_newest_checkpoint_costs_some_steps_only(
    uninterrupted: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PowerCut):
        fit(tmp_path, (9, "critic", 0))
    newest = tmp_path / "checkpoints" / "step-00000008"
    file = newest / "optimizer.student.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"optimizer\.student"):
        fit(tmp_path / "other", resume=newest)
    _, result = fit(tmp_path)
    assert "skipping a broken checkpoint" in caplog.text
    same(load_checkpoint(result.checkpoint).parts, load_checkpoint(uninterrupted[1].checkpoint).parts)


def test_a_finished_run_is_loaded_not_trained(uninterrupted: tuple[Any, Any], tmp_path: Path) -> None:
    fit(tmp_path)
    distiller, result = fit(tmp_path, (0, "critic", 0))
    assert result.step == 20
    for role, network in distiller.trainable().items():
        same(network.state_dict(), uninterrupted[0].trainable()[role].state_dict())


def test_fresh_start_refuses_an_earlier_run(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        fit(tmp_path, resume=False)


def test_changed_settings_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PowerCut):
        fit(tmp_path, (5, "critic", 0))
    changed = TrainConfig(steps=22, accumulate=2, seed=7, checkpoint_every=4, threads=1)
    Trainer(changed, out=tmp_path).fit(Fragile(), loader(), OPTIM)
    assert "resuming with another steps, clip_norm, ema" in caplog.text


def test_other_roles_and_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        fit(tmp_path, (5, "critic", 0))
    with pytest.raises(ConfigError, match="trained the roles"):
        Trainer(CONFIG, out=tmp_path).fit(ToyDistiller(), loader(), OPTIM["student"])
    other = SeededLoader(toy_data(48), batch_size=6, seed=7)
    with pytest.raises(ValueError, match="samples = 40, this one 48"):
        Trainer(CONFIG, out=tmp_path).fit(Fragile(), other, OPTIM)


def test_workers_change_nothing_about_a_resume(uninterrupted: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        fit(tmp_path, (7, "critic", 1))
    result = Trainer(CONFIG, out=tmp_path).fit(Fragile(), loader(workers=1), OPTIM)
    same(load_checkpoint(result.checkpoint).parts, load_checkpoint(uninterrupted[1].checkpoint).parts)


def test_plain_iterable_resumes_too(tmp_path: Path) -> None:
    batches = list(torch.utils.data.DataLoader(toy_data(40), batch_size=8))
    whole, parted = ToyDistiller(), ToyDistiller()
    config = TrainConfig(steps=12, checkpoint_every=5, threads=1)
    Trainer(config, out=None).fit(whole, batches, OptimConfig())

    class Stop(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            if step == 8:
                raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(config, out=tmp_path, callbacks=[Stop()]).fit(ToyDistiller(), batches, OptimConfig())
    Trainer(config, out=tmp_path).fit(parted, batches, OptimConfig())
    same(parted.student.state_dict(), whole.student.state_dict())


SCRIPT = """
import sys, time, torch
from pathlib import Path
from stillhouse.core.testing import TwoRoleDistiller, toy_data
from stillhouse.core.train import Callback, OptimConfig, SeededLoader, TrainConfig, Trainer

class Slow(Callback):
    def on_step_end(self, trainer, step):
        time.sleep(0.01)

config = TrainConfig(steps=40, accumulate=2, ema=0.95, checkpoint_every=3, log_every=1, seed=5, threads=1)
loader = SeededLoader(toy_data(40), batch_size=6, seed=5)
trainer = Trainer(config, out=Path(sys.argv[1]), callbacks=[Slow()])
trainer.fit(TwoRoleDistiller(dropout=0.2), loader, OptimConfig())
"""


def test_kill_9_at_a_random_step_then_resume(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    generator = random.Random()  # another moment in every run of this test
    for _ in range(2):
        start = log.stat().st_size if log.exists() else 0
        length = start + generator.randrange(200, 2000)

        def grown(length: int = length) -> bool:
            return log.exists() and log.stat().st_size >= length

        result = run_script(["-c", SCRIPT, tmp_path], kill_when=grown)
        assert result.returncode == -9, result.stderr
    assert run_script(["-c", SCRIPT, tmp_path]).returncode == 0

    whole = TwoRoleDistiller(dropout=0.2)
    config = TrainConfig(steps=40, accumulate=2, ema=0.95, checkpoint_every=3, log_every=1, seed=5, threads=1)
    data = SeededLoader(toy_data(40), batch_size=6, seed=5)
    expected = Trainer(config, out=tmp_path / "whole").fit(whole, data, OptimConfig())
    end = latest_checkpoint(tmp_path / "checkpoints")
    assert end is not None
    assert expected.checkpoint is not None
    assert end.name == expected.checkpoint.name == "step-00000040"
    same(load_checkpoint(end).parts, load_checkpoint(expected.checkpoint).parts)
