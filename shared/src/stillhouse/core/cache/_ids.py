"""Stable sample keys, and hashes of the settings that a cache depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._json import jsonable

# A name or a number; with the seed of its augmentation where the teacher saw an augmented input.
SampleId = str | int | tuple[str | int, int]
Keys = NDArray[np.uint64]


def keys_of(ids: Sequence[SampleId] | Tensor | NDArray[Any]) -> Keys:
    """128-bit keys of samples, the same in every process and on every machine.

    Integers below 2⁶³ in magnitude are their own keys; names and (name, seed) pairs are BLAKE2b hashes,
    marked so that they cannot meet an integer.

    Args:
        ids: Names, numbers, pairs (name or number, augmentation seed), or an integer tensor [n].

    Returns:
        [n, 2] uint64.

    Raises:
        TypeError: An id of another type.

    Example:
        >>> keys_of([5, "five"]).shape, keys_of([5])[0].tolist()
        ((2, 2), [5, 0])
    """
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TypeError(f"an array of ids must be [n] integers, got {ids.dtype} {list(ids.shape)}")
        return np.stack([ids.astype(np.int64).view(np.uint64), np.zeros(len(ids), np.uint64)], axis=1)
    if isinstance(ids, str):
        raise TypeError(f"ids must be a sequence of ids, got the single string {ids!r}")
    return np.array([_key(sample) for sample in ids], np.uint64).reshape(-1, 2)


def settings_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-able settings, independent of the order of their keys.

    Meant for what decides the teacher's input: preprocessing, crop size, augmentation seed.

    Args:
        settings: Nested mappings, sequences, strings, numbers, booleans and None; dataclasses and paths too.

    Example:
        >>> settings_hash({"size": 224, "crop": "centre"}) == settings_hash({"crop": "centre", "size": 224})
        True
    """
    plain = jsonable(settings, where="settings")
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def vocabulary_hash(vocabulary: Mapping[str, int] | Sequence[str]) -> str:
    """SHA-256 of a token → id map, or of class names in order.

    Args:
        vocabulary: What a tokenizer's ``get_vocab()`` returns, or the class names.

    Example:
        >>> vocabulary_hash({"b": 1, "a": 0}) == vocabulary_hash(["a", "b"])
        True
    """
    if isinstance(vocabulary, Mapping):
        items = sorted((int(index), token) for token, index in vocabulary.items())
    else:
        items = list(enumerate(vocabulary))
    digest = hashlib.sha256()
    for index, token in items:
        raw = token.encode("utf-8", "surrogatepass")
        digest.update(f"{index}:{len(raw)}:".encode() + raw)
    return digest.hexdigest()


def _key(sample: SampleId) -> tuple[int, int]:
    if isinstance(sample, (int, np.integer)) and not isinstance(sample, bool):
        if not -(2**63) <= int(sample) < 2**63:
            raise TypeError(f"an integer id must fit 64 bits, got {sample!r}")
        return int(sample) % 2**64, 0
    if isinstance(sample, str):
        text = f"s{sample}"
    elif (
        isinstance(sample, tuple)
        and len(sample) == 2
        and isinstance(sample[0], (str, int))
        and isinstance(sample[1], int)
    ):
        text = f"p{type(sample[0]).__name__}:{sample[1]}:{sample[0]}"
    else:
        raise TypeError(f"an id must be a string, an integer or (id, augmentation seed), got {sample!r}")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1


def order_of(keys: Keys) -> NDArray[np.int64]:
    """Positions that sort keys by first, then second word."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Sorted keys, searched without a copy; the two words may be memory-mapped.

    Attributes:
        first: First words in ascending order, contiguous [n].
        second: Second words, ascending where the first are equal [n].
    """

    first: NDArray[np.uint64]
    second: NDArray[np.uint64]

    @classmethod
    def of(cls, keys: Keys) -> KeyTable:
        """Sorts keys [n, 2]."""
        ordered = keys[order_of(keys)]
        return cls(np.ascontiguousarray(ordered[:, 0]), np.ascontiguousarray(ordered[:, 1]))

    def find(self, wanted: Keys) -> NDArray[np.int64]:
        """Positions of keys [m, 2], −1 where there is none."""
        result = np.full(len(wanted), -1, np.int64)
        position = np.searchsorted(self.first, wanted[:, 0])
        rows = np.arange(len(wanted))
        while True:  # one round, unless first words collide
            rows = rows[position[rows] < len(self.first)]
            rows = rows[self.first[position[rows]] == wanted[rows, 0]]
            if not len(rows):
                return result
            hit = self.second[position[rows]] == wanted[rows, 1]
            result[rows[hit]] = position[rows[hit]]
            rows = rows[~hit]
            position[rows] += 1

    def __len__(self) -> int:
        return len(self.first)
