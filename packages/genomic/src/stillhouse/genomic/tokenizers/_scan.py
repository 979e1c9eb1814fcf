"""Greedy k-mers of many windows at once, without a loop over characters.

A window is a chain of runs: letters, or N. A run of n letters gives n // k k-mers and n mod k single letters,
a run of n N gives n tokens. So tokens follow from the few run lengths, and characters from repeating tokens
by their sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._letters import N_CODE, OUTSIDE, Bytes

Ints = NDArray[np.int64]


class Scan(NamedTuple):
    """Tokens of a batch one after another, row by row.

    Attributes:
        lengths: tokens of each row [B].
        sizes: characters of each token [n].
        starts: first character of each token, in the flattened batch [n].
    """

    lengths: Ints
    sizes: Ints
    starts: Ints


def scan(codes: Bytes, k: int) -> Scan:
    """Cut rows of codes (0 … 3 letters, 4 N, 5 outside and only at the end of a row) [B, L] into tokens."""
    rows, width = codes.shape
    if not codes.size:
        return Scan(np.zeros(rows, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    flat = codes.reshape(-1)
    begins = np.arange(0, flat.size, width)
    special = flat >= N_CODE
    short = 0
    if special.any():
        cut = special[1:] != special[:-1]
        outside = flat == OUTSIDE
        short = int(outside.sum())
        if short:
            cut |= outside[1:] != outside[:-1]
        cut[begins[1:] - 1] = True
        begins = np.concatenate([[0], np.flatnonzero(cut) + 1])
    length = np.diff(begins, append=flat.size)
    kind = flat[begins]
    counts = np.zeros((len(begins), 2), np.int64)  # k-mers, then single characters, of each run
    letters = kind < N_CODE
    counts[letters, 0], counts[letters, 1] = np.divmod(length[letters], k)
    counts[kind == N_CODE, 1] = length[kind == N_CODE]
    sizes = np.repeat(np.tile([k, 1], len(begins)), counts.reshape(-1))
    lengths = np.bincount(begins // width, weights=counts.sum(1), minlength=rows).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    if short:  # what lies outside has no token, so rows do not follow one another
        left_out = outside.reshape(rows, width).sum(1)
        starts += np.repeat(np.cumsum(left_out) - left_out, lengths)
    return Scan(lengths, sizes, starts)


def kmer_values(codes: Bytes, k: int) -> NDArray[np.uint16]:
    """Σ_j code[i + j] · 4^(k−1−j) at every position i of the flattened codes where a k-mer may begin.

    Returns:
        uint16 [max(size − k + 1, 0)]; meaningless where the k letters hold an N or cross a row.
    """
    flat = codes.reshape(-1)
    count = max(flat.size - k + 1, 0)
    values = flat[:count].astype(np.uint16)
    for j in range(1, k):
        values <<= 2
        values += flat[j : j + count]
    return values
