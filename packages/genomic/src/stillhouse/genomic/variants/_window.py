"""The window around a variant, and the bases that are hidden in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Site:
    """Where one alternative is scored.

    Attributes:
        start, end: the window on the reference, 0-based, half-open.
        hidden: first and last + 1 hidden position, relative to `start`.
        places: positions that differ, relative to `start`.
        ref, alt: the letters there.
    """

    start: int
    end: int
    hidden: tuple[int, int]
    places: tuple[int, ...]
    ref: str
    alt: str


def trimmed(ref: str, alt: str) -> tuple[int, str, str]:
    """Take away what two alleles share, at the end first, then at the beginning.

    Returns:
        Letters taken at the beginning, and what is left of both.

    Example:
        >>> trimmed("CAT", "CGT"), trimmed("CA", "C"), trimmed("A", "A")
        ((1, 'A', 'G'), (1, 'A', ''), (0, '', ''))
    """
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    shared = 0
    while shared < min(len(ref), len(alt)) and ref[shared] == alt[shared]:
        shared += 1
    return shared, ref[shared:], alt[shared:]


def site_of(position: int, ref: str, alt: str, *, length: int, window: int, group: int) -> Site | str:
    """Place one alternative in its window.

    A substitution of one or more bases (SNV, MNV) is scored; its bases that differ must fit into one hidden
    group. An insertion or deletion changes how many positions there are and has no likelihood ratio position
    by position: it is left out, and so is what is not written in A, C, G, T.

    Args:
        position: of REF's first base, 0-based.
        ref, alt: alleles in upper case.
        length: of the record.
        window: most bases of context.
        group: bases to hide.

    Returns:
        The site, or why there is none: "same", "indel", "ambiguous", "too long".

    Example:
        >>> site = site_of(50, "A", "G", length=1000, window=20, group=6)
        >>> site.start, site.end, site.hidden, site.places
        (40, 60, (8, 14), (10,))
        >>> site_of(50, "AT", "A", length=1000, window=20, group=6)
        'indel'
    """
    shared, ref, alt = trimmed(ref, alt)
    if not ref and not alt:
        return "same"
    if len(ref) != len(alt):
        return "indel"
    if set(ref + alt) - set("ACGT"):
        return "ambiguous"
    if len(ref) > min(group, window):
        return "too long"
    first, size = position + shared, len(ref)
    differ = [at for at in range(size) if ref[at] != alt[at]]
    begin = first - (group - size) // 2
    begin = min(max(begin, 0), max(length - group, 0))
    end = min(begin + group, length)
    start = first + size // 2 - window // 2
    start = min(max(start, 0), max(length - window, 0))  # at an edge the window is moved inside
    stop = min(start + window, length)
    return Site(
        start=start,
        end=stop,
        hidden=(max(begin, start) - start, min(end, stop) - start),
        places=tuple(first + at - start for at in differ),
        ref="".join(ref[at] for at in differ),
        alt="".join(alt[at] for at in differ),
    )


def windows_of(
    sites: list[Site], letters: list[npt.NDArray[np.uint8]]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Windows side by side: letters uint8 [B, L], lengths [B], hidden bool [B, L]."""
    lengths = np.array([len(row) for row in letters], dtype=np.int64)
    windows = np.full((len(sites), int(lengths.max())), ord("N"), np.uint8)
    hidden = np.zeros(windows.shape, dtype=bool)
    for at, (site, row) in enumerate(zip(sites, letters, strict=True)):
        windows[at, : len(row)] = row
        hidden[at, slice(*site.hidden)] = True
    hidden &= windows != ord("N")  # as in training, where N is never masked
    return windows, lengths, hidden
