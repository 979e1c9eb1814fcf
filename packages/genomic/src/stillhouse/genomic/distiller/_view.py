"""One batch of windows as both networks read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..heads import real_letters
from ..tokenizers import CharacterTokenizer, KmerTokenizer, KmerTokens

_PLACE = np.full(256, -1, np.int64)
_PLACE[np.frombuffer(b"ACGT", np.uint8)] = np.arange(4)


@dataclass(frozen=True, slots=True)
class View:
    """A batch of B windows of L characters.

    Attributes:
        ids: of the characters, int64 [B, L]; the pad id at padding.
        attend: False at padding, bool [B, L].
        nucleotides: 0 … 3 for A, C, G, T; −1 where there is none, int64 [B, L].
        tokens: the same windows as the teacher's tokens.
    """

    ids: Tensor
    attend: Tensor
    nucleotides: Tensor
    tokens: KmerTokens

    def to(self, device: torch.device | str) -> View:
        """The same on a device."""
        return View(
            self.ids.to(device),
            self.attend.to(device),
            self.nucleotides.to(device),
            self.tokens.to(device),
        )


def view_of(
    windows: NDArray[np.uint8] | Tensor, characters: CharacterTokenizer, kmers: KmerTokenizer
) -> View:
    """Tokenise windows for student and teacher.

    N at either end of a window is padding, as a window that reaches over the end of a record is filled up
    with it: the student does not attend to it. N between nucleotides stays a character of its own, as it is
    when windows are embedded; the loaders of the lineage turn every N into padding.

    Args:
        windows: letters A C G T N, uint8 [B, L].
        characters: the student's tokenizer.
        kmers: the teacher's.

    Returns:
        On the CPU.
    """
    letters = windows.cpu().numpy() if isinstance(windows, Tensor) else np.asarray(windows)
    ids = characters.encode(letters)
    real = real_letters(letters)
    ends = (real * torch.arange(1, letters.shape[1] + 1)).amax(1).numpy()  # one past the last nucleotide
    return View(
        ids=ids.masked_fill(~real, characters.pad_id),
        attend=real,
        nucleotides=torch.from_numpy(_PLACE[letters]),
        tokens=kmers.encode(letters, ends),
    )
