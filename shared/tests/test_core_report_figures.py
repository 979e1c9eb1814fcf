from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from stillhouse.core.errors import DataError
from stillhouse.core.metrics import Interval, reliability_curve
from stillhouse.core.report import (
    figures,
    palette,
)
from stillhouse.core.report._svg import figure_svg

MACHADO = {  # Machado, Oliveira & Fernandes 2009, severity 1.0, for linear RGB
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
           [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
           [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.array(lab) @ np.cbrt(np.array(lms) @ rgb.clip(0, 1))


@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_told_apart_by_colour_blind_readers_in_both_themes(dark: bool) -> None:
    variables = palette.variables(dark=dark)
    paper = variables["--paper"]
    colours = [variables[f"--s{i}"] for i in range(1, 9)]
    assert min(contrast(c, paper) for c in colours) >= 3.0
    assert contrast(variables["--ink"], paper) >= 7.0
    assert contrast(variables["--muted"], paper) >= 4.5
    for matrix in MACHADO.values():
        seen = [oklab(np.array(matrix) @ linear(c)) for c in colours]
        nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
        assert nearest > 0.07  # white and a barely visible grey #e8e8e8 are 0.07 apart


def test_figures_become_part_of_the_page() -> None:
    figure = figures.interval_bars(
        ["alpha <b>"], {"m": [Interval(0.5, 0.4, 0.6)], "n": [Interval(0.7, 0.6, 0.8)]}
    )
    canvas = figure.canvas
    svg, width = figure_svg(figure, prefix="p1", alt="An alt")
    assert figure.canvas is canvas
    assert width == pytest.approx(5.0 * 96)
    assert svg.startswith("<svg viewBox=")
    assert svg.endswith("</svg>")
    assert "alpha &lt;b&gt;" in svg
    assert "<metadata" not in svg
    assert "font-family" not in svg
    assert "DejaVu" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(i.startswith("p1-") for i in ids)
    used = set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg))
    assert used
    assert used <= set(ids)
    assert f"var(--s1, {palette.SERIES[0]})" in svg
    assert f"var(--s2, {palette.SERIES[1]})" in svg
    loose = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", svg)
    assert not re.search(r"#[0-9a-f]{6}\b", loose)  # every colour follows the theme
    with pytest.raises(ValueError, match="alt is empty"):
        figure_svg(figure, prefix="p", alt=" ")


def test_confusion_matrix_shows_shares_and_counts() -> None:
    figure = figures.confusion_matrix(
        np.array([[3, 1, 0], [0, 0, 0], [0, 5, 1495]]), ["a", "b", "c"], title="T"
    )
    axes = figure.axes[0]
    texts = [t.get_text().replace("\u202f", " ") for t in axes.texts]
    assert texts == ["75 %", "3", "25 %", "1", "0 %", "5", "100 %", "1 495"]
    shades = [round(float(p.get_alpha()), 4) for p in axes.patches]
    assert shades == [0.75, 0.25, 0, 0, 0, 0, 0, round(5 / 1500, 4), round(1495 / 1500, 4)]
    assert axes.get_title(loc="left") == "T"
    for wrong in (np.zeros((2, 3), int), np.array([[0.5]]), np.array([[-1]])):
        with pytest.raises(ValueError, match="counts has shape"):
            figures.confusion_matrix(wrong, ["a"] * len(wrong))


def test_reliability_diagram_draws_the_curve() -> None:
    p = np.array([[0.95, 0.05], [0.85, 0.15], [0.3, 0.7], [0.45, 0.55]])
    curve = reliability_curve(p, [0, 1, 1, 0], bins=5)
    top, below = figures.reliability_diagram({"m": curve}).axes
    np.testing.assert_allclose(
        top.lines[1].get_xydata(), np.stack([curve.confidence, curve.accuracy], axis=1)
    )
    np.testing.assert_allclose(top.collections[0].get_offsets(), top.lines[1].get_xydata())
    assert [bar.get_height() for bar in below.patches] == [0.25, 0.25, 0.5]
    assert [round(bar.get_x(), 6) for bar in below.patches] == [0.4, 0.6, 0.8]
    assert top.get_legend_handles_labels()[1] == [f"m, ECE {curve.error:.3f}"]
    with pytest.raises(ValueError, match="curves is empty"):
        figures.reliability_diagram({})


def test_embedding_map_draws_every_point_once() -> None:
    xy = np.random.default_rng(0).normal(size=(30, 2))
    labels = np.arange(30) % 4 - 1
    axes = figures.embedding_map(xy, labels, ["a", "b", "c"], prototypes=np.zeros((3, 2))).axes[0]
    drawn = {
        c.get_label(): np.asarray(c.get_offsets())
        for c in axes.collections
        if not c.get_label().startswith("_")
    }
    assert list(drawn) == ["unlabelled", "a", "b", "c"]
    for c, name in enumerate(drawn):
        np.testing.assert_allclose(drawn[name], xy[labels == c - 1])
    assert len(axes.collections) == 7  # three prototypes beside
    figures.embedding_map(np.zeros((0, 2)), np.zeros(0, int), ["a"])
    for points, wrong in ((xy[:, :1], labels), (xy, labels[:3]), (xy, labels + 1), (xy, labels * 1.0)):
        with pytest.raises(ValueError, match=r"points|labels"):
            figures.embedding_map(points, wrong, ["a", "b", "c"])


LOG = [
    {"step": 10, "role": "student", "total": 3.0, "terms": {"task": 2.0, "kd": 1.0}, "lr": 0.1},
    {"step": 20, "role": "student", "total": 2.5, "terms": {"task": 2.0, "kd": None}},
    {"step": 20, "evaluate": {"accuracy": 0.5}},
    {"step": 30, "role": "student", "total": 1.5, "terms": {"task": 1.0, "kd": 0.5}},
    {"step": 30, "evaluate": {"accuracy": 0.75}},
]


def test_training_curves_read_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in LOG) + "\n")
    for log in (LOG, path):
        losses, evaluation = figures.training_curves(log).axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
        assert lines == {
            "task": [[10, 2.0], [20, 2.0], [30, 1.0]],
            "kd": [[10, 1.0], [30, 0.5]],
            "total": [[10, 3.0], [20, 2.5], [30, 1.5]],
        }
        assert evaluation.lines[0].get_xydata().tolist() == [[20, 0.5], [30, 0.75]]
        assert evaluation.get_ylabel() == "accuracy"
    (only,) = figures.training_curves(LOG, terms=["kd"]).axes
    assert [line.get_label() for line in only.lines] == ["kd"]
    two_roles = [{**LOG[0]}, {**LOG[0], "role": "critic"}]
    labels = [line.get_label() for line in figures.training_curves(two_roles).axes[0].lines]
    assert "critic: kd" in labels
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.training_curves(LOG, terms=["absent"])


