"""The report: results round trip, what the headline claims, pictures and logs that are gone, escaping."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.core.errors import DataError
from stillhouse.core.metrics import Interval
from stillhouse.lidar.report import (
    LidarResults,
    PictureGroup,
    RowResult,
    build_report,
    load_results,
    save_results,
    save_scene_pictures,
    write_report,
)


def score(value: float, width: float | None = 0.01) -> dict[str, float | None]:
    ends = (None, None) if width is None else (value - width, value + width)
    return {"estimate": value, "low": ends[0], "high": ends[1]}


def row(name: str, family: Any, steps: int | None, chamfer: float, bev: float, **more: Any) -> RowResult:
    values = {
        "iou_0.1": score(0.1, None),
        "iou_0.5": score(0.4),
        "chamfer": score(chamfer),
        "jsd_bev": score(bev),
        "jsd_3d": score(bev + 0.1),
        "f_score": score(12.0),
    }
    settings: dict[str, Any] = {
        "guidance": None if steps is None else 1.0,
        "parameters": 1000,
        "evaluations": steps or 1,
        "seconds": 0.1 * (steps or 1),
        "speedup": 50 / (steps or 1),
        "scores": values,
    }
    return RowResult(name=name, family=family, steps=steps, **(settings | more))


TEACHER = row("teacher, 50 steps", "teacher", 50, 0.50, 0.30)
TEACHER_2 = row("teacher, 2 steps", "teacher", 2, 0.90, 0.50)
DPO = row("Distillation-DPO, 2 steps", "few_step", 2, 0.40, 0.25)
SINGLE = row("single pass", "single_pass", None, 0.45, 0.28)
ALONE = row("single pass alone", "single_pass", None, 0.55, 0.33, undistilled=True)


def results(*rows: RowResult, **more: Any) -> LidarResults:
    settings: dict[str, Any] = {
        "data": "simulated streets",
        "simulated": True,
        "tables": {"simulated streets": rows or (TEACHER, TEACHER_2, DPO, SINGLE, ALONE)},
        "command": "stillhouse-lidar demo",
        "made": "2026-01-01T00:00:00Z",
        "seed": 0,
    }
    return LidarResults(**(settings | more))


def headline(given: LidarResults) -> str:
    return str(build_report(given, Path(".")).to_dict()["headline"]["sentence"])


def text(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    page = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).replace("\u202f", " ").split())


# ---- plain data


def test_results_round_trip(tmp_path: Path) -> None:
    given = results(
        pictures=[PictureGroup(scene="a", view="above", tiles=[("sweep", "images/a.png")])],
        preference=[{"method": "VSD", "λ": 0.0, "CD": score(0.5)}],
        scans={"simulated streets": ["000000", "000001"]},
        differences={"simulated streets": {"a − b": score(-0.1)}},
        seeds=[0, 1, 2],
        notes=["a note"],
        poses=["refined by ICP"],
        memory={"teacher": "120 MiB"},
        timings={"teacher": 12.5},
        config={"data": {"points": 400}},
        versions={"torch": "2"},
        log={"teacher": "teacher/log.jsonl"},
    )
    assert save_results(given, tmp_path).name == "results.json"
    assert load_results(tmp_path) == given
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(format="other"), "it is not the results of a lidar run"),
        (lambda table: table.update(schema=2), "it has schema 2, this version reads 1"),
        (lambda table: table.update(colour="red"), "unknown entry 'colour'"),
        (lambda table: table.pop("command"), "command"),
        (lambda table: table.update(tables={}), "tables holds no row"),
        (lambda table: table.update(tables=[1]), "cannot be read"),
        (lambda table: table["tables"]["simulated streets"][0].update(family="x"), "family is 'x'"),
    ],
)
def test_results_that_cannot_be_read(change: Any, message: str, tmp_path: Path) -> None:
    path = save_results(results(), tmp_path)
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=message) as raised:
        load_results(tmp_path)
    assert str(path) in str(raised.value)


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json: is missing"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        write_report(tmp_path)


def test_results_refuse() -> None:
    with pytest.raises(ValueError, match="convention is 'mine'"):
        results(convention="mine")
    with pytest.raises(ValueError, match="two rows of one name"):
        results(TEACHER, TEACHER)
    with pytest.raises(ValueError, match="tables holds no row"):
        results(tables={"a": []})


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("teacher, 50 steps", "teacher"),
        ("VSD (1 step)", "VSD"),
        ("Distillation-DPO 4 steps", "Distillation-DPO"),
        ("single pass", "single pass"),
        ("8 steps", "8 steps"),
    ],
)
def test_rows_of_one_model(name: str, model: str) -> None:
    assert row(name, "few_step", 4, 1, 1).model == model
    assert row(name, "few_step", 4, 1, 1, model="mine").model == "mine"


# ---- what the top says


def test_headline_of_a_student_that_wins() -> None:
    said = headline(results())
    assert "the lowest Chamfer distance is that of “Distillation-DPO, 2 steps”, 0.400 m" in said
    assert "which has the lowest JSD-BEV as well, 0.250" in said
    assert "2 of 2 rows of students with at most 8 steps beat “teacher, 50 steps” in both" in said
    assert "the fastest of them is “single pass”, 50 times as fast." in said
    assert "“single pass” beats “single pass alone” in both within a tenth of its time." in said


def test_headline_of_students_that_lose() -> None:
    said = headline(results(TEACHER, row("VSD, 2 steps", "few_step", 2, 0.6, 0.2), ALONE))
    assert "the lowest Chamfer distance is that of “teacher, 50 steps”" in said
    assert "the lowest JSD-BEV that of “VSD, 2 steps”, 0.200" in said
    assert "No student of at most 8 steps beats “teacher, 50 steps” in both" in said
    assert "No student beats “single pass alone” in both." in said


def test_a_student_of_many_steps_and_the_undistilled_do_not_count() -> None:
    many = row("VSD, 20 steps", "few_step", 20, 0.1, 0.1)
    good_alone = replace(ALONE, scores=DPO.scores)
    said = headline(results(TEACHER, many, row("VSD, 1 step", "few_step", 1, 0.7, 0.7), good_alone))
    assert "No student of at most 8 steps beats" in said
    assert "Better than “single pass alone” in both is “VSD, 20 steps”, in more time." in said


def test_headline_with_half_of_it_missing() -> None:
    assert "No student" not in headline(results(DPO))  # nobody to compare with
    bare = replace(DPO, scores={"iou_0.5": score(0.1)}, speedup=None)
    assert headline(results(bare)) == "On simulated streets: no distances were measured."
    build_report(results(TEACHER, bare), Path(".")).html()


# ---- the page


def test_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clouds = {
        name: rng.uniform(-9, 9, (200, 3)) for name in ("sweep", "truth", "DPO, 2 steps", "DPO 2 steps")
    }
    groups = save_scene_pictures(tmp_path, "street <3>", clouds, 10.0, width=96)
    assert [(group.scene, group.view) for group in groups] == [
        ("street <3>", "above"),
        ("street <3>", "oblique"),
    ]
    names = [name for group in groups for _, name in group.tiles]
    assert len(set(names)) == 8
    assert all((tmp_path / name).is_file() for name in names)
    (tmp_path / names[0]).unlink()
    rows = [{"step": i, "role": "student", "total": 1.0, "terms": {"fisher": 1 / (i + 1)}} for i in range(4)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path.parent / "outside.jsonl").write_text(json.dumps(rows[0]))
    given = results(
        pictures=groups,
        log={
            "student": "log.jsonl",
            "gone": "none.jsonl",
            "none": "empty.jsonl",
            "outside": "../outside.jsonl",
        },
        preference=[{"method": "VSD", "CD": score(0.5)}, {"method": "DPO <λ=1>", "note": "diverged"}],
        preference_note="What the loser is worth.",
        notes=["<script>alert(1)</script>"],
        poses=["ICP moved sweep 3 by 12 cm."],
        memory={"teacher": "120 MiB: 1,000 parameters"},
        differences={
            "simulated streets": {
                "chamfer, m: DPO − teacher": score(-0.1),
                "jsd: DPO − teacher": score(0, 0.1),
            }
        },
        scans={"simulated streets": ["000000"]},
        intervals="drives",
        config={"data": {"points": 400}},
    )
    save_results(given, tmp_path)
    page = write_report(tmp_path)
    said = text(page)
    for part in (
        "in the correct convention",
        "0.693 disjoint",
        "95 % intervals that resample drives",
        "trained on simulated streets",
        "1 picture is left out: its file is no longer",
        "gone: its log is no longer in the run’s folder",
        "none: nothing to draw",
        "outside: its log is no longer",
        "ICP moved sweep 3 by 12 cm.",
        "120 MiB: 1,000 parameters",
        "What the loser is worth.",
        "0.500 [0.490, 0.510]",
        "IoU 0.5 m",
        "Sweeps that were scored, simulated streets: 000000.",
        "stillhouse-lidar demo",
        "data.points",
    ):
        assert part in said, part
    raw = page.read_text(encoding="utf-8")
    assert "<script>alert" not in raw
    assert "street &lt;3&gt;" in raw
    assert raw.count("data:image/") == 7


def test_reference_convention_is_named() -> None:
    plain = build_report(results(convention="reference"), Path(".")).to_dict()
    assert "**reference** convention" in plain["summary"]
    assert "0.833 disjoint" in plain["summary"]
    captions = [b.get("caption", "") for section in plain["sections"] for b in section["blocks"]]
    assert any("reference convention" in caption for caption in captions)


def test_best_of_each_column_is_marked() -> None:
    tables = [
        block
        for section in build_report(results(), Path(".")).sections
        for block in section.blocks
        if block["type"] == "table"
    ]
    table = tables[0]
    heads = [head["heading"] for head in table["heads"]]
    assert heads == ["row", "CD, m", "JSD-3D", "JSD-BEV"]
    winners = [[cells[c]["best"] for cells in table["shown"]].index(True) for c in (1, 2, 3)]
    assert winners == [2, 2, 2]
    overlap = next(t for t in tables if t["heads"][1]["heading"].startswith("IoU"))
    assert [head["heading"] for head in overlap["heads"]] == ["row", "IoU 0.5 m", "IoU 0.1 m"]
    assert isinstance(overlap["cells"][0][1], Interval)
    assert overlap["cells"][0][2] == 0.1  # no interval was measured


def test_curves_have_a_line_a_network() -> None:
    report = build_report(results(), Path("."))
    section = next(section for section in report.sections if section.title == "Steps, quality, time")
    figures = next(block for block in section.blocks if block["type"] == "figures")["figures"]
    assert len(figures) == 2
    assert "teacher: 0.500 in 5 s (50 steps), 0.900 in 0.2 s (2 steps)" in figures[0]["alt"]
    assert "single pass: 0.450 in 0.1 s" in figures[0]["alt"]


def test_pictures_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clouds is empty"):
        save_scene_pictures(tmp_path, "a", {}, 10.0)
    with pytest.raises(ValueError, match=r"points must be \[N, 3\]"):
        save_scene_pictures(tmp_path, "a", {"sweep": np.zeros(3)}, 10.0)
