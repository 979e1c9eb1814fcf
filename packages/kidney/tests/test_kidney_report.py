from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from stillhouse.core.errors import DataError
from stillhouse.core.report import compare_profiles, profile_rows
from stillhouse.kidney.data import Collection, split_collection
from stillhouse.kidney.data.leakage import check_leakage
from stillhouse.kidney.gallery import Gallery
from stillhouse.kidney.metrics import (
    accuracy_difference,
    evaluate_embeddings,
    kshot_new_class,
    prototype_correct,
    unknown_detection,
)
from stillhouse.kidney.predict import thumbnails
from stillhouse.kidney.report import (
    KidneyResults,
    ModelRow,
    embedding_points,
    leakage_table,
    load_results,
    save_results,
    save_retrieval,
    write_report,
)


def embeddings_of(collection: Collection, noise: float, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Noisy class centres in place of a network's embeddings."""
    labels = [collection.classes.index(item.label) for item in collection.items]
    spread = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    return normalize(torch.eye(3, 8)[labels] + noise * spread, dim=1), labels


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stones: Collection) -> tuple[Path, KidneyResults]:
    """A run's folder with results, pictures and a log."""
    folder = tmp_path_factory.mktemp("run")
    parts = split_collection(stones, test=0.4)
    train, test = parts["train"], parts["test"]
    groups, views = [item.stone for item in test.items], [item.view for item in test.items]
    models, right = [], {}
    for name, role, noise in (
        ("teacher", "teacher", 0.1),
        ("student", "student", 0.2),
        ("no <distillation>", "baseline", 0.9),
    ):
        query, labels = embeddings_of(test, noise, 1)
        reference, reference_labels = embeddings_of(train, noise, 2)
        scores = evaluate_embeddings(
            query,
            labels,
            reference,
            reference_labels,
            classes=stones.classes,
            groups=groups,
            views=views,
            gallery_groups=[item.stone for item in train.items],
            gallery_views=[item.view for item in train.items],
            resamples=200,
        )
        right[name] = prototype_correct(query, labels, reference, reference_labels)
        models.append(ModelRow(name=name, role=role, scores=scores, note="A note."))  # type: ignore[arg-type]
    query, labels = embeddings_of(test, 0.2, 1)
    reference, reference_labels = embeddings_of(train, 0.2, 2)
    gallery = Gallery.build(
        reference,
        reference_labels,
        classes=stones.classes,
        stones=[item.stone for item in train.items],
        views=[item.view for item in train.items],
        thumbnails=thumbnails(train, side=32),
    )
    many = query.repeat(3, 1)
    comparison = compare_profiles(
        {"student": nn.Linear(4, 2), "teacher": nn.Linear(4, 64)}, torch.zeros(1, 4), runs=3, warmup=1
    )
    profiles, profile_note = profile_rows(comparison, what="image")
    (folder / "log.jsonl").write_text(
        "\n".join(
            json.dumps({"step": s, "role": "student", "total": 1 / (s + 1), "terms": {"kd": 1.0, "dml": 0.5}})
            for s in range(5)
        )
    )
    results = KidneyResults(
        data="simulated stones",
        simulated=True,
        models=models,
        calibration=dataclasses.asdict(gallery.calibration),
        gallery=gallery.counts,
        parts={name: part.counts() for name, part in parts.items()},
        split="stone",
        config={"train": {"steps": 5}, "note": "<script>alert(1)</script>"},
        command="stillhouse-kidney demo",
        made="2026-01-01T00:00:00Z",
        seed=0,
        differences={
            "student − baseline": accuracy_difference(
                right["student"], right["no <distillation>"], groups=groups
            )
        },
        seeds={"student": [0.8, 0.9, 0.85]},
        new_class={
            "student": kshot_new_class(
                many, labels * 3, shots=1, episodes=5, groups=[f"{i}" for i in range(len(many))]
            )
        },
        new_classes=["STR", "BRU"],
        unknown={"student": unknown_detection(query, -query, gallery.prototypes, threshold=0.5)},
        embedding=embedding_points(query, labels, gallery),
        retrieval=save_retrieval(test, query, gallery, folder, count=3, k=2),
        profiles=profiles,
        profile_note=profile_note,
        stones={name: len(part.stones) for name, part in parts.items()},
        notes=stones.notes,
        leakage=leakage_table(check_leakage(train, test)),
        split_gap={
            "stone": models[1].scores["accuracy"],
            "patch": {"estimate": 0.99, "low": 0.9, "high": 1.0},
        },
        log={"student": "log.jsonl"},
        timings={"student": 1.5},
        versions={"torch": torch.__version__},
    )
    save_results(results, folder)
    return folder, results


