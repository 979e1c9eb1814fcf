from __future__ import annotations

import base64
import io
import itertools
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stillhouse.core.errors import DataError
from stillhouse.core.metrics import Interval, reliability_curve
from stillhouse.core.report import (
    Comparison,
    Report,
    compare_profiles,
    compression_headline,
    figures,
    palette,
    profile,
)
from stillhouse.core.report._format import bytes_text, cell_text, column_format, ratio_text, si_text
from stillhouse.core.report._images import image_uri
from stillhouse.core.report._svg import figure_svg

EVIL = '<script>alert("1")</script>&\''
ROWS = [
    {"model": "teacher", "accuracy": Interval(0.9312, 0.91, 0.95), "loss": 0.25, "note": None},
    {"model": "student", "accuracy": Interval(0.9123, 0.89, 0.93), "loss": 0.31, "note": "small"},
]


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def full_report() -> Report:
    rng = np.random.default_rng(0)
    report = Report("Title", subtitle="Sub", summary="One.\n\nTwo.", meta={"Seed": 3})
    report.headline("The student keeps it all.", facts=[("98 %", "of the accuracy"), ("1/16", "of the size")])
    quality = report.section("Quality", "Words with `code` and **weight**.\n\n- a\n- b")
    quality.table(ROWS, best={"accuracy": "max", "loss": "min"}, caption="Cap", note="Fine print")
    quality.kv({"steps": 1000, "lr": 3e-4, "name": "adamw", "none": None}, caption="Settings")
    counts = np.array([[8, 2], [1, 9]])
    pair = [(figures.confusion_matrix(counts, ["a", "b"]), f"caption {i}", f"alt {i}") for i in range(2)]
    quality.figures(pair)
    quality.figure(figures.interval_bars(["x"], {"m": [Interval(0.5, 0.4, 0.6)]}), alt="bars")
    tile = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    report.section("Quality").images(
        [[(tile, "q", "query"), (tile, "n1", "hit"), (tile, "n2", "miss")]], caption="R"
    )
    return report


# ------------------------------------------------------------ the page


def test_the_page_asks_nothing_of_the_network() -> None:
    html = full_report().html()
    page = Page(html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]{0,4})", html)) <= {f"#{x}" for x in re.findall(r"url\(#(...)", html)}
    assert all(found.startswith("http://www.w3.org/") for found in re.findall(r"https?://[^\"' <]*", html))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_whatever_users_write_is_escaped() -> None:
    report = Report(EVIL, subtitle=EVIL, summary=EVIL, meta={EVIL: EVIL})
    report.headline(EVIL, facts=[(EVIL, EVIL)])
    section = report.section(EVIL, f"`{EVIL}` **{EVIL}**\n\n- {EVIL}")
    section.table([{EVIL: EVIL, "n": 1}, {EVIL: EVIL, "n": 2}], caption=EVIL, note=EVIL, best={"n": "max"})
    section.kv({EVIL: EVIL}, caption=EVIL)
    figure = figures.interval_bars([EVIL], {EVIL: [Interval(0.5, 0.4, 0.6)]}, label=EVIL, title=EVIL)
    section.figure(figure, caption=EVIL, alt=EVIL)
    section.images([[(np.zeros((4, 4)), EVIL, "hit")]], caption=EVIL)
    html = report.html()
    assert "<script" not in html
    page = Page(html)
    assert "".join(page.text).count(EVIL) >= 15
    assert page.all("img")[0]["alt"] == EVIL
    assert any(a.get("aria-label") == EVIL for a in page.all("svg"))


