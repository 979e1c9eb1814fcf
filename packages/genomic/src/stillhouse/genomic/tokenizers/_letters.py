"""Letters of DNA as small numbers, and what happens to everything else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LETTERS = "ATCG"  # the order of NTv2's vocabulary; code 0, 1, 2, 3
AMBIGUOUS = "NRYSWKMBDHV"  # IUPAC; all of them are N here
N_CODE = 4
OUTSIDE = 5  # beyond the end of a shorter sequence
_INVALID = 255

Bytes = NDArray[np.uint8]


def _table() -> Bytes:
    table = np.full(256, _INVALID, np.uint8)
    for code, letter in enumerate(LETTERS):
        for form in (letter, letter.lower()):
            table[ord(form)] = code
    table[ord("U")] = table[ord("u")] = LETTERS.index("T")
    for letter in AMBIGUOUS:
        table[ord(letter)] = table[ord(letter.lower())] = N_CODE
    return table


_CODES = _table()


def letter_codes(windows: Bytes | Tensor) -> Bytes:
    """Codes of letters: A 0, T 1, C 2, G 3, N 4.

    Lower case is read as upper case, U as T, and IUPAC ambiguity letters as N.

    Args:
        windows: uint8 [B, L], ASCII.

    Returns:
        uint8 [B, L], values 0 … 4.

    Raises:
        TypeError: not uint8.
        ValueError: not two dimensions, or a character that is no nucleotide; the message names its place.
    """
    array = windows.detach().cpu().numpy() if isinstance(windows, Tensor) else windows
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"windows is {kind}; it must be an array of ASCII bytes, uint8 [B, L]")
    if array.ndim != 2:
        raise ValueError(f"windows has the shape {array.shape}; it must be [B, L] (one window: window[None])")
    codes = _CODES[array]
    if codes.size and codes.max() == _INVALID:
        row, column = (int(i) for i in np.argwhere(codes == _INVALID)[0])
        raise ValueError(
            f"windows[{row}, {column}] is {chr(array[row, column])!r} (byte {array[row, column]}), which is "
            "no nucleotide; allowed: A C G T U N and the IUPAC letters R Y S W K M B D H V"
        )
    return codes
