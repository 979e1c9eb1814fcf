"""One token a character, with the ids of Caduceus and HyenaDNA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.errors import DataError

from ._files import read_vocabulary
from ._letters import LETTERS, Bytes, letter_codes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
_VOCABULARY = {token: index for index, token in enumerate((*_SPECIAL, "A", "C", "G", "T", "N"))}


class CharacterTokenizer:
    """One token a character; ids as in kuleshov-group/caduceus.

    [CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11. Lower case
    is read as upper case, U as T, IUPAC ambiguity letters as N.

    Example:
        >>> CharacterTokenizer().encode(np.frombuffer(b"ACGTN", np.uint8)[None]).tolist()
        [[7, 8, 9, 10, 11]]
    """

    mask_id = _VOCABULARY["[MASK]"]
    pad_id = _VOCABULARY["[PAD]"]
    unk_id = _VOCABULARY["[UNK]"]
    sep_id = _VOCABULARY["[SEP]"]
    n_id = _VOCABULARY["N"]
    vocab_size = len(_VOCABULARY)
    nucleotide_ids = tuple(_VOCABULARY[letter] for letter in "ACGT")

    def __init__(self) -> None:
        self._ids = np.array([_VOCABULARY[letter] for letter in (*LETTERS, "N")], np.int64)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token → id."""
        return dict(_VOCABULARY)

    def encode(self, windows: Bytes | Tensor) -> Tensor:
        """Ids of the characters.

        Args:
            windows: ASCII letters, uint8 [B, L], numpy or torch.

        Returns:
            int64 [B, L], on the CPU; no special token is added.

        Raises:
            TypeError: not uint8.
            ValueError: not [B, L], or a character that is no nucleotide.
        """
        return torch.from_numpy(self._ids[letter_codes(windows)])

    def decode(self, ids: Tensor) -> Bytes:
        """ASCII letters of ids; every special token becomes N.

        Args:
            ids: int64, any shape.

        Returns:
            uint8 of the same shape.
        """
        table = np.full(self.vocab_size, ord("N"), np.uint8)
        for letter in "ACGT":
            table[_VOCABULARY[letter]] = ord(letter)
        return table[ids.cpu().numpy()]

    def to_huggingface(self) -> PreTrainedTokenizerFast:
        """The same as a tokenizer of transformers; as in Caduceus it pads on the left and ends with [SEP]."""
        from ._huggingface import fast_tokenizer

        return fast_tokenizer(
            _VOCABULARY,
            pattern=".",
            special={
                "unk_token": "[UNK]",
                "pad_token": "[PAD]",
                "mask_token": "[MASK]",
                "sep_token": "[SEP]",
                "cls_token": "[CLS]",
                "bos_token": "[BOS]",
            },
            template="$A [SEP]",
            padding_side="left",
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json` and `tokenizer_config.json`; AutoTokenizer reads them.

        Returns:
            The folder.
        """
        self.to_huggingface().save_pretrained(str(folder))
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CharacterTokenizer:
        """Read a folder and check that its vocabulary is this one.

        Raises:
            DataError: no vocabulary there, or another one.
        """
        vocabulary = read_vocabulary(Path(folder)).ids
        different = [t for t, i in _VOCABULARY.items() if t != "[RESERVED]" and vocabulary.get(t) != i]
        if different:
            shown = ", ".join(f"{t} is {vocabulary.get(t)} (here {_VOCABULARY[t]})" for t in different[:3])
            raise DataError(
                f"{folder}: not the character vocabulary of Caduceus: {shown}. A masked language model with "
                "another vocabulary of letters is read by KmerTokenizer.from_pretrained (k = 1)"
            )
        return cls()
