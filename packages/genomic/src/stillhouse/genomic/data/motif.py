"""Two classical models of an aligned site: independent columns, and columns that see their left neighbour.

They measure a task before any network does: decoys with the column frequencies of the true sites put the
first at chance by construction, and leave the second what dependence between neighbouring columns tells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .sequence import Bytes

_CODES = np.full(256, 4, np.uint8)
for _code, _letter in enumerate(b"ACGT"):
    _CODES[_letter] = _code


class PositionWeightMatrix:
    """Log-odds of sites against decoys, each column by itself.

    Args:
        sites: uint8 [N, L], aligned.
        decoys: uint8 [M, L].
        pseudocount: added to each count.

    Raises:
        ValueError: different widths, or nothing to count.

    Example:
        >>> sites = np.frombuffer(b"AGAGAGAC", np.uint8).reshape(4, 2)
        >>> decoys = np.frombuffer(b"TGTGTCTC", np.uint8).reshape(4, 2)
        >>> model = PositionWeightMatrix(sites, decoys)
        >>> bool(model.score(sites).min() > model.score(decoys).max())
        True
    """

    def __init__(self, sites: Bytes, decoys: Bytes, *, pseudocount: float = 1.0) -> None:
        _check(sites, decoys)
        self.weights = np.log(_columns(sites, pseudocount)) - np.log(_columns(decoys, pseudocount))

    def score(self, sequences: Bytes) -> NDArray[np.float64]:
        """Log-odds of sequences, [N]; letters that are N count nothing."""
        weights = np.pad(self.weights, ((0, 0), (0, 1)))
        codes = _CODES[sequences]
        return weights[np.arange(codes.shape[1]), codes].sum(1)


class WeightArrayModel:
    """Log-odds of sites against decoys, each letter given its left neighbour, position by position.

    A first-order position-dependent Markov model.

    Args:
        sites: uint8 [N, L], aligned.
        decoys: uint8 [M, L].
        pseudocount: added to each count.

    Raises:
        ValueError: different widths, or nothing to count.
    """

    def __init__(self, sites: Bytes, decoys: Bytes, *, pseudocount: float = 1.0) -> None:
        _check(sites, decoys)
        self._first = PositionWeightMatrix(sites[:, :1], decoys[:, :1], pseudocount=pseudocount)
        self.weights = np.log(_pairs(sites, pseudocount)) - np.log(_pairs(decoys, pseudocount))

    def score(self, sequences: Bytes) -> NDArray[np.float64]:
        """Log-odds of sequences, [N]; pairs with an N count nothing."""
        weights = np.pad(self.weights, ((0, 0), (0, 1), (0, 1)))
        codes = _CODES[sequences]
        steps = weights[np.arange(codes.shape[1] - 1), codes[:, :-1], codes[:, 1:]].sum(1)
        return self._first.score(sequences[:, :1]) + steps


def _check(sites: Bytes, decoys: Bytes) -> None:
    if sites.ndim != 2 or decoys.ndim != 2 or sites.shape[1] != decoys.shape[1]:
        raise ValueError(f"sites is {sites.shape} and decoys {decoys.shape}; both must be [N, L] of one L")
    if not len(sites) or not len(decoys):
        raise ValueError("sites and decoys must each hold at least one sequence")


def _columns(aligned: Bytes, pseudocount: float) -> NDArray[np.float64]:
    codes = _CODES[aligned]
    counts = np.stack([(codes == c).sum(0) for c in range(4)], 1) + pseudocount
    return counts / counts.sum(1, keepdims=True)


def _pairs(aligned: Bytes, pseudocount: float) -> NDArray[np.float64]:
    codes = _CODES[aligned].astype(np.int64)
    counts = np.full((codes.shape[1] - 1, 5, 5), 0.0)
    steps = np.broadcast_to(np.arange(codes.shape[1] - 1), (len(codes), codes.shape[1] - 1))
    np.add.at(counts, (steps, codes[:, :-1], codes[:, 1:]), 1)
    counts = counts[:, :4, :4] + pseudocount
    return counts / counts.sum(2, keepdims=True)
