"""The kidney run under mmengine's Runner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stillhouse.core.config import list_presets, load_config
from stillhouse.core.errors import MissingDependencyError
from stillhouse.core.train import load_checkpoint

pytest.importorskip("stillhouse.core.integrations.mmengine", exc_type=MissingDependencyError)

from stillhouse.kidney.config import KidneyConfig
from stillhouse.kidney.fit import Engine, fit_student, fit_teacher, prepare, with_trainer
from stillhouse.kidney.mmengine_runner import PRESET, main, with_runner

PRESETS = "stillhouse.kidney.configs"
TINY = (
    "data.stones_per_class=6",
    "data.patches_per_fragment=1",
    "data.image_size=24",
    "teacher.steps=4",
    "train.steps=4",
    "train.threads=1",
    "train.checkpoint_every=2",
    "optim.warmup_steps=2",
    "evaluate.resamples=100",
)


def test_the_preset_is_the_demo_with_checkpoints() -> None:
    assert PRESET in list_presets(PRESETS)
    mine = load_config(KidneyConfig, PRESET, presets=PRESETS)
    demo = load_config(KidneyConfig, "demo", presets=PRESETS)
    assert mine.train.checkpoint_every == 40
    assert replace(mine, train=demo.train) == demo
    assert replace(mine.train, checkpoint_every=0) == demo.train


def test_teacher_and_student_are_the_trainers_bit_for_bit(tmp_path: Path) -> None:
    config = load_config(KidneyConfig, PRESET, presets=PRESETS, overrides=TINY)
    data = prepare(config, seed=0)
    found = {}
    engines: dict[str, Engine] = {"trainer": with_trainer, "runner": with_runner}
    for name, engine in engines.items():
        out = tmp_path / name
        teacher, _ = fit_teacher(config, data, seed=0, out=out / "teacher", quiet=True, engine=engine)
        student, facts = fit_student(
            config, data, teacher, seed=0, out=out / "student", quiet=True, engine=engine
        )
        found[name] = (teacher.state_dict(), student.state_dict(), facts["terms"], facts["loss"])
    for mine, expected in zip(found["runner"][:2], found["trainer"][:2], strict=True):
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], expected[key]) for key in expected)
    assert found["runner"][2:] == found["trainer"][2:]
    assert "hypothesis" in found["runner"][2]
    steps = sorted(path.name for path in (tmp_path / "runner" / "student" / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000004"]
    parts = load_checkpoint(tmp_path / "runner" / "student" / "checkpoints" / steps[-1]).parts
    assert not any("teacher" in name for name in parts)  # the frozen teacher of the student


@pytest.mark.slow
def test_the_demo_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [part for setting in TINY for part in ("--set", setting)]
    code = main(["--config", PRESET, "--json", "--device", "cpu", "--out", str(tmp_path / "run"), *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out)
    assert Path(result["report"]).is_file()
    assert (Path(result["artifact"]) / "model.safetensors").is_file()
    assert set(result["accuracy"]) == {
        "teacher GEMINI",
        "guided student",
        "student without distillation",
        "cross-entropy classifier",
    }
    assert main(["--config", "no_such_preset"]) == 2