def test_the_page_can_be_read_by_keyboard_and_by_ear() -> None:
    page = Page(full_report().html())
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a")}
    assert targets <= set(ids)
    assert {"content", "quality", "quality-2"} <= targets
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert page.all("img")
    assert all(a["alt"] for a in page.all("img"))
    assert len(page.all("svg")) == 3
    assert all(a["role"] == "img" and a["aria-label"] for a in page.all("svg"))
    assert sorted({a["scope"] for a in page.all("th")}) == ["col", "row"]
    regions = [a for a in page.all("div") if a.get("role") == "region"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert "width=device-width" in str(page.all("meta"))
    text = " ".join("".join(page.text).split())
    assert "hit: n1" in text
    assert "miss: n2" in text
    assert "0.91 [0.89, 0.93]" not in text  # three decimals, as the column has
    assert "0.931 [0.910, 0.950] (best)" in text


def test_the_same_content_gives_the_same_bytes() -> None:
    assert full_report().html() == full_report().html()


def test_both_themes_and_print_are_there() -> None:
    html = full_report().html()
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "@media print" in html
    for dark in (False, True):
        for name, colour in palette.variables(dark=dark).items():
            assert f"{name}: {colour};" in html


def test_write_makes_two_whole_files(tmp_path: Path) -> None:
    path = full_report().write(tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    data = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
    assert (data["format"], data["schema"], data["title"]) == ("stillhouse-report", 1, "Title")
    assert data["headline"]["facts"][1] == {"value": "1/16", "label": "of the size"}
    table = next(b for b in data["sections"][0]["blocks"] if b["type"] == "table")
    assert table["columns"] == ["model", "accuracy", "loss", "note"]
    assert table["rows"][0]["accuracy"]["estimate"] == 0.9312
    assert table["rows"][0]["note"] is None
    assert data["sections"][1]["blocks"][0]["rows"][0][1] == {"caption": "n1", "kind": "hit"}
    assert full_report().write(path.parent) == path


def test_json_has_null_for_nan(tmp_path: Path) -> None:
    report = Report("t")
    report.section("s").table(
        [{"a": "x", "b": float("nan")}, {"a": "y", "b": np.float32(0.5)}], best={"b": "max"}
    )
    report.write(tmp_path)
    rows = json.loads((tmp_path / "report.json").read_text())["sections"][0]["blocks"][0]["rows"]
    assert rows == [{"a": "x", "b": None}, {"a": "y", "b": 0.5}]


def test_importing_the_report_does_not_import_what_draws_it() -> None:
    code = (
        "import sys, stillhouse.core.report, stillhouse.core.report.figures\n"
        "print([m for m in ('matplotlib', 'jinja2', 'PIL', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------ tables and numbers


def best_cells(rows: list, best: dict, **options: object) -> list[tuple[int, int]]:
    section = Report("t").section("s").table(rows, best=best, **options)
    shown = section.blocks[0]["shown"]
    return [(r, c) for r, row in enumerate(shown) for c, cell in enumerate(row) if cell["best"]]


def test_the_best_are_marked_ties_included() -> None:
    rows = [["a", 1.0, 5], ["b", 2.0, 3], ["c", 2.0, None], ["d", float("nan"), 3]]
    columns = ["name", "up", "down"]
    assert best_cells(rows, {"up": "max", "down": "min"}, columns=columns) == [(1, 1), (1, 2), (2, 1), (3, 2)]
    assert best_cells(rows[:1], {"up": "max"}, columns=columns) == []  # nothing to be better than
    assert best_cells(ROWS, {"accuracy": "max", "loss": "max"}) == [(0, 1), (1, 2)]


def test_columns_choose_headings_and_order() -> None:
    section = Report("t").section("s").table(ROWS, columns={"loss": "Loss, nats", "model": "Model"})
    heads = section.blocks[0]["heads"]
    assert [head["heading"] for head in heads] == ["Loss, nats", "Model"]
    assert [head["numeric"] for head in heads] == [True, False]
    assert section.blocks[0]["cells"] == [[0.25, "teacher"], [0.31, "student"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [], "columns": None}, "columns is None"),
        ({"rows": [["a"]], "columns": ["x", "y"]}, r"rows\[0\]"),
        ({"rows": [{"x": 1}, {"z": 2}]}, r"rows\[1\] has 'z'"),
        ({"rows": [{"x": 1}], "best": {"y": "max"}}, "best has 'y'"),
        ({"rows": [{"x": 1}], "best": {"x": "most"}}, "'most'"),
        ({"rows": [{"x": 1}], "formats": {"y": ".2f"}}, "formats names 'y'"),
        ({"rows": [{"x": 1}], "formats": {"x": "%d"}}, "formats has 'x': '%d'"),
    ],
)
def test_tables_that_do_not_fit(options: dict, message: str) -> None:
    section = Report("t").section("s")
    with pytest.raises(ValueError, match=message):
        section.table(**options)
    assert section.blocks == []


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, "count", "–"),
        (float("nan"), ".2f", "–"),
        (float("-inf"), ".2f", "−∞"),
        (True, "count", "yes"),
        (np.bool_(False), "count", "no"),
        (1234567, "count", "1 234 567"),
        (np.int64(12), "count", "12"),
        (-0.054, ".3f", "−0.054"),
        (0.9823, "percent", "98.2 %"),
        (12345.678, ".1f", "12 345.7"),
        (0.0834, "ms", "0.083 ms"),
        (2.5, "ms", "2.50 ms"),
        (146.2, "ms", "146 ms"),
        (0.0, "ms", "0.000 ms"),
        (Interval(2.95, 2.8, 17.27), "ms", "2.95 ms [2.80, 17.27]"),
        (Interval(0.842, 0.794, 0.883), ".2f", "0.84 [0.79, 0.88]"),
        (Interval(0.84, 0.79, 0.88), "percent", "84.0 % [79.0, 88.0]"),
        (1_820_000_000, "si", "1.82 G"),
        (94_300_000, "bytes", "94.3 MB"),
        ("text", ".2f", "text"),
    ],
)
def test_cells(value: object, form: str, text: str) -> None:
    assert cell_text(value, form).replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("cells", "form"),
    [
        ([1, 20_000, None], "count"),
        ([0.93, 0.9, "–"], ".3f"),
        ([1.5, 2], ".2f"),
        ([15.2, 3.1], ".1f"),
        ([150.0], ".0f"),
        ([0.0021, 0.04], ".3g"),
        ([0.0, 0.0], ".3f"),
        ([float("nan"), 0.5], ".3f"),
        ([Interval(0.5, 0.4, 0.6)], ".3f"),
    ],
)
def test_columns_share_decimals(cells: list, form: str) -> None:
    assert column_format(cells) == form