def test_results_come_back_from_the_folder(run: tuple[Path, KidneyResults]) -> None:
    folder, results = run
    again = load_results(folder)
    assert again.student.scores["accuracy"] == results.student.scores["accuracy"]
    assert again.retrieval[0].predicted == results.retrieval[0].predicted
    save_results(again, folder)
    assert load_results(folder) == again


def test_the_report_shows_what_was_measured(run: tuple[Path, KidneyResults]) -> None:
    folder, results = run
    page = write_report(folder).read_text(encoding="utf-8")
    table = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    titles = [section["title"] for section in table["sections"]]
    assert titles == [
        "Quality",
        "Views",
        "Classes",
        "Confidence",
        "What the student sees",
        "New and unknown classes",
        "Size and speed",
        "Data and leakage",
        "How it was made",
    ]
    mine = results.student.scores["accuracy"]
    assert f"{100 * mine['estimate']:.1f}\u202f%" in table["headline"]["sentence"]
    assert table["headline"]["facts"][0]["value"] == f"{100 * mine['estimate']:.1f}\u202f%"
    assert "say nothing about patients" in page
    assert page.count("<img ") >= 9  # three queries with two neighbours each
    assert page.count("<svg") >= 7
    assert "Past a distance of" in page
    assert "stillhouse-kidney demo" in page


def test_nothing_from_the_run_is_taken_for_html(run: tuple[Path, KidneyResults]) -> None:
    page = write_report(run[0]).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "no <distillation>" not in page
    assert "no &lt;distillation&gt;" in page
    assert not re.findall(r"(?:src|href)=[\"']https?://", page)


def test_the_same_results_give_the_same_page(run: tuple[Path, KidneyResults], tmp_path: Path) -> None:
    folder, results = run
    first = write_report(folder, results, out=tmp_path / "a").read_bytes()
    second = write_report(folder, out=tmp_path / "b").read_bytes()
    assert first == second


def test_a_bare_run_has_a_report_too(run: tuple[Path, KidneyResults], tmp_path: Path) -> None:
    """One model, one view, unknown stones, nothing held out, no pictures."""
    scores = evaluate_embeddings(torch.eye(2), [0, 1], torch.eye(2), [0, 1], classes=("A", "B"))
    bare = KidneyResults(
        data="a folder",
        simulated=False,
        models=[ModelRow(name="student", role="student", scores=scores)],
        calibration={},
        gallery={},
        parts={},
        split="patch",
        config={},
        command="",
        made="",
        seed=0,
    )
    page = write_report(tmp_path, bare).read_text(encoding="utf-8")
    assert "images of the same stone are in training and test" in page
    assert "was not checked" in page
    assert "say nothing about patients" not in page


def test_pictures_that_are_gone_are_said_to_be_gone(run: tuple[Path, KidneyResults], tmp_path: Path) -> None:
    _, results = run
    page = write_report(tmp_path, results).read_text(encoding="utf-8")
    assert "3 rows of pictures are left out" in page
    assert "is no longer in the run’s folder" in page


