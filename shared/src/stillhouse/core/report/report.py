"""A report: sections of text, tables, figures and pictures, written as one self-contained HTML page and as
JSON.

The page asks nothing of the network, opens from a disk, follows the reader's light or dark theme, prints,
and can be read by keyboard and by a screen reader. The same content gives the same bytes.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._json import dumps, jsonable
from ._format import cell_text, column_format, is_number, magnitude

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from .profile import Comparison

TILE_KINDS = ("", "query", "hit", "miss")
_FORMATS = ("count", "bytes", "si", "percent", "ms", "ratio")


@dataclass(slots=True)
class Section:
    """A part of a report, made by `Report.section`. Every method adds a block and returns the section."""

    title: str
    anchor: str
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def text(self, text: str) -> Section:
        """Add paragraphs, separated by blank lines; lines that start with "- " are a list.

        `**bold**` and backticks for code are understood; everything else is shown as it is.
        """
        self.blocks.append({"type": "text", "text": text})
        return self

    def kv(
        self, mapping: Mapping[str, Any], *, caption: str = "", formats: Mapping[str, str] | None = None
    ) -> Section:
        """Add a list of names and values, for example settings.

        Args:
            mapping: Name → number, interval, text or None.
            caption: A sentence above.
            formats: Name → format, as in `table`.
        """
        forms = _check_formats(formats or {}, list(mapping))
        items = [
            {
                "name": name,
                "value": value,
                "shown": cell_text(value, forms.get(name) or _single_format(value)),
            }
            for name, value in mapping.items()
        ]
        self.blocks.append({"type": "kv", "items": items, "caption": caption})
        return self

    def table(
        self,
        rows: Sequence[Mapping[str, Any]] | Sequence[Sequence[Any]],
        *,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        caption: str = "",
        best: Mapping[str, str] | None = None,
        formats: Mapping[str, str] | None = None,
        note: str = "",
    ) -> Section:
        """Add a table.

        Args:
            rows: Mappings from column to cell, or sequences in the order of `columns`. A cell is a number, an
                `Interval` (shown as "0.84 [0.79, 0.88]"), text, a boolean, or None (a dash). The first
                column names the row.
            columns: The columns, or a mapping from column to its heading. Default: the keys of the first row.
            caption: A sentence above the table.
            best: Column → "max" or "min": the best number of the column is set in bold, ties included.
            formats: Column → "count", "bytes", "si" (1.8 G), "percent" (of a fraction), "ms", "ratio"
                (1/16), or a Python format such as ".3f". Default: counts for whole numbers, else the same
                number of decimals down the column.
            note: Small print below.

        Raises:
            ValueError: For rows that do not fit the columns, an unknown column in `best` or `formats`, or an
                unknown format.

        Example:
            >>> _ = Report("Example").section("Quality").table(
            ...     [{"model": "teacher", "accuracy": 0.93}, {"model": "student", "accuracy": 0.91}],
            ...     best={"accuracy": "max"}, caption="Test accuracy")
        """
        headings = _headings(rows, columns)
        keys = list(headings)
        cells = [_row_cells(row, keys, i) for i, row in enumerate(rows)]
        forms = _check_formats(formats or {}, keys)
        shown: list[list[dict[str, Any]]] = [[] for _ in cells]
        heads = []
        for c, key in enumerate(keys):
            column = [row[c] for row in cells]
            numeric = any(is_number(v) for v in column) and all(v is None or is_number(v) for v in column)
            form = forms.get(key) or column_format(column)
            winners = _winners(column, (best or {}).get(key))
            heads.append({"key": key, "heading": headings[key], "numeric": numeric})
            for r, value in enumerate(column):
                shown[r].append({"shown": cell_text(value, form), "numeric": numeric, "best": r in winners})
        for key, direction in (best or {}).items():
            if key not in keys or direction not in ("max", "min"):
                raise ValueError(
                    f"best has {key!r}: {direction!r}; give a column of {keys} and 'max' or 'min'"
                )
        self.blocks.append(
            {
                "type": "table",
                "heads": heads,
                "cells": cells,
                "shown": shown,
                "caption": caption,
                "note": note,
            }
        )
        return self

    def figure(self, figure: Figure, *, caption: str = "", alt: str) -> Section:
        """Add a matplotlib figure, embedded as SVG.

        Args:
            figure: The figure; `stillhouse.core.report.figures` makes ready ones.
            caption: A sentence below.
            alt: What the figure shows, for readers who cannot see it; required.
        """
        return self.figures([(figure, caption, alt)])

    def figures(self, figures: Sequence[tuple[Figure, str, str]]) -> Section:
        """Add figures side by side where the page is wide enough: (figure, caption, alt) each."""
        from ._svg import figure_svg

        made: list[dict[str, Any]] = []
        for figure, caption, alt in figures:
            place = sum(len(b["figures"]) for b in self.blocks if b["type"] == "figures") + len(made)
            svg, width = figure_svg(figure, prefix=f"{self.anchor}-{place + 1}", alt=alt)
            made.append({"svg": svg, "width": round(width), "caption": caption, "alt": alt})
        self.blocks.append({"type": "figures", "figures": made})
        return self

    def images(
        self,
        rows: Sequence[Sequence[tuple[Any, str, str]]],
        *,
        caption: str = "",
        max_side: int = 320,
        size: int = 112,
    ) -> Section:
        """Add rows of pictures, for example a query and its nearest neighbours.

        Args:
            rows: Rows of (picture, caption, kind). A picture is a file or an array `[H, W]` or `[H, W, 3]`,
                uint8 or floating in [0, 1]. The kind is "", "query", "hit" or "miss": hits and misses differ
                in border and mark.
            caption: A sentence above.
            max_side: Larger pictures are scaled down to this many pixels before they are embedded.
            size: Width at which they are shown, in CSS pixels.

        Raises:
            ValueError: For an unknown kind or an array that is not a picture.
            DataError: For a file that is not a readable picture.
        """
        from ._images import image_uri

        made: list[list[dict[str, Any]]] = []
        for r, row in enumerate(rows):
            tiles = []
            for t, (source, text, kind) in enumerate(row):
                if kind not in TILE_KINDS:
                    raise ValueError(f"rows[{r}][{t}] has kind {kind!r}; give one of {TILE_KINDS}")
                uri, width, height = image_uri(source, name=f"rows[{r}][{t}]", max_side=max_side)
                tiles.append({"uri": uri, "width": width, "height": height, "caption": text, "kind": kind})
            made.append(tiles)
        self.blocks.append({"type": "images", "rows": made, "caption": caption, "size": int(size)})
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain data: numbers unrounded, pictures and figures by caption alone."""
        return {
            "title": self.title,
            "anchor": self.anchor,
            "blocks": [_plain(block) for block in self.blocks],
        }