def test_units() -> None:
    texts = [bytes_text(n).replace("\u202f", " ") for n in (0, 999, 1000, 999_499, 999_500, 2.5e9, 123_456)]
    assert texts == ["0 B", "999 B", "1 kB", "999 kB", "1 MB", "2.5 GB", "123 kB"]
    assert [si_text(n).replace("\u202f", " ") for n in (12, 1500, 3.2e9)] == ["12", "1.5 k", "3.2 G"]
    ratios = [
        ratio_text(r).replace("\u202f", " ") for r in (1 / 16, 1 / 6.1, 1 / 6.02, 0.64, 1, 1.3, 2.5, 1 / 2500)
    ]
    assert ratios == ["1/16", "1/6.1", "1/6", "0.64", "1", "1.3", "2.5 ×", "1/2 500"]


def comparison(size: float, latency: tuple[float, float, float]) -> Comparison:
    base = profile(nn.Linear(10, 10, bias=False), torch.zeros(1, 10), name="x", runs=2, warmup=1)
    from dataclasses import replace

    student = replace(base, bytes=int(base.bytes * size))
    ratios = {"teacher": (1.0, 1.0, 1.0), "student": latency}
    return Comparison({"teacher": base, "student": student}, "teacher", ratios)


@pytest.mark.parametrize(
    ("student", "teacher", "lower", "size", "latency", "sentence"),
    [
        (0.912, 0.929, False, 1 / 16, (1 / 6, 1 / 6.2, 1 / 5.9),
         "The student keeps 98.2 % of the teacher’s score at 1/16 of its size and 1/6 of its latency."),
        (0.95, 0.9, False, 0.75, (1.3, 1.2, 1.4),
         "The student reaches 105.6 % of the teacher’s score "
         "at 75.0 % of its size and 130.0 % of its latency."),
        (0.5, 0.25, True, 0.5, (2.5, 2.4, 2.6),
         "The student’s score is 200.0 % of the teacher’s (lower is better)"
         " at 1/2 of its size and 2.5 × of its latency."),
        (0.9, 0.9, False, 0.1, (1 / 130, 1 / 500, 1 / 26),
         "The student keeps 100.0 % of the teacher’s score"
         " at 1/10 of its size and 1/500 to 1/26 of its latency."),
    ],
)  # fmt: skip
def test_headlines(
    student: float, teacher: float, lower: bool, size: float, latency: tuple, sentence: str
) -> None:
    made, facts = compression_headline(
        metric="score",
        student=student,
        teacher=teacher,
        comparison=comparison(size, latency),
        lower_is_better=lower,
    )
    assert made.replace("\u202f", " ") == sentence
    assert len(facts) == 3
    with pytest.raises(ValueError, match="quality > 0"):
        compression_headline(metric="m", student=1.0, teacher=0.0)


