"""`results.json`: round trip, and everything that is not what was written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.errors import DataError
from stillhouse.core.report import read_results, write_results


@dataclass
class Row:
    name: str


@dataclass
class Results:
    accuracy: float
    rows: list[Row] = field(default_factory=list)


def rows(table: dict[str, Any]) -> None:
    table["rows"] = [Row(**row) for row in table["rows"]]


def test_what_was_written_is_read_and_nothing_else_lies_there(tmp_path: Path) -> None:
    given = Results(0.5, [Row("a"), Row("ß")])
    path = write_results(given, tmp_path / "run", domain="toy")
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert read_results(Results, path.parent, domain="toy", convert=rows) == given


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "stillhouse-other-results"}, "not the results of a toy run"),
        ({"schema": 2}, "upgrade stillhouse-toy"),
        ({"accuracies": 1}, "unknown entry 'accuracies'"),
        ({"rows": [{"title": "a"}]}, "title"),
        ({"rows": 3}, "not iterable"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    path = write_results(Results(0.5), tmp_path, domain="toy")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=word) as caught:
        read_results(Results, tmp_path, domain="toy", convert=rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=r"results\.json"):
        read_results(Results, tmp_path, domain="toy")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        read_results(Results, tmp_path, domain="toy")
