"""Colours of reports: told apart by colour-blind readers, and readable on white and on black.

The eight series colours of each theme were found by a search for the largest smallest distance (OKLab) under
normal vision, protanopia, deuteranopia and tritanopia (matrices of Machado et al., 2009), at a contrast of at
least 3 : 1 with the page.

A figure is drawn in the light colours; inside a report each of them is a CSS variable that has a dark twin.
"""

from __future__ import annotations

INK, MUTED, RULE, PAPER = "#1f2328", "#646c76", "#dcd9d4", "#ffffff"
DARK_INK, DARK_MUTED, DARK_RULE, DARK_PAPER = "#e6e4e0", "#9aa0a8", "#3a3d42", "#16181b"

SERIES = ("#3964cb", "#e95d00", "#00a292", "#94236c", "#624202", "#4c23aa", "#303134", "#a2574b")
DARK_SERIES = ("#57a6fe", "#e78c00", "#42f5df", "#83557a", "#f3de30", "#6e50d9", "#8e9499", "#c32c0a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_VARIABLES = {
    INK: "--ink",
    "#000000": "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    **{colour: f"--s{i + 1}" for i, colour in enumerate(SERIES)},
}


def css(colour: str) -> str:
    """Return `var(--name, colour)` for a colour of the palette, the colour itself otherwise."""
    name = _VARIABLES.get(colour.lower())
    return f"var({name}, {colour})" if name else colour


def series(index: int) -> str:
    """Return the colour of the index-th series; the eight repeat, so vary the marker (`MARKERS`) as well."""
    return SERIES[index % len(SERIES)]


def variables(*, dark: bool) -> dict[str, str]:
    """Return CSS variable → colour of one theme."""
    ink, muted, rule, paper = (
        (DARK_INK, DARK_MUTED, DARK_RULE, DARK_PAPER) if dark else (INK, MUTED, RULE, PAPER)
    )
    colours = DARK_SERIES if dark else SERIES
    numbered = {f"--s{i + 1}": colour for i, colour in enumerate(colours)}
    return {"--ink": ink, "--muted": muted, "--rule": rule, "--paper": paper, **numbered}