@pytest.mark.parametrize("content", [b"{", b"[1]\n", b'{"a": 1}\n', b"\xff\xfe"])
def test_logs_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"log\.jsonl: cannot be read as a training log"):
        figures.training_curves(tmp_path / "log.jsonl")
    with pytest.raises(DataError):
        figures.training_curves(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("from_zero", [True, False])
def test_interval_bars_reach_from_low_to_high(from_zero: bool) -> None:
    intervals = [Interval(0.5, 0.4, 0.7), Interval(0.9, 0.85, 0.92)]
    axes = figures.interval_bars(["x", "y"], {"m": intervals}, from_zero=from_zero, label="recall").axes[0]
    whiskers = next(c for c in axes.collections if len(c.get_paths()) == 2)
    ends = [sorted(path.vertices[:, 0].tolist()) for path in whiskers.get_paths()]
    np.testing.assert_allclose(ends, [[0.4, 0.7], [0.85, 0.92]])
    if from_zero:
        assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 0.5), (0, 0.9)]
    else:
        assert axes.lines[0].get_xdata().tolist() == [0.5, 0.9]
    with pytest.raises(ValueError, match=r"values\['m'\] has 2 intervals for 1 names"):
        figures.interval_bars(["x"], {"m": intervals})


def test_tradeoff_scatter_puts_models_where_they_are() -> None:
    axes = figures.tradeoff_scatter(
        ["teacher", "student"],
        size=[94e6, 6e6],
        latency=[30.0, 5.0],
        quality=[Interval(0.93, 0.9, 0.95), 0.91],
    ).axes[0]
    centres = np.concatenate([np.asarray(c.get_offsets()) for c in axes.collections])
    np.testing.assert_allclose(centres, [[30, 0.93], [30, 0.93], [5, 0.91], [5, 0.91]])
    areas = [float(c.get_sizes()[0]) for c in axes.collections]
    assert areas[0] / areas[2] == pytest.approx(94 / 6)
    assert [t.get_text().replace("\u202f", " ") for t in axes.texts] == ["teacher\n94 MB", "student\n6 MB"]
    assert axes.lines[0].get_xydata().tolist() == [[30, 0.9], [30, 0.95]]
    assert axes.get_xscale() == "log"
    with pytest.raises(ValueError, match=r"have \(2, 1, 1, 1\) entries"):
        figures.tradeoff_scatter(["a", "b"], size=[1], latency=[1], quality=[1])
    with pytest.raises(ValueError, match="must be > 0"):
        figures.tradeoff_scatter(["a"], size=[1], latency=[0], quality=[1])


def test_step_curves_join_points_in_the_order_of_time() -> None:
    axes = figures.step_curves(
        {
            "teacher": [(8.0, Interval(0.5, 0.4, 0.6), "50"), (0.2, 0.9, "1")],
            "student": [(0.1, 0.45, "")],
            "nothing": [],
        },
        label="Chamfer distance, m",
    ).axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves["teacher"] == [[0.2, 0.9], [8.0, 0.5]]
    assert curves["student"] == [[0.1, 0.45]]
    assert "nothing" not in curves
    assert [[8.0, 0.4], [8.0, 0.6]] in [line.get_xydata().tolist() for line in axes.lines]
    assert [t.get_text() for t in axes.texts] == ["1", "50"]
    assert axes.get_xscale() == "log"
    for wrong in ({"a": []}, {"a": [(0.0, 1.0, "")]}):
        with pytest.raises(ValueError, match="at least one point"):
            figures.step_curves(wrong, label="")
