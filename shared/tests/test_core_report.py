from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stillhouse.core.errors import DataError
from stillhouse.core.metrics import Interval
from stillhouse.core.report import (
    Comparison,
    Report,
    compression_headline,
    figures,
    palette,
    profile,
)
from stillhouse.core.report._format import bytes_text, cell_text, column_format, ratio_text, si_text
from stillhouse.core.report._images import image_uri

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
