"""The whole run: train, kill, resume, two processes, evaluate, export, report; and the method's own test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.core.config import list_presets, load_config
from stillhouse.core.testing import run_ranks, run_script
from stillhouse.kidney.cli import main
from stillhouse.kidney.config import KidneyConfig
from stillhouse.kidney.fit import Prepared, fit_classifier, fit_student, fit_teacher, prepare
from stillhouse.kidney.run import CLASSIFIER, STUDENT, TEACHER, UNGUIDED, config_of
from stillhouse.kidney.scoring import labels_of, score_classifier, score_embedding
from stillhouse.kidney.store import load_student

TINY: dict[str, Any] = {
    "data": {
        "stones_per_class": 4,
        "patches_per_fragment": 1,
        "test": 0.25,
        "image_size": 32,
        "new_classes": ["CYS"],
    },
    "model": {"width": 4, "dim": 8, "teacher_width": 4, "teacher_dim": 8},
    "teacher": {"steps": 6, "shots": 2, "queries": 2, "branches": ["class", "class"], "pool": 0, "refine": 0},
    "distill": {"per_class": 2, "pool": 0},
    "optim": {"lr": 3e-3},
    "train": {"steps": 6, "log_every": 2, "checkpoint_every": 2},
    "evaluate": {"resamples": 100, "new_class_shots": 1},
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


def test_a_run_leaves_a_student_results_and_a_page(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["models"]] == [TEACHER, STUDENT, UNGUIDED, CLASSIFIER]
    assert results["new_classes"] == ["CYS"]
    assert set(results["unknown"]) == {TEACHER, STUDENT, UNGUIDED}
    page = (finished / "report.html").read_text()
    assert "simulated" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    student = load_student(finished)
    assert student.gallery.classes == ("WW", "WD", "UA", "STR", "BRU")
    assert config_of(finished).train.seed == 3


def test_no_teacher_is_in_any_file_of_the_student(finished: Path) -> None:
    from stillhouse.core.train import latest_checkpoint, load_checkpoint

    checkpoint = latest_checkpoint(finished / "guided" / "checkpoints")
    assert checkpoint is not None
    names = [path.name for path in checkpoint.iterdir()]
    assert not any("teacher" in name for name in names), names
    state = load_checkpoint(checkpoint).parts["weights.student"]
    own = load_student(finished).network.state_dict()
    # The student and its metric loss, which has no weights of its own here; nothing of a teacher.
    assert {name.removeprefix("student.") for name in state} == set(own)


def test_evaluate_gives_the_accuracy_that_the_run_gave(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished / "student"), "--out", str(tmp_path / "e"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    results = json.loads((finished / "results.json").read_text())
    assert told["accuracy"] == pytest.approx(results["models"][1]["scores"]["accuracy"]["estimate"])


def test_evaluate_says_which_images_it_leaves_out(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stones"
    assert main(["simulate", "--stones", "2", "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--data", str(folder), "--out", str(tmp_path / "e")]) == 0
    count = len(list(folder.glob("*/CYS/*.png")))
    said = f"images of classes that the gallery does not have are left out: CYS ({count})"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in json.loads((tmp_path / "e" / "evaluation.json").read_text())["notes"]


def test_report_and_export_read_a_finished_run(finished: Path, tmp_path: Path) -> None:
    before = (finished / "report.html").read_bytes()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == before
    assert main(["report", str(finished), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "report.html").read_bytes() == before
    assert main(["export", str(finished / "student"), "--format", "torch", "--out", str(tmp_path / "x")]) == 0
    parity = json.loads((tmp_path / "x" / "export.json").read_text())["parity"]
    assert parity


def test_killed_and_started_again_it_ends_with_the_same_weights(
    finished: Path, tiny_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [
        "-m",
        "stillhouse.kidney",
        "train",
        "--config",
        str(tiny_file),
        "--out",
        str(out),
        "--seed",
        "3",
    ]
    at = np.random.default_rng().choice(["teacher", "guided"])

    def far_enough() -> bool:
        return any((out / at / "checkpoints").glob("step-*"))

    killed = run_script(command, kill_when=far_enough, timeout=300)
    assert killed.returncode == -9
    assert not (out / "report.html").exists()
    assert main(["train", "--config", str(tiny_file), "--out", str(out), "--seed", "3"]) == 0
    one, two = (load_student(folder).artifact.tensors() for folder in (finished, out))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def _teacher_weights(replicas: int) -> dict[str, Any]:
    """Weights of a teacher after some steps, of each of two ranks or of one process with both parts."""
    torch.use_deterministic_algorithms(True)
    config = load_config(KidneyConfig, TINY)
    config = replace(config, teacher=replace(config.teacher, steps=3, refine=1.0, refine_start=0.0, pool=3))
    config = replace(config, train=replace(config.train, devices=replicas, checkpoint_every=0))
    data = prepare(config, seed=0)
    import stillhouse.kidney.fit as fit

    fit._replicas = lambda train: 2  # type: ignore[assignment]  # both cases see the batch of two processes
    single = replace(config, train=replace(config.train, devices=1)) if replicas == 1 else config
    network, _ = fit_teacher(single, data, seed=0, out=None, quiet=True)
    return {name: value.tolist() for name, value in network.named_parameters()}


@pytest.mark.slow
def test_two_processes_train_the_teacher_as_one_does_but_for_batch_statistics() -> None:
    """Normalisation layers see half a batch each, so that weights agree closely and not to the bit."""
    two = run_ranks(_teacher_weights, 2, 2, timeout=300)
    assert two[0] == two[1]
    one = _teacher_weights(1)
    for name, value in one.items():
        difference = np.abs(np.array(value) - np.array(two[0][name]))
        assert difference.mean() < 0.02, name


# ---- the method, on simulated stones: what must come out in this order


@pytest.mark.slow
def test_shuffled_teacher_is_worse_than_none_and_the_true_one_is_not() -> None:
    config = load_config(
        KidneyConfig,
        "demo",
        presets="stillhouse.kidney.configs",
        overrides=["teacher.steps=150", "train.steps=150", "data.stones_per_class=10"],
    )
    scores: dict[str, list[float]] = {"shuffled": [], "none": [], "guided": []}
    for seed in range(3):
        data = prepare(config, seed=seed)
        teacher, _ = fit_teacher(config, data, seed=seed, out=None, quiet=True)
        ways = {
            "shuffled": replace(config.distill, shuffle_teacher=True, weight=5.0),
            "none": replace(config.distill, method="none"),
            "guided": config.distill,
        }
        for name, distill in ways.items():
            own = replace(config, distill=distill)
            student, _ = fit_student(
                own, data, None if name == "none" else teacher, seed=seed, out=None, quiet=True
            )
            row = score_embedding(own, student, data.train, data.test, data.classes, tau=distill.tau)
            scores[name].append(row.scores["accuracy"]["estimate"])
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    assert means["shuffled"] < means["none"] <= means["guided"], scores


def test_a_patch_split_warns_and_leaks(tiny_file: Path) -> None:
    config = load_config(
        KidneyConfig, {**TINY, "data": {**TINY["data"], "split": "patch", "patches_per_fragment": 3}}
    )
    with pytest.warns(UserWarning, match="patch-level"):
        data = prepare(config, seed=0)
    assert not data.leakage.ok
    assert data.leakage.shared_stones


def test_what_a_reader_must_know_is_a_line_and_no_python_warning(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leakage, few shots and enlarged images are said before training; nothing reaches the standard error."""
    from stillhouse.kidney import run as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_fit_all", stop)
    folder = tmp_path / "stones"
    assert main(["simulate", "--stones", "3", "--out", str(folder)]) == 0
    capsys.readouterr()
    arguments = ["train", "--config", str(tiny_file), "--out", str(tmp_path / "out")]
    for setting in (f"data.path={folder}", "data.split=patch", "data.shots=50", "data.image_size=128"):
        arguments += ["--set", setting]
    assert main(arguments) == 130
    said = capsys.readouterr()
    text = " ".join(said.out.split())
    assert text.count("note: stones: the split is patch-level") == 1
    assert "fewer than 50 shots" in text
    assert "images are smaller than the 128 pixels they are shown at" in text
    assert said.err.split() == ["error:", "interrupted"] or "Warning" not in said.err