class Report:
    """A report on a distillation.

    Args:
        title: The title.
        summary: A paragraph or two under it; understands what `Section.text` does.
        subtitle: A line under the title, for example what was distilled into what.
        meta: Small facts shown under the subtitle, for example date, data and seed.

    Example:
        >>> import tempfile
        >>> report = Report("Kidney stones, small student", subtitle="ResNet-50 into MobileNetV3-small")
        >>> report.headline("It keeps 98.2 % of the accuracy.", facts=[("98.2 %", "of the accuracy")])
        >>> section = report.section("Quality", "Both models, on the same held-out stones.")
        >>> _ = section.table([{"model": "student", "accuracy": 0.912}], caption="Test accuracy")
        >>> report.write(Path(tempfile.mkdtemp())).name
        'report.html'
    """

    def __init__(
        self, title: str, *, summary: str = "", subtitle: str = "", meta: Mapping[str, Any] | None = None
    ) -> None:
        if not title.strip():
            raise ValueError("title is empty; give the report a title")
        self.title, self.summary, self.subtitle = title, summary, subtitle
        self.meta = dict(meta or {})
        self.sections: list[Section] = []
        self._headline: dict[str, Any] | None = None

    def headline(self, sentence: str, *, facts: Sequence[tuple[str, str]] = ()) -> None:
        """Set the box at the top: the result in one sentence, and up to four (value, label) pairs in large
        type.

        Raises:
            ValueError: For more than four facts.
        """
        if len(facts) > 4:
            raise ValueError(
                f"facts has {len(facts)} entries; a headline holds at most 4, put the rest in a table"
            )
        self._headline = {"sentence": sentence, "facts": [{"value": v, "label": label} for v, label in facts]}

    def section(self, title: str, text: str = "") -> Section:
        """Start a section, with an entry in the contents and an anchor made of its title."""
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = {section.anchor for section in self.sections} | {"content", "contents"}
        anchor, number = stem, 2
        while anchor in taken:
            anchor, number = f"{stem}-{number}", number + 1
        section = Section(title, anchor)
        self.sections.append(section)
        return section.text(text) if text else section

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain JSON types: what report.json holds."""
        data = {
            "format": "stillhouse-report",
            "schema": 1,
            "title": self.title,
            "subtitle": self.subtitle,
            "summary": self.summary,
            "meta": self.meta,
            "headline": self._headline,
            "sections": [section.to_dict() for section in self.sections],
        }
        return dict(jsonable(data, where="report", nonfinite="null"))

    def html(self) -> str:
        """Render the page."""
        from importlib.resources import files

        import jinja2

        from .. import __version__
        from .palette import variables

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        environment.filters["prose"] = prose
        environment.filters["trusted"] = _trusted
        template = environment.from_string((files(__package__) / "template.html").read_text(encoding="utf-8"))
        return template.render(
            report=self,
            headline=self._headline,
            light=variables(dark=False),
            dark=variables(dark=True),
            version=__version__,
        )

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html and report.json into a folder, which is made if need be.

        Returns:
            The path of report.html.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.json", dumps(self.to_dict())), ("report.html", self.html())):
            temporary = root / f".{name}.{secrets.token_hex(4)}"
            try:
                temporary.write_text(text, encoding="utf-8", newline="\n")
                os.replace(temporary, root / name)
            finally:
                temporary.unlink(missing_ok=True)
        return root / "report.html"


def compression_headline(
    *,
    metric: str,
    student: float,
    teacher: float,
    comparison: Comparison | None = None,
    student_name: str = "student",
    lower_is_better: bool = False,
) -> tuple[str, list[tuple[str, str]]]:
    """Write the sentence and the facts of a headline: quality kept, size, latency.

    Where the latency ratio varied too much to quote (`Comparison.stable`), its range stands instead.

    Args:
        metric: What the quality is called, for example "accuracy".
        student: The student's quality, ≥ 0.
        teacher: The teacher's quality, > 0.
        comparison: Sizes and latencies, with the teacher as the baseline; None leaves them out.
        student_name: The student's name in `comparison`.
        lower_is_better: For errors and losses.

    Returns:
        Arguments for `Report.headline`: the sentence and the facts.

    Raises:
        ValueError: When the teacher's quality is not > 0.

    Example:
        >>> sentence, facts = compression_headline(metric="accuracy", student=0.912, teacher=0.929)
        >>> sentence.replace("\\u202f", " ")
        'The student keeps 98.2 % of the teacher’s accuracy.'
    """
    if not teacher > 0:
        raise ValueError(f"teacher is {teacher}; the share kept needs a quality > 0")
    share = student / teacher
    percent = cell_text(share, "percent")
    if lower_is_better:
        sentence = f"The student’s {metric} is {percent} of the teacher’s (lower is better)"
    elif share > 1:
        sentence = f"The student reaches {percent} of the teacher’s {metric}"
    else:
        sentence = f"The student keeps {percent} of the teacher’s {metric}"
    facts = [(percent, f"of the teacher’s {metric}")]
    if comparison is not None:
        size = comparison.ratio(student_name, "bytes")
        parts = [] if size is None else [(_share(size), "of its size")]
        median, low, high = comparison.latency_ratios[student_name]
        speed = _share(median) if comparison.stable(student_name) else f"{_share(low)} to {_share(high)}"
        parts.append((speed, "of its latency"))
        sentence += " at " + " and ".join(f"{text} {label}" for text, label in parts)
        facts += parts
    return sentence + ".", facts


def _share(ratio: float) -> str:
    """Write a ratio as a part of a sentence: "1/16 of …", "64 % of …", "2.3 × …"."""
    return cell_text(ratio, "percent" if 0.5 < ratio < 1.995 else "ratio")


def prose(text: str) -> Markup:
    """Turn the small markup of `Section.text` into escaped HTML."""
    from markupsafe import Markup, escape

    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = paragraph.strip().split("\n")
        if all(line.lstrip().startswith("- ") for line in lines):
            items = "".join(f"<li>{_inline(str(escape(line.lstrip()[2:])))}</li>" for line in lines)
            parts.append(f"<ul>{items}</ul>")
        elif paragraph.strip():
            parts.append(f"<p>{_inline(str(escape(paragraph.strip())))}</p>")
    return Markup("\n".join(parts))


def _inline(escaped: str) -> str:
    pieces = re.split(r"(`[^`\n]+`)", escaped)
    for i, piece in enumerate(pieces):
        if i % 2:
            pieces[i] = f"<code>{piece[1:-1]}</code>"
        else:
            pieces[i] = re.sub(r"\*\*([^*\n]+)\*\*", r"<strong>\1</strong>", piece)
    return "".join(pieces)


def _trusted(text: str) -> Markup:
    from markupsafe import Markup

    return Markup(text)


def _plain(block: dict[str, Any]) -> dict[str, Any]:
    kind = block["type"]
    if kind == "table":
        keys = [head["key"] for head in block["heads"]]
        rows = [dict(zip(keys, row, strict=True)) for row in block["cells"]]
        return {
            "type": kind,
            "caption": block["caption"],
            "columns": keys,
            "rows": rows,
            "note": block["note"],
        }
    if kind == "kv":
        items = {item["name"]: item["value"] for item in block["items"]}
        return {"type": kind, "caption": block["caption"], "items": items}
    if kind == "figures":
        figures = [{"caption": f["caption"], "alt": f["alt"]} for f in block["figures"]]
        return {"type": kind, "figures": figures}
    if kind == "images":
        tiles = [[{"caption": t["caption"], "kind": t["kind"]} for t in row] for row in block["rows"]]
        return {"type": kind, "caption": block["caption"], "rows": tiles}
    return dict(block)


def _headings(rows: Sequence[Any], columns: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    if isinstance(columns, Mapping):
        return dict(columns)
    if columns is not None:
        return {column: column for column in columns}
    if not rows or not isinstance(rows[0], Mapping):
        raise ValueError("columns is None; give the columns, or rows that are mappings")
    return {key: key for key in rows[0]}


def _row_cells(row: Any, keys: list[str], number: int) -> list[Any]:
    if isinstance(row, Mapping):
        unknown = [key for key in row if key not in keys]
        if unknown and set(keys) - set(row):
            raise ValueError(
                f"rows[{number}] has {unknown[0]!r} and lacks a column of {keys}; use the same names"
            )
        return [row.get(key) for key in keys]
    if isinstance(row, str) or len(row) != len(keys):
        raise ValueError(f"rows[{number}] is {row!r}; give {len(keys)} cells, for {keys}")
    return list(row)


def _winners(column: list[Any], direction: str | None) -> set[int]:
    values = {i: magnitude(v) for i, v in enumerate(column) if is_number(v)}
    values = {i: v for i, v in values.items() if v == v}
    if direction is None or len(values) < 2:
        return set()
    top = max(values.values()) if direction == "max" else min(values.values())
    return {i for i, v in values.items() if v == top}


def _single_format(value: Any) -> str:
    return ".6g" if isinstance(value, float) else column_format([value])


def _check_formats(formats: Mapping[str, str], keys: list[str]) -> dict[str, str]:
    for key, form in formats.items():
        if key not in keys:
            raise ValueError(f"formats names {key!r}; give a column of {keys}")
        if form not in _FORMATS:
            try:
                format(0.5, form)
            except ValueError as error:
                raise ValueError(f"formats has {key!r}: {form!r}; give one of {_FORMATS} or '.3f'") from error
    return dict(formats)
