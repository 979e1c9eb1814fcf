"""Shuffles that keep what a control must keep: columns of an alignment, or neighbours within a sequence."""

from __future__ import annotations

import numpy as np

from .sequence import Bytes


def shuffle_columns(aligned: Bytes, rng: np.random.Generator) -> Bytes:
    """Permute each column of an alignment by itself.

    Every column keeps exactly its letters, and any dependence between columns is gone: a position weight
    matrix cannot tell the result from the original (its score is a sum over columns), a model that looks at
    two columns at once can.

    Args:
        aligned: uint8 [N, L].
        rng: source of the permutations.

    Returns:
        uint8 [N, L].
    """
    return rng.permuted(aligned, axis=0)


def shuffle_dinucleotides(letters: Bytes, rng: np.random.Generator) -> Bytes:
    """Shuffle a sequence so that every count of two neighbouring letters stays exactly the same.

    A random Eulerian path through the multigraph of the sequence's letters: for each letter the last edge out
    of it is drawn until these edges form a tree towards the last letter, the other edges are permuted.
    First and last letter stay. Source: Altschul and Erickson 1985 (recalled).

    Args:
        letters: uint8 [L].
        rng: source of randomness.

    Returns:
        uint8 [L].

    Example:
        >>> x = np.frombuffer(b"AACAGATTACAGA", np.uint8)
        >>> y = shuffle_dinucleotides(x, np.random.default_rng(0))
        >>> sorted(zip(x, x[1:])) == sorted(zip(y, y[1:]))
        True
    """
    if len(letters) < 3:
        return letters.copy()
    symbols, codes = np.unique(letters, return_inverse=True)
    count, final = len(symbols), int(codes[-1])
    edges = [codes[1:][codes[:-1] == symbol] for symbol in range(count)]
    while True:
        last = [int(rng.integers(len(out))) if len(out) else -1 for out in edges]
        if all(_reaches(symbol, final, edges, last) for symbol in range(count) if symbol != final):
            break
    queues: list[list[int]] = []
    for symbol, out in enumerate(edges):
        if symbol == final or not len(out):
            queues.append(rng.permutation(out).tolist()[::-1])
        else:
            others = rng.permutation(np.delete(out, last[symbol]))
            queues.append([*others.tolist(), int(out[last[symbol]])][::-1])
    path = [int(codes[0])]
    for _ in range(len(letters) - 1):
        path.append(queues[path[-1]].pop())
    return symbols[path]


def _reaches(symbol: int, final: int, edges: list[np.ndarray], last: list[int]) -> bool:
    for _ in range(len(edges)):
        symbol = int(edges[symbol][last[symbol]])
        if symbol == final:
            return True
    return False
