from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.core.errors import DataError
from stillhouse.core.report import compare_profiles, profile_rows
from stillhouse.genomic.report import (
    GenomicResults,
    ModelRow,
    TaskRow,
    embedding_points,
    load_results,
    save_results,
    write_report,
)

TASKS = ("donor, hard decoys", "regions", "species")
ROWS = (
    ("teacher", "teacher", 0.60),
    ("HAD", "student", 0.55),
    ("random <init>", "baseline", 0.10),
    ("reconstruct only", "ablation", 0.50),
    ("shuffled teacher", "ablation", 0.30),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GenomicResults]:
    """A run's folder with results and logs; the numbers are made up."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    scores: dict[str, Any] = {}
    for name, _, level in ROWS:
        scores[name] = {}
        for at, task in enumerate(TASKS):
            middle = level + 0.1 * at
            scores[name][task] = {
                "estimate": middle,
                "low": middle - 0.04,
                "high": middle + 0.05,
                "accuracy": {"estimate": 0.5 + middle / 2, "low": 0.5, "high": 1.0},
                "auroc": {"estimate": 0.6 + middle / 3, "low": 0.6, "high": 0.99},
                "seeds": [middle - 0.01, middle, middle + 0.01],
            }
    comparison = compare_profiles(
        {"HAD": nn.Linear(8, 8), "teacher": nn.Linear(8, 512)},
        torch.zeros(4, 8),
        baseline="teacher",
        runs=3,
        warmup=1,
    )
    profiles, note = profile_rows(comparison, what="window")
    labels = rng.integers(0, 3, 120)
    features = rng.normal(size=(120, 8)) + 3 * np.eye(3, 8)[labels]
    rows = []
    for step in range(1, 31):
        terms = {"align": 1 / step, "reconstruct": 1.4 - step / 100, "grad_norm": 1.0}
        if step % 5 == 0:
            terms |= {"gradient_align": 0.2 / step, "gradient_reconstruct": 0.02 + step / 1000}
        rows.append({"step": step, "role": "student", "total": 2.4 / step, "terms": terms})
    (folder / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    results = GenomicResults(
        data="a simulated genome",
        simulated=True,
        models=[
            ModelRow(name=name, role=role, parameters=10 ** (5 + (role == "teacher")), note="A note.")  # type: ignore[arg-type]
            for name, role, _ in ROWS
        ],
        tasks=[
            TaskRow(
                name=name,
                metric="mcc (plain)",
                classes=("no", "yes"),
                train=300,
                test=200,
                groups=40,
                chance=0.0,
            )
            for name in TASKS
        ],
        scores=scores,
        differences=[
            {
                "difference": "HAD − reconstruct only",
                "task": TASKS[0],
                "estimate": 0.05,
                "low": 0.01,
                "high": 0.09,
            },
            {"difference": "HAD − teacher", "task": TASKS[0], "estimate": -0.05, "low": -0.1, "high": 0.02},
        ],
        finetuned=[
            {
                "task": "promoters",
                "model": "HAD",
                "metric": "f1_binary (caduceus)",
                "estimate": 0.9,
                "low": 0.88,
                "high": 0.92,
                "half_range": 0.01,
                "seeds": 3,
            }
        ],
        profiles=profiles,
        profile_note=note,
        throughput=[
            {"model": "teacher", "bases_per_second": 1e4, "parameters": 10**6},
            {"model": "HAD", "bases_per_second": 7.3e5, "parameters": 10**5},
        ],
        embedding=[
            embedding_points(features, labels, ("exon", "intron", "intergenic"), title="HAD"),
            embedding_points(
                features, labels, ("exon", "intron", "intergenic"), title="teacher", method="tsne"
            ),
        ],
        consistency={"HAD": {"cosine": 0.8, "low": 0.6, "high": 0.95}, "teacher": {"cosine": 0.4}},
        logs={"HAD": "log.jsonl"},
        gradient_logs={"HAD": "log.jsonl"},
        parts={
            name: {"tiles": 100, "bases": 51200, "records": 3} for name in ("train", "validation", "test")
        },
        notes=["2,220 letters are N."],
        licences=[{"what": "teacher", "name": "NTv2", "licence": "CC-BY-NC-SA-4.0"}],
        card="# A student\n\nMay be used **non-commercially** <b>only</b>.",
        timings={"teacher": 12.0, "student": 30.5},
        config={"train": {"steps": 30}, "note": "<script>alert(1)</script>"},
        command="stillhouse-genomic demo",
        made="2026-01-01T00:00:00Z",
        seed=0,
        versions={"torch": torch.__version__},
    )
    save_results(results, folder)
    return folder, results


def test_results_come_back_from_the_folder(run: tuple[Path, GenomicResults]) -> None:
    folder, results = run
    again = load_results(folder)
    assert again.student.name == results.student.name
    save_results(again, folder)
    assert load_results(folder) == again


def test_the_report_shows_what_was_measured(run: tuple[Path, GenomicResults]) -> None:
    folder, _ = run
    page = write_report(folder).read_text(encoding="utf-8")
    table = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [section["title"] for section in table["sections"]] == [
        "Quality",
        "Ablation",
        "Fine-tuning",
        "Maps",
        "The two strands",
        "Size and speed",
        "Training",
        "Data",
        "Licences and card",
        "How it was made",
    ]
    facts = {fact["label"]: fact["value"] for fact in table["headline"]["facts"]}
    assert facts["tasks at or above the teacher"] == "0 of 3"
    assert facts["of its parameters"] == "1/10"
    assert facts["its embedding speed"] == "73 ×"
    assert "say nothing about organisms" in page
    assert "CC-BY-NC-SA-4.0" in page
    assert page.count("<svg") >= 8
    ablation = next(section for section in table["sections"] if section["title"] == "Ablation")
    rows = ablation["blocks"][1]["rows"]
    assert rows[1]["mean"] == pytest.approx(0.65)


def test_ablations_that_beat_the_student_are_said_at_the_top(
    run: tuple[Path, GenomicResults], tmp_path: Path
) -> None:
    folder, results = run
    scores = {**results.scores, "HAD": results.scores["random <init>"]}
    write_report(folder, dataclasses.replace(results, scores=scores), out=tmp_path)
    said = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["headline"]["sentence"]
    assert "higher than the student: " in said
    assert "reconstruct only on 3 of 3" in said
    assert "shuffled teacher on 3 of 3" in said


def test_nothing_from_the_run_is_taken_for_html(run: tuple[Path, GenomicResults]) -> None:
    page = write_report(run[0]).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "random <init>" not in page
    assert "<b>only" not in page
    assert not re.findall(r"(?:src|href)=[\"']https?://", page)


def test_the_same_results_give_the_same_page(run: tuple[Path, GenomicResults], tmp_path: Path) -> None:
    folder, results = run
    first = write_report(folder, results, out=tmp_path / "a").read_bytes()
    assert first == write_report(folder, out=tmp_path / "b").read_bytes()


def test_a_bare_run_has_a_report_too(tmp_path: Path) -> None:
    bare = GenomicResults(
        data="a file",
        simulated=False,
        models=[ModelRow(name="student", role="student")],
        tasks=[],
        scores={},
        config={},
        command="",
        made="",
        seed=0,
    )
    page = write_report(tmp_path, bare).read_text(encoding="utf-8")
    assert "evaluated on 0 tasks" in page
    assert "organisms" not in page


def test_logs_that_are_gone_or_outside_are_said_to_be_gone(
    run: tuple[Path, GenomicResults], tmp_path: Path
) -> None:
    _, results = run
    page = write_report(tmp_path, results).read_text(encoding="utf-8")
    assert "is no longer in the run’s folder" in page
    (tmp_path / "inside").mkdir()
    (tmp_path / "log.jsonl").write_text("{}")
    outside = dataclasses.replace(results, logs={"HAD": "../log.jsonl"}, gradient_logs={})
    page = write_report(tmp_path / "inside", outside).read_text(encoding="utf-8")
    assert "is no longer in the run’s folder" in page


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(format="x"), "not the results of a genomic run"),
        (lambda t: t.update(schema=9), "schema 9"),
        (lambda t: t.update(extra=1), "unknown entry 'extra'"),
        (lambda t: t.pop("models"), "cannot be read"),
        (lambda t: t.update(models=[]), "0 rows with the role 'student'"),
        (lambda t: t["scores"].update(nobody={}), "'nobody'"),
    ],
)
def test_damaged_results_are_one_clear_error(
    run: tuple[Path, GenomicResults], tmp_path: Path, edit: Any, message: str
) -> None:
    table = json.loads((run[0] / "results.json").read_text(encoding="utf-8"))
    edit(table)
    (tmp_path / "results.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_results(tmp_path)


def test_no_results_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the folder of a finished run"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_results(tmp_path)


def test_maps_are_of_the_standardised_features() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)) * [1, 100, 1, 1] + [0, 5000, 0, 0]
    first = embedding_points(x, np.zeros(50, int), ("a",))
    second = embedding_points(x / [1, 100, 1, 1], np.zeros(50, int), ("a",))
    np.testing.assert_allclose(np.abs(first["points"]), np.abs(second["points"]), atol=1e-3)
    assert 0 < first["explained"] <= 1
    assert len(embedding_points(x, np.zeros(50, int), ("a",), limit=7)["points"]) == 7
    with pytest.raises(ValueError, match="pca"):
        embedding_points(x, np.zeros(50, int), ("a",), method="umap")  # type: ignore[arg-type]
