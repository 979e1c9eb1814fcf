"""The whole run: train, kill, resume, two processes, evaluate, report; and the direction of the method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.config import list_presets, load_config
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.testing import run_ranks, run_script
from stillhouse.lidar.cli import main
from stillhouse.lidar.complete import load_completer
from stillhouse.lidar.config import LidarConfig
from stillhouse.lidar.fit import fit_few_step, fit_teacher, memory_lines, prepare, training_set
from stillhouse.lidar.run import config_of
from stillhouse.lidar.scoring import diffusion_contender, scene_pairs, score

TINY: dict[str, Any] = {
    "data": {
        "streets": 2,
        "test_streets": 2,
        "scans": 2,
        "rings": 16,
        "azimuths": 120,
        "map_rays": 2048,
        "points": 60,
        "factor": 4,
        "max_range": 15.0,
    },
    "model": {"channels": [8, 8, 8, 8, 8], "single_channels": [8, 8, 8, 8, 8], "voxel": 0.5, "batch_size": 2},
    "teacher": {"steps": 6},
    "distill": {"steps": 6, "single_steps": 6},
    "optim": {"name": "adam"},
    "train": {"log_every": 2, "checkpoint_every": 2, "threads": 1},
    "evaluate": {"teacher_steps": [4, 1], "student_steps": [2, 1], "scans": 1, "resamples": 100},
}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_file: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--config", str(tiny_file), "--out", str(out), "--seed", "3"]) == 0
    return out


def test_a_run_leaves_a_student_results_pictures_and_a_page(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    rows = results["tables"]["simulated streets"]
    assert [row["name"] for row in rows] == [
        "teacher, 4 steps",
        "teacher, 1 step",
        "Distillation-DPO student, 2 steps",
        "Distillation-DPO student, 1 step",
        "VSD student, 2 steps",
        "VSD student, 1 step",
        "single-pass student",
        "single-pass network without a teacher",
    ]
    assert [row["evaluations"] for row in rows] == [8, 2, 2, 1, 2, 1, 1, 1]  # the teacher is guided
    assert all(row["scores"]["chamfer"]["estimate"] > 0 for row in rows)
    assert len(results["pictures"]) == 4
    assert all((finished / path).is_file() for group in results["pictures"] for _, path in group["tiles"])
    page = (finished / "report.html").read_text()
    assert "simulated" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert config_of(finished).train.seed == 3
    assert load_completer(finished).settings.kind == "diffusion"


def test_no_teacher_is_in_a_checkpoint_of_a_student(finished: Path) -> None:
    from stillhouse.core.train import latest_checkpoint

    for method in ("distillation_dpo", "single_pass"):
        checkpoint = latest_checkpoint(finished / method / "checkpoints")
        assert checkpoint is not None
        assert not any("teacher" in path.name for path in checkpoint.iterdir())


def test_evaluate_report_and_a_second_run_from_the_teacher(
    finished: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "report.html").read_bytes()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == before
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--out", str(tmp_path / "e"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scans"] == 2
    assert told["scores"]["chamfer"]["estimate"] > 0
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["convention"] == "correct"
    arguments = ["train", "--config", str(tiny_file), "--out", str(tmp_path / "again"), "--seed", "3"]
    arguments += ["--set", f"teacher.weights={finished}", "--set", "distill.students=('vsd',)"]
    assert main(arguments) == 0
    one, two = (
        load_completer(folder).networks["encoder"].state_dict() for folder in (finished, tmp_path / "again")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main([*arguments[:-1], "distill.students=('vsd',)", "--set", "model.voxel=0.4"]) == 2
    assert "other sizes" in " ".join(capsys.readouterr().err.split())


def test_a_teacher_alone_is_the_artefact(tiny_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "alone"
    assert main(["train", "--config", str(tiny_file), "--out", str(out), "--set", "distill.students=()"]) == 0
    assert load_completer(out / "teacher" / "artifact").settings.steps == 4


def test_killed_and_started_again_it_ends_with_the_same_weights(
    finished: Path, tiny_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [
        "-m",
        "stillhouse.lidar",
        "train",
        "--config",
        str(tiny_file),
        "--out",
        str(out),
        "--seed",
        "3",
    ]
    at = np.random.default_rng().choice(["teacher/noise", "distillation_dpo", "single_pass"])

    def far_enough() -> bool:
        return any((out / at / "checkpoints").glob("step-*"))

    killed = run_script(command, kill_when=far_enough, timeout=400)
    assert killed.returncode == -9
    assert not (out / "report.html").exists()
    assert main(["train", "--config", str(tiny_file), "--out", str(out), "--seed", "3"]) == 0
    one, two = (load_completer(folder).networks["noise"].state_dict() for folder in (finished, out))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def _student_weights(devices: int) -> dict[str, Any]:
    """Weights of a distilled student after some steps on this rank."""
    config = load_config(LidarConfig, TINY)
    config = replace(config, train=replace(config.train, devices=devices, checkpoint_every=0))
    data = prepare(config)
    dataset = training_set(config, data)
    teacher, _ = fit_teacher(config, dataset, seed=0, out=None, quiet=True)
    student, _ = fit_few_step(config, dataset, teacher, "distillation_dpo", seed=0, out=None, quiet=True)
    return {name: value.tolist() for name, value in student.named_parameters()}


@pytest.mark.slow
def test_two_processes_end_with_one_student() -> None:
    """Every process draws noise of its own, so that two of them are no copy of one; they stay in step."""
    first, second = run_ranks(_student_weights, 2, 2, timeout=300)
    assert first == second
    assert all(np.isfinite(np.array(value)).all() for value in first.values())


def test_the_presets_are_whole_and_memory_is_told_before() -> None:
    names = list_presets("stillhouse.lidar.configs")
    assert {"demo", "streets_small", "semantickitti_paper", "semantickitti_paper_teacher"} <= set(names)
    paper = load_config(LidarConfig, "semantickitti_paper", presets="stillhouse.lidar.configs")
    assert (paper.data.points, paper.data.factor, paper.teacher.timesteps) == (18_000, 10, 1000)
    assert paper.model.channels == (32, 32, 64, 128, 256, 256, 128, 96, 96)
    assert (paper.optim.name, paper.distill.lr, paper.train.clip_norm) == ("sgd", 1e-5, 0.05)
    lines = memory_lines(paper)
    assert len(lines) == 2
    assert "MiB" in lines[0]


def test_bad_configurations_are_named() -> None:
    for section, entries, word in (
        ("data", {"max_range": 2.0}, "max_range"),
        ("data", {"train": ["00"], "test": ["00"]}, "both hold"),
        ("model", {"channels": [8, 8]}, "channels"),
        ("teacher", {"beta_end": 2.0}, "beta_end"),
        ("distill", {"students": ["vsd", "vsd"]}, "each once"),
        ("distill", {"times": [5, 5]}, "times"),
        ("evaluate", {"teacher_steps": [0]}, "teacher_steps"),
        ("evaluate", {"teacher_guidance": float("nan")}, "teacher_guidance"),
    ):
        with pytest.raises(ConfigError, match=word):
            load_config(LidarConfig, {section: entries})


def test_sequences_that_are_not_there_are_named(drive_folder: Path) -> None:
    root = drive_folder.parent
    config = load_config(LidarConfig, {"data": {"path": str(root), "test": ["00"], "train": ["07"]}})
    with pytest.raises(DataError, match="no sequence '07'"):
        prepare(config)
    with pytest.raises(DataError, match="name both"):
        prepare(load_config(LidarConfig, {"data": {"path": str(root), "test": ["00"]}}))
    with pytest.raises(DataError, match="holds no sequences"):
        prepare(load_config(LidarConfig, {"data": {"path": str(drive_folder), "test": ["00"]}}))


# ---- the method: a student of few steps against its teacher at as few


@pytest.mark.slow
def test_t9_a_distilled_student_beats_its_teacher_at_one_and_two_steps() -> None:
    """On held-out streets, over three seeds, by Chamfer distance and by JSD from above."""
    config = load_config(
        LidarConfig,
        "demo",
        presets="stillhouse.lidar.configs",
        overrides=["teacher.steps=250", "distill.steps=60", "train.threads=1"],
    )
    gains: dict[tuple[int, str], list[float]] = {}
    data = prepare(config)
    dataset = training_set(config, data)
    pairs = scene_pairs(config, data.test, scans=2)
    for seed in range(3):
        teacher, _ = fit_teacher(config, dataset, seed=seed, out=None, quiet=True)
        student, _ = fit_few_step(
            config, dataset, teacher, "distillation_dpo", seed=seed, out=None, quiet=True
        )
        for steps in (1, 2):
            rows = [
                diffusion_contender(name, "teacher", network, teacher, config, steps=steps, guidance=1.0)
                for name, network in (("teacher", teacher.noise), ("student", student))
            ]
            theirs, mine = score(rows, pairs, config, seed=seed)
            for metric in ("chamfer", "jsd_bev"):
                gap = np.mean(theirs.values[metric]) - np.mean(mine.values[metric])
                gains.setdefault((steps, metric), []).append(float(gap))
    for key, values in gains.items():
        assert np.mean(values) > 0, (key, gains)
    assert min(gains[1, "chamfer"] + gains[2, "chamfer"]) > 0.02, gains