def test_a_classifier_is_scored_by_its_softmax() -> None:
    config = load_config(KidneyConfig, TINY)
    data = prepare(config, seed=0)
    network, _ = fit_classifier(config, data, seed=0, out=None, quiet=True)
    row = score_classifier(config, network, data.train, data.test, data.classes)
    from stillhouse.kidney.data import PatchDataset

    images = PatchDataset(data.test, data.classes, size=32)
    with torch.no_grad():
        answers = torch.stack([network(images[i]["image"][None])[0] for i in range(len(images))]).argmax(1)
    assert row.scores["accuracy"]["estimate"] == pytest.approx(
        float((answers == labels_of(data.test, data.classes)).double().mean())
    )


def test_every_preset_is_a_configuration() -> None:
    for name in list_presets("stillhouse.kidney.configs"):
        assert isinstance(load_config(KidneyConfig, name, presets="stillhouse.kidney.configs"), KidneyConfig)


def test_the_pool_is_for_teacher_and_guided_student_only() -> None:
    config = load_config(
        KidneyConfig, {**TINY, "data": {**TINY["data"], "shots": 2, "patches_per_fragment": 2}}
    )
    data = prepare(config, seed=0)
    assert isinstance(data, Prepared)
    assert set(data.train.labels) == set(data.classes)
    assert set(data.pool.labels) == {""}
    assert {item.stone for item in data.pool.items}.isdisjoint({item.stone for item in data.test.items})
    without = prepare(replace(config, data=replace(config.data, pool=False)), seed=0)
    assert len(without.pool) == 0
    assert without.train.items == data.train.items


@pytest.mark.slow
def test_torchrun_trains_every_row_and_one_process_writes(tiny_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "stillhouse.kidney", "train", "--config", str(tiny_file), "--out", str(out)]
    done = run_script([*command, *train, "--set", "train.accelerator=cpu"], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["models"]] == [TEACHER, STUDENT, UNGUIDED, CLASSIFIER]
    assert done.stdout.count("report.html") == 1