def test_pictures_outside_the_folder_are_not_read(run: tuple[Path, KidneyResults], tmp_path: Path) -> None:
    folder, results = run
    row = dataclasses.replace(results.retrieval[0], image="../secret.png", neighbours=[])
    (tmp_path / "secret.png").write_bytes((folder / results.retrieval[0].image).read_bytes())
    inside = tmp_path / "run"
    inside.mkdir()
    page = write_report(inside, dataclasses.replace(results, retrieval=[row])).read_text(encoding="utf-8")
    assert "1 rows of pictures are left out" in page


def test_a_baseline_that_beats_the_student_is_said_at_the_top(
    run: tuple[Path, KidneyResults], tmp_path: Path
) -> None:
    folder, results = run
    better = {**results.student.scores, "accuracy": {"estimate": 1.0, "low": 0.9, "high": 1.0}}
    worse = {**results.student.scores, "accuracy": {"estimate": 0.1, "low": 0.0, "high": 0.2}}
    rows = [
        dataclasses.replace(row, scores=worse)
        if row.role == "student"
        else dataclasses.replace(row, scores=better)
        for row in results.models
    ]
    name = next(row.name for row in rows if row.role == "baseline")
    lost = {f"{results.student.name} − {name}": {"estimate": -0.9, "low": -1.0, "high": -0.8}}
    changed = dataclasses.replace(results, models=rows, differences=lost)
    write_report(folder, changed, out=tmp_path)
    said = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["headline"]["sentence"]
    assert f"Better than the student: {name} (beyond chance)" in said
    assert "show that the method works" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_leakage_is_loud(run: tuple[Path, KidneyResults], stones: Collection, tmp_path: Path) -> None:
    _, results = run
    found = leakage_table(check_leakage(stones, stones))
    page = write_report(tmp_path, dataclasses.replace(results, leakage=found)).read_text(encoding="utf-8")
    assert "scores may be too good" in page
    assert f"{len(stones.stones)}: " in page


def test_wrong_answers_are_shown_too(stones: Collection, tmp_path: Path) -> None:
    query, labels = embeddings_of(stones, 0.05, 0)
    labels = [
        (label + (at % 2)) % 3 for at, label in enumerate(labels)
    ]  # half of the references have a wrong class
    gallery = Gallery.build(query, labels, classes=stones.classes, thumbnails=thumbnails(stones, side=16))
    rows = save_retrieval(stones, query, gallery, tmp_path, count=4, k=1)
    assert len(rows) == 4
    assert 1 <= sum(row.predicted != row.label for row in rows) <= 2 or all(
        r.predicted != r.label for r in rows
    )
    assert all((tmp_path / row.image).is_file() for row in rows)


def test_map_is_a_projection(stones: Collection) -> None:
    query, labels = embeddings_of(stones, 0.1, 0)
    gallery = Gallery.build(query, labels, classes=stones.classes)
    table = embedding_points(query, labels, gallery)
    points, centres = torch.tensor(table["points"]), torch.tensor(table["prototypes"])
    for c in range(3):  # linear: a prototype lies at the mean of its class on the map as well
        own = torch.tensor(table["labels"]) == c
        torch.testing.assert_close(points[own].mean(dim=0), centres[c], atol=1e-3, rtol=0)
    assert 0 < table["explained"] <= 1
    assert len(embedding_points(query, labels, gallery, limit=5)["points"]) == 5


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(format="x"), "not the results of a kidney run"),
        (lambda t: t.update(schema=9), "schema 9"),
        (lambda t: t.update(extra=1), "unknown entry 'extra'"),
        (lambda t: t.pop("models"), "cannot be read"),
        (lambda t: t.update(models=[]), "0 rows with the role 'student'"),
    ],
)
def test_damaged_results_are_one_clear_error(
    run: tuple[Path, KidneyResults], tmp_path: Path, edit: Any, message: str
) -> None:
    table = json.loads((run[0] / "results.json").read_text(encoding="utf-8"))
    edit(table)
    (tmp_path / "results.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        load_results(tmp_path)


def test_no_results_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the folder of a finished run"):
        load_results(tmp_path)
