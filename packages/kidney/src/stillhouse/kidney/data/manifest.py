"""A CSV table of stone images to a `Collection`."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from stillhouse.core.errors import DataError

from .items import Collection, Item, Progress
from .layout import NO_STONES, SPLIT_NAMES, VIEW_NAMES, check_folder, compile_pattern, finish, stone_of

MANIFEST = "manifest.csv"
"""Name of the table that `read_collection` looks for in a folder."""

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "file", "image"),
    "label": ("class", "label"),
    "view": ("view",),
    "stone": ("stone", "stone_id", "group"),
    "split": ("split", "part"),
}


def read_manifest(
    table: str | Path,
    root: str | Path | None = None,
    *,
    stone_pattern: str | None = None,
    classes: Sequence[str] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Collection:
    """Read a CSV table of images.

    Columns, in any order, separated by comma, semicolon or tab: `path` and `class`; `view`, `stone` and
    `split` where known. Other columns are ignored. A row with an empty class is an unlabelled image. Text
    is UTF-8.

    Args:
        table: the CSV file.
        root: folder that paths are relative to and must lie in; the table's own where left out.
        stone_pattern: where there is no stone column, as in `read_folder`.
        classes: names and order of the classes; sorted names where left out.
        check: decode every image now.
        progress: called with (done, total) while images are decoded.

    Returns:
        Collection: items in the order of the rows.

    Raises:
        DataError: a missing column; a row whose path is outside the root, missing or named twice, whose
            stone is empty while others have one, or whose split is unknown; the message names file,
            row and remedy.
    """
    table = Path(table)
    base = check_folder(table.parent if root is None else root)
    match = compile_pattern(stone_pattern)
    header, rows = _read_table(table)
    columns = _columns(table, header)
    seen: dict[str, int] = {}
    items = []
    for number, row in rows:
        cell = {key: row[index].strip() for key, index in columns.items()}
        where = f"{table}, row {number}"
        relative = _inside(where, cell["path"], base)
        if relative in seen:
            raise DataError(f"{where}: {relative} is already in row {seen[relative]}; take one of them out")
        seen[relative] = number
        if "stone" in cell and not cell["stone"]:
            raise DataError(
                f"{where}: the stone is empty; fill it in every row, or take the stone column out if unknown"
            )
        items.append(
            Item(
                path=base / relative,
                label=cell["label"],
                view=VIEW_NAMES.get(cell.get("view", "").lower(), cell.get("view", "")) or "image",
                stone=cell["stone"] if "stone" in cell else stone_of(base, relative, match),
                split=_split(where, cell.get("split", "")),
                name=relative,
            )
        )
    if not items:
        raise DataError(f"{table}: has a header and no rows; add one row for each image")
    known = "stone" in columns or match is not None
    notes = () if known else (NO_STONES,)
    name = table.absolute().parent.name if table.name == MANIFEST else table.stem
    return finish(items, classes, known, name, notes, str(table), check, progress)


def _read_table(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows, with row numbers as a spreadsheet shows them."""
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{table}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: is not UTF-8 text; save it as CSV UTF-8") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        lines = list(csv.reader(text.splitlines(), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"{table}: is no CSV table ({error}); save it as CSV UTF-8") from error
    if not lines or not any(cell.strip() for cell in lines[0]):
        raise DataError(f"{table}: is empty; its first line must be path,class,view,stone,split")
    rows = []
    for number, row in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(lines[0]):
            raise DataError(
                f"{table}, row {number}: has {len(row)} cells, the header has {len(lines[0])}; mend the row"
            )
        rows.append((number, row))
    return [cell.strip().lower() for cell in lines[0]], rows


def _columns(table: Path, header: Sequence[str]) -> dict[str, int]:
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise DataError(f"{table}: has the column {twice[0]!r} twice; rename one")
    columns = {}
    for key, names in _COLUMNS.items():
        found = [name for name in names if name in header]
        if found:
            columns[key] = header.index(found[0])
        elif key in ("path", "label"):
            raise DataError(
                f"{table}: has no column {names[0]!r} (columns: {', '.join(header)}); the header must name "
                "path and class, and may name view, stone and split"
            )
    return columns


def _inside(where: str, path: str, base: Path) -> str:
    """Path relative to `base` with `/`; outside, missing or no file is an error."""
    if not path or "\0" in path:
        raise DataError(f"{where}: the path is empty; give the image's path relative to {base}")
    absolute = os.path.normpath(base.absolute() / path.replace("\\", "/"))
    relative = os.path.relpath(absolute, base.absolute())
    if relative == os.pardir or relative.startswith(os.pardir + os.sep) or os.path.isabs(relative):
        raise DataError(f"{where}: {path} lies outside {base}; move the image into it or give another root")
    if not os.path.isfile(absolute):
        raise DataError(f"{where}: there is no file {path} in {base}; mend the path or take the row out")
    return Path(relative).as_posix()


def _split(where: str, text: str) -> str | None:
    if not text:
        return None
    try:
        return SPLIT_NAMES[text.lower()]
    except KeyError:
        allowed = ", ".join(dict.fromkeys(SPLIT_NAMES.values()))
        raise DataError(f"{where}: unknown split {text!r}; allowed are {allowed}") from None
