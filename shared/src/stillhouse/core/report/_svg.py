"""Matplotlib figures as SVG that lives inside a page: its font, its colours, the same bytes always."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from . import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = re.compile(r'style="([^"]*)"')
_FAMILY = re.compile(r"font-family:[^;]*;?|(font: (?:[^;']|'[^']*')*?px) ?'[^;]*")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


def figure_svg(figure: Figure, *, prefix: str, alt: str) -> tuple[str, float]:
    """Render a figure as an SVG element.

    Colours of `palette` (and pure black and white, as ink and paper) become the page's CSS variables, so
    that the figure follows the page into the dark. Text stays text, in the page's font.

    Args:
        figure: The figure; it is not changed.
        prefix: Put before every id, so that several figures share a page.
        alt: What a screen reader says; empty is not allowed.

    Returns:
        The element, without any prolog, and the figure's natural width in CSS pixels.

    Raises:
        ValueError: When `alt` is empty.
    """
    if not alt.strip():
        raise ValueError(
            "alt is empty; say in a sentence what the figure shows, for readers who cannot see it"
        )
    import matplotlib
    from markupsafe import escape
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    canvas = figure.canvas
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    finally:
        figure.set_canvas(canvas)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _STYLE.sub(_restyle, svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    if box is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    opening = (
        f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + body.strip(), float(figure.get_figwidth()) * 96


def _restyle(match: re.Match[str]) -> str:
    style = _FAMILY.sub(lambda m: f"{m[1]} inherit" if m[1] else "", match[1])
    style = re.sub(r"font: ((?:\w+ )*)([\d.]+)px inherit", _longhand, style)
    return f'style="{_COLOUR.sub(lambda m: palette.css(m[0]), style)}"'


def _longhand(match: re.Match[str]) -> str:
    weight = match[1].strip()
    return (f"font-weight: {weight}; " if weight else "") + f"font-size: {match[2]}px"
