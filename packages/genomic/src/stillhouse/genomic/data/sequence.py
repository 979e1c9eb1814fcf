"""DNA as bytes: the five letters A C G T N as ASCII upper case, uint8.

Everything that enters the package is brought to this form once, on reading: lower case (soft masking) is read
as upper case, U as T, and every IUPAC ambiguity letter as N. Nothing else is DNA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

N = ord("N")
"""The byte of the unknown letter, and of padding."""

AMBIGUITY = "RYSWKMBDHV"
"""IUPAC letters that stand for several nucleotides; all are read as N."""

WHITE = b" \t\r\n\v\f"


def _table(pairs: dict[str, str]) -> bytes:
    table = bytearray(256)
    for source, target in pairs.items():
        table[ord(source)] = table[ord(source.lower())] = ord(target)
    return bytes(table)


LETTER_TABLE = _table({**{x: x for x in "ACGTN"}, "U": "T", **dict.fromkeys(AMBIGUITY, "N")})
"""256 bytes: what each byte is read as; 0 for what is no nucleotide."""

_COMPLEMENT = _table(
    {"A": "T", "C": "G", "G": "C", "T": "A", "U": "A", "N": "N", **dict.fromkeys(AMBIGUITY, "N")}
)
_COMPLEMENT_ARRAY = np.frombuffer(_COMPLEMENT, np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One sequence of a file.

    Args:
        name: what stands between `>` and the first white space.
        sequence: uint8 [L], the letters A C G T N.
        description: the rest of the header line.
    """

    name: str
    sequence: Bytes
    description: str = ""

    def __len__(self) -> int:
        return len(self.sequence)


def normalise(letters: bytes | bytearray | str) -> Bytes:
    """Letters of a file as the five letters of the package.

    Args:
        letters: ASCII nucleotides in either case, U, IUPAC ambiguity letters; white space is dropped.

    Returns:
        uint8 [L]: A C G T N, writable.

    Raises:
        ValueError: a character that is no nucleotide, with its place (zero-based, white space not counted).

    Example:
        >>> normalise(b"acgu RYn").tobytes()
        b'ACGTNNN'
    """
    raw = letters.encode("latin-1", "replace") if isinstance(letters, str) else letters
    clean = bytearray(raw).translate(LETTER_TABLE, WHITE)
    at = clean.find(0)
    if at >= 0:
        raise ValueError(
            f"letters: {no_nucleotide(bytes(raw).translate(None, WHITE)[at])} at {at}; {ALLOWED}"
        )
    return np.frombuffer(clean, np.uint8)


ALLOWED = f"allowed are A C G T U N and the IUPAC letters {' '.join(AMBIGUITY)}, which are read as N"


def no_nucleotide(byte: int) -> str:
    """Words for a byte that is no nucleotide, with a guess at what the file is."""
    letter = chr(byte)
    if byte == 0 or byte >= 127 or byte < 32:
        return f"byte {byte} is no letter (is this a text file?)"
    if letter.upper() in "EFIJLOPQXZ*":
        return f"{letter!r} is no nucleotide (is this protein?)"
    if letter in "-.":
        return f"{letter!r} is a gap, not a nucleotide (is this an alignment? remove the gaps)"
    return f"{letter!r} is no nucleotide"


@overload
def reverse_complement(x: bytes) -> bytes: ...
@overload
def reverse_complement(x: Bytes) -> Bytes: ...
def reverse_complement(x: bytes | Bytes) -> bytes | Bytes:
    """The other strand, read in its own direction.

    Args:
        x: bytes, or uint8 [..., L] of the letters A C G T N (lower case, U and IUPAC letters are accepted and
            come back as the five letters).

    Returns:
        bytes or uint8 [..., L], as given; N stays N.

    Raises:
        TypeError: an array that is not uint8.
        ValueError: a byte that is no nucleotide.

    Example:
        >>> reverse_complement(b"AACGN")
        b'NCGTT'
    """
    if isinstance(x, bytes):
        result = x.translate(_COMPLEMENT)[::-1]
        if 0 in result:
            raise ValueError(f"x: {no_nucleotide(x[len(x) - 1 - result.index(0)])}; {ALLOWED}")
        return result
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8:
        kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"x is {kind}; it must be bytes or an array of ASCII bytes, uint8 [..., L]")
    flipped = _COMPLEMENT_ARRAY[x[..., ::-1]]
    if flipped.size and not flipped.all():
        raise ValueError(f"x: {no_nucleotide(int(x[..., ::-1][flipped == 0].flat[0]))}; {ALLOWED}")
    return flipped