def test_wrong_reports() -> None:
    with pytest.raises(ValueError, match="title is empty"):
        Report(" ")
    with pytest.raises(ValueError, match="at most 4"):
        Report("t").headline("s", facts=[("a", "b")] * 5)
    with pytest.raises(ValueError, match="kind 'best'"):
        Report("t").section("s").images([[(np.zeros((4, 4)), "c", "best")]])


# ------------------------------------------------------------ pictures


def decode(uri: str) -> tuple[str, np.ndarray]:
    head, body = uri.split(",", 1)
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def test_small_pictures_are_embedded_exactly_and_large_ones_scaled_down(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    for source in (small, torch.from_numpy(small), small / 255.0):
        uri, width, height = image_uri(source, name="x", max_side=64)
        head, back = decode(uri)
        assert head == "data:image/png;base64"
        assert (width, height) == (24, 16)
        np.testing.assert_array_equal(back, small)
    mask = small[:, :, 0] > 99
    np.testing.assert_array_equal(decode(image_uri(mask, name="x", max_side=64)[0])[1] > 0, mask)
    smooth = np.fromfunction(lambda y, x, c: (x + 2 * y) / 1000 + 0.1 * c, (300, 200, 3))
    Image.fromarray((255 * smooth).astype(np.uint8)).save(tmp_path / "big.png")
    for source in (smooth, tmp_path / "big.png"):
        uri, width, height = image_uri(source, name="x", max_side=150)
        head, back = decode(uri)
        assert head == "data:image/jpeg;base64"
        assert (width, height) == (100, 150)
        assert back.shape == (150, 100, 3)
        assert abs(back[75, 50] / 255.0 - smooth[150, 100]).max() < 0.03


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, b"BM" + b"\xff" * 60]
)
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png: cannot be read as a picture"):
        image_uri(tmp_path / "x.png", name="x", max_side=64)
    with pytest.raises(DataError):
        image_uri(tmp_path / "missing.png", name="x", max_side=64)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 5)), r"shape \(2, 4, 5\)"),
        (np.zeros((0, 4)), "shape"),
        (np.full((4, 4), 2.0), r"outside \[0, 1\]"),
        (np.full((4, 4), np.nan), r"outside \[0, 1\]"),
        (np.zeros((4, 4), dtype=np.int64), "dtype int64"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_uri(array, name="x", max_side=64)


# ------------------------------------------------------------ figures

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


# ------------------------------------------------------------ profiles


class Clock:
    """A clock that models advance by what they cost; a busy neighbour makes it jump between slices."""

    def __init__(self, slice_ms: float = float("inf"), stolen_ms: float = 0.0) -> None:
        self.now, self.used, self.slice, self.stolen = 0.0, 0.0, slice_ms / 1000, stolen_ms / 1000

    def spend(self, seconds: float) -> None:
        before = self.used // self.slice
        self.used += seconds
        self.now += seconds + (self.used // self.slice - before) * self.stolen

    def __call__(self) -> float:
        return self.now


class Costly(nn.Module):
    def __init__(self, clock: Clock, milliseconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.clock, self.seconds, self.calls = clock, milliseconds / 1000, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.calls += 1
        self.clock.spend(self.seconds)
        return x


def test_latencies_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    teacher, student = Costly(clock, 50.0), Costly(clock, 2.0)
    measured = compare_profiles({"teacher": teacher, "student": student}, torch.zeros(3, 2), runs=4, warmup=2)
    for name, ms, passes in (("teacher", 50.0, 1), ("student", 2.0, 25)):
        latency = measured.profiles[name].latency
        assert (latency.median, latency.p10, latency.p90) == pytest.approx((ms, ms, ms))
        assert (latency.runs, latency.passes) == (4, passes)
    assert (teacher.calls, student.calls) == (2 + 4, 2 + 4 * 25)
    assert measured.ratio("student", "latency") == pytest.approx(0.04)
    assert measured.stable("student")
    assert measured.profiles["student"].batch == 3


def test_a_busy_machine_does_not_flatter_the_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour takes 12 ms after every 4 ms of ours; single passes make 1/25 look like 1/100 or less."""
    clock = Clock(slice_ms=4.0, stolen_ms=12.0)
    monkeypatch.setattr(time, "perf_counter", clock)
    models = {"teacher": Costly(clock, 2.5), "student": Costly(clock, 0.1)}
    naive = []
    for _ in range(31):
        marks = [clock()]
        for seconds in (0.0025, 0.0001):
            clock.spend(seconds)
            marks.append(clock())
        naive.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    assert float(np.median(naive)) > 100
    measured = compare_profiles(models, torch.zeros(1, 2), runs=31, warmup=3)
    assert 1 / measured.ratio("student", "latency") == pytest.approx(25, rel=0.35)


def test_sizes_count_what_is_shared_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 10))
    model[2].weight = model[0].weight
    model[1].eval()
    made = profile(model, torch.zeros(4, 10), name="m", runs=2, warmup=1, flops=True)
    assert made.parameters == 100 + 10 + 10 + 20
    assert made.bytes == 4 * (140 + 20) + 8  # running mean and variance; the int64 counter
    assert made.flops == 2 * (2 * 4 * 10 * 10)
    assert made.batch == 4
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert made.disk is None


def test_inputs_as_tuples_and_mappings(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return scale * (a @ b)

    (tmp_path / "weights").write_bytes(b"x" * 123)
    a, b = torch.zeros(5, 3), torch.zeros(3, 2)
    by_place = profile(Two(), (a, b), name="m", runs=2, warmup=1, flops=True, disk=tmp_path)
    by_name = profile(Two(), {"b": b, "a": a, "scale": 2.0}, name="m", runs=2, warmup=1, flops=True)
    assert by_place.flops == by_name.flops == 2 * 5 * 3 * 2
    assert by_place.disk == 123
    assert by_place.parameters == by_place.bytes == 0


def test_comparisons_make_table_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    models = {"teacher": Costly(clock, 40.0), "student": Costly(clock, 10.0)}
    measured = compare_profiles(models, torch.zeros(1, 2), runs=2, warmup=1)
    section = (
        Report("t").section("s").table(measured.rows(), formats=measured.formats(), best={"latency": "min"})
    )
    shown = [[cell["shown"].replace("\u202f", " ") for cell in row] for row in section.blocks[0]["shown"]]
    assert shown == [
        ["teacher", "2", "8 B", "40.0 ms [40.0, 40.0]", "1", "1"],
        ["student", "2", "8 B", "10.0 ms [10.0, 10.0]", "1", "1/4"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "big"}, "baseline is 'big'; give one of 'm'"),
        ({"runs": 1}, "runs is 1"),
        ({"warmup": 0}, "warmup is 0"),
        ({"disk": {"m": Path("/nonexistent")}}, "does not exist"),
        ({"disk": {"other": Path(__file__)}}, "disk names 'other'"),
    ],
)
def test_wrong_profiles(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_profiles({"m": nn.Identity()}, torch.zeros(1), **{"baseline": "m", **options})
