from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.core.testing import ToyDistiller, TwoRoleDistiller, toy_data
from stillhouse.core.train import (
    Callback,
    Losses,
    NonFiniteLossError,
    OptimConfig,
    RunLog,
    SeededLoader,
    Step,
    TrainConfig,
    Trainer,
    load_checkpoint,
)


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 12, "threads": 1, **values})


def loader(**values: Any) -> SeededLoader:
    return SeededLoader(toy_data(), **{"batch_size": 8, **values})


def test_log_holds_means_of_unweighted_terms(tmp_path: Path) -> None:
    class Known(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            real = super().loss(role, batch, step)
            value = torch.tensor(float(step.index))
            return Losses(real.total, {"task": value, "kd": value**2}, {"task": 1.0, "kd": 0.25}, "task")

    result = Trainer(config(steps=7, log_every=3), out=tmp_path).fit(Known(), loader(), OptimConfig())
    assert [row["step"] for row in result.history] == [3, 6, 7]
    assert [row["terms"] for row in result.history] == [
        pytest.approx({"task": 1.0, "kd": 5 / 3}),
        pytest.approx({"task": 4.0, "kd": 50 / 3}),
        pytest.approx({"task": 6.0, "kd": 36.0}),
    ]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert {"step", "role", "total", "terms", "lr", "seconds"} == set(rows[0])


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(config(steps=6, log_every=3), out=tmp_path)
    result = trainer.fit(ToyDistiller(), loader(), OptimConfig(), evaluate=lambda d, s: {"accuracy": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [(e.step, e.value) for e in events.Scalars("student/kd")]
    expected = [(row["step"], row["terms"]["kd"]) for row in result.history if "terms" in row]
    assert values == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected]
    assert [(e.step, e.value) for e in events.Scalars("evaluate/accuracy")] == [(6, 0.25)]


def test_tensorboard_forgets_what_a_killed_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            if step == 6:
                raise RuntimeError("the power went")

    settings = config(steps=8, log_every=1, checkpoint_every=4)
    with pytest.raises(RuntimeError, match="power"):
        Trainer(settings, out=tmp_path, callbacks=[Stop()]).fit(ToyDistiller(), loader(), OptimConfig())
    Trainer(settings, out=tmp_path).fit(ToyDistiller(), loader(), OptimConfig())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("student/total")] == list(range(1, 9))


def small(kd: float, steps: int, accumulate: int = 1) -> list[str]:
    class Silent(ToyDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            ce = super().loss(role, batch, step).total
            one = torch.ones(())
            return Losses(ce, {"ce": one, "kd": kd * one}, {"ce": 1.0, "kd": 1.0}, "ce")

    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Handler(level=logging.WARNING)
    logger = logging.getLogger("stillhouse.core.train.logs")
    logger.addHandler(handler)
    try:
        Trainer(config(steps=steps, accumulate=accumulate), out=None).fit(Silent(), loader(), OptimConfig())
    finally:
        logger.removeHandler(handler)
    return records


def test_warning_about_a_negligible_term_fires_once() -> None:
    records = small(kd=0.009, steps=250, accumulate=2)
    assert len(records) == 1
    assert "'kd' has been below" in records[0]


def test_warning_does_not_fire_for_large_terms_or_short_spells() -> None:
    assert small(kd=0.011, steps=150) == []
    assert small(kd=0.009, steps=99) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_role_term_and_step(bad: float, tmp_path: Path) -> None:
    class Breaks(TwoRoleDistiller):
        def loss(self, role: str, batch: Any, step: Step) -> Losses:
            losses = super().loss(role, batch, step)
            if role == "student" and step.index == 6:
                losses.terms["adversarial"] = losses.terms["adversarial"] * bad
                losses.total = losses.total * bad
            return losses

    run = Trainer(config(steps=20, checkpoint_every=4, log_every=50), out=tmp_path)
    with pytest.raises(
        NonFiniteLossError, match="role 'student' is not finite at step 6: term 'adversarial'"
    ):
        run.fit(Breaks(), loader(), OptimConfig())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert load_checkpoint(tmp_path / "checkpoints" / "step-00000004").step == 4


def test_log_of_a_killed_run_loses_its_cut_line_and_its_future(tmp_path: Path) -> None:
    lines = [{"step": s, "role": "student", "total": 1.0, "terms": {}} for s in (2, 4, 6)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 4, "ro'
    (tmp_path / "log.jsonl").write_text(text)
    log = RunLog(tmp_path, step=4)
    log.close()
    assert [row["step"] for row in log.rows] == [2, 4]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


# -- callbacks and the rest ------------------------------------------------------------------------
