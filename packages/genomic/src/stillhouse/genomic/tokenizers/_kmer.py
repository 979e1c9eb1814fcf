"""Non-overlapping k-mers from left to right, with the vocabulary of the Nucleotide Transformer v2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.core.errors import DataError

from ._files import read_vocabulary
from ._letters import LETTERS, N_CODE, OUTSIDE, Bytes, letter_codes
from ._scan import kmer_values, scan
from ._tokens import KmerTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST_K = 8
_ROLES = {
    "unk_token": ("<unk>", "[UNK]", "<UNK>"),
    "pad_token": ("<pad>", "[PAD]", "<PAD>"),
    "mask_token": ("<mask>", "[MASK]", "<MASK>"),
    "cls_token": ("<cls>", "[CLS]", "<CLS>"),
    "eos_token": ("<eos>", "[EOS]", "<EOS>"),
    "bos_token": ("<bos>", "[BOS]", "<BOS>"),
}
_NTV2 = ("<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>")


def ntv2_vocabulary(k: int = 6) -> dict[str, int]:
    """Token → id in the order of NTv2's `vocab.txt`.

    <unk> 0, <pad> 1, <mask> 2, <cls> 3, <eos> 4, <bos> 5, then the 4^k k-mers with the letters in the order
    A T C G (the last letter runs fastest; AAAAAA is 6), then A, T, C, G, N: 4107 tokens for k = 6. The order
    of the letters is that of instadeepai/nucleotide-transformer (constants.py); the ids are those that users
    of nucleotide-transformer-v2-50m-multi-species print, and the released configurations have the vocabulary
    size 4107. The JAX release of the same models puts <eos> and <bos> at the end instead.
    """
    kmers = ["".join(letters) for letters in product(LETTERS, repeat=k)] if k > 1 else []
    return {token: index for index, token in enumerate((*_NTV2, *kmers, *LETTERS, "N"))}


class KmerTokenizer:
    """Greedy k-mers from left to right; N is a token of its own and breaks the frame.

    A stretch of n letters between N becomes n // k k-mers and n mod k single letters:
    "ATCGAATNGGCGA" with k = 5 is ATCGA A T N GGCGA. Lower case is read as upper case, U as T, IUPAC ambiguity
    letters as N.

    Args:
        k: letters of a token, 1 … 8. With k = 1 k-mers and single letters are the same tokens, which is how
            masked language models over characters are read.
        vocabulary: token → id; the order of NTv2 when None (`ntv2_vocabulary`). It must hold every k-mer, the
            four letters, and a token each for unknown, padding and mask; without an N, N is unknown.
        starts_with: the special token that the model expects before every sequence, or None. `encode` never
            adds it.
        named: role → token where a vocabulary calls its special tokens otherwise ("pad_token": "P", …).

    Attributes:
        k, vocabulary, vocab_size: as given; the size is the largest id + 1.
        unk_id, pad_id, mask_id, n_id: ids; cls_id is that of `starts_with`, or None.
        kmer_ids: ids of the k-mers in the order A T C G, last letter fastest, int64 [4^k].
        letter_ids: ids of A, T, C, G, int64 [4].

    Raises:
        ValueError: k out of range, or a vocabulary that lacks tokens.

    Example:
        >>> tokenizer = KmerTokenizer()
        >>> tokens = tokenizer.encode(np.frombuffer(b"AAAAAATNACGTACG", np.uint8)[None])
        >>> [tokenizer.token(i) for i in tokens.ids[0].tolist()], tokens.ids[0, :3].tolist()
        (['AAAAAA', 'T', 'N', 'ACGTAC', 'G'], [6, 4103, 4106])
    """

    def __init__(
        self,
        k: int = 6,
        *,
        vocabulary: Mapping[str, int] | None = None,
        starts_with: str | None = "<cls>",
        named: Mapping[str, str] | None = None,
    ) -> None:
        if type(k) is not int or not 1 <= k <= _LARGEST_K:
            raise ValueError(f"k is {k!r}; it must be an integer in [1, {_LARGEST_K}]")
        self.k = k
        self.vocabulary = dict(ntv2_vocabulary(k) if vocabulary is None else vocabulary)
        self.special = _special_tokens(self.vocabulary, named or {})
        kmers = ["".join(letters) for letters in product(LETTERS, repeat=k)]
        missing = [
            t for t in (*kmers, *LETTERS) if t not in self.vocabulary and t.lower() not in self.vocabulary
        ]
        missing += [role for role in ("unk_token", "pad_token", "mask_token") if role not in self.special]
        if missing:
            raise ValueError(
                f"vocabulary lacks {len(missing)} tokens, among them {', '.join(missing[:4])}; it needs all "
                f"{4**k} {k}-mers, the letters A T C G, and tokens for unknown, padding and mask"
            )
        if len(set(self.vocabulary.values())) != len(self.vocabulary):
            raise ValueError("vocabulary gives one id to two tokens; ids must be different")
        if starts_with is not None and starts_with not in self.vocabulary:
            raise ValueError(f"starts_with is {starts_with!r}, which is not in the vocabulary; allowed: None")
        self.starts_with = starts_with
        self.cls_id = None if starts_with is None else self.vocabulary[starts_with]
        self.unk_id, self.pad_id, self.mask_id = (
            self.vocabulary[self.special[role]] for role in ("unk_token", "pad_token", "mask_token")
        )
        self.n_id = self._id("N", self.unk_id)
        self.vocab_size = max(self.vocabulary.values()) + 1
        self.kmer_ids = torch.tensor([self._id(t) for t in kmers])
        self.letter_ids = torch.tensor([self._id(t) for t in LETTERS])
        self._kmer_table: NDArray[np.int64] = self.kmer_ids.numpy()
        self._letter_table: NDArray[np.int64] = np.array([*self.letter_ids.tolist(), self.n_id], np.int64)
        self._tokens = {index: token for token, index in self.vocabulary.items()}

    def _id(self, token: str, otherwise: int | None = None) -> int:
        found = self.vocabulary.get(token, self.vocabulary.get(token.lower(), otherwise))
        assert found is not None  # __init__ has looked for it
        return found

    def __repr__(self) -> str:
        return f"KmerTokenizer(k={self.k}, vocab_size={self.vocab_size}, starts_with={self.starts_with!r})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KmerTokenizer)
            and (self.k, self.vocabulary, self.starts_with) == (other.k, other.vocabulary, other.starts_with)
            and self.special == other.special
        )

    __hash__ = None  # type: ignore[assignment]

    def token(self, index: int) -> str:
        """Token of an id."""
        return self._tokens[index]

    # ------------------------------------------------------------------------------------------------- encode

    def encode(
        self, windows: Bytes | Tensor, lengths: NDArray[np.int64] | Tensor | None = None
    ) -> KmerTokens:
        """Tokenise a batch.

        Args:
            windows: ASCII letters, uint8 [B, L], numpy or torch. What pads a shorter window with N is N, each
                a token of its own, unless `lengths` says otherwise.
            lengths: characters of each window [B], 0 … L; those beyond belong to no token (group −1). None:
                all L.

        Returns:
            Tokens on the CPU; T is the largest number of tokens of a window.

        Raises:
            TypeError: not uint8.
            ValueError: not [B, L], a character that is no nucleotide, or lengths that do not fit.
        """
        codes = letter_codes(windows)
        rows, width = codes.shape
        inside: NDArray[np.bool_] | None = None
        if lengths is not None:
            inside = np.arange(width) < _lengths(lengths, rows, width)[:, None]
            codes[~inside] = OUTSIDE
        counts, sizes, starts = scan(codes, self.k)
        most = int(counts.max(initial=0))
        flat = codes.reshape(-1)
        ids = self._letter_table[np.minimum(flat[starts], N_CODE)]
        if self.k > 1:
            whole = sizes == self.k
            ids[whole] = self._kmer_table[kmer_values(codes, self.k)[starts[whole]]]
        place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        members = np.repeat(place, sizes)
        if inside is None:
            groups = members.reshape(rows, width)
        else:
            groups = np.full((rows, width), -1, np.int64)
            groups[inside] = members
        valid = np.arange(most) < counts[:, None]
        padded_ids = np.full((rows, most), self.pad_id, np.int64)
        padded_sizes = np.zeros((rows, most), np.int64)
        padded_ids[valid], padded_sizes[valid] = ids, sizes
        return KmerTokens(*(torch.from_numpy(a) for a in (padded_ids, groups, counts, padded_sizes)))

    def decode(self, tokens: KmerTokens) -> Bytes:
        """ASCII letters of tokens; special tokens and characters beyond the end become N.

        Returns:
            uint8 [B, L].
        """
        table = np.full((self.vocab_size + 1, self.k), ord("N"), np.uint8)
        for token, index in self.vocabulary.items():
            if token.upper().strip("ATCG") == "" and len(token) in (1, self.k):
                table[index, : len(token)] = np.frombuffer(token.upper().encode(), np.uint8)
        owner = tokens.spread(tokens.ids, fill=self.vocab_size).cpu().numpy()
        return table[owner, tokens.offsets.clamp_min(0).cpu().numpy()]

    def is_n(self, ids: Tensor) -> Tensor:
        """True where a token is N, bool of the shape of `ids`."""
        return ids == self.n_id

    def is_kmer(self, ids: Tensor) -> Tensor:
        """True where a token is a whole k-mer, bool of the shape of `ids`."""
        return self._lookup(self.kmer_ids, ids)

    def is_letters(self, ids: Tensor) -> Tensor:
        """True where a token holds nucleotides: a whole k-mer or a single letter that is not N."""
        return self._lookup(torch.cat([self.kmer_ids, self.letter_ids]), ids)

    def _lookup(self, members: Tensor, ids: Tensor) -> Tensor:
        table = torch.zeros(self.vocab_size, dtype=torch.bool)
        table[members] = True
        return table.to(ids.device)[ids]

    # -------------------------------------------------------------------------------------------------- files

    def to_huggingface(self, *, max_length: int | None = None) -> PreTrainedTokenizerFast:
        """The same as a fast tokenizer of transformers, which adds `starts_with` and nothing at the end.

        Args:
            max_length: longest sequence in tokens, [CLS] included; None sets none.

        Raises:
            ValueError: a vocabulary in lower case, which this conversion does not cover.
        """
        from ._huggingface import fast_tokenizer

        if "A" not in self.vocabulary:
            raise ValueError("the vocabulary is in lower case; to_huggingface needs upper-case letters")
        pattern = "." if self.k == 1 else f"[{LETTERS}]{{{self.k}}}|."
        return fast_tokenizer(
            self.vocabulary,
            pattern=pattern,
            special={
                role: token for role, token in self.special.items() if role not in ("eos_token", "bos_token")
            },
            template=None if self.starts_with is None else f"{self.starts_with} $A",
            max_length=max_length,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json`, `tokenizer_config.json` and `vocab.txt`; AutoTokenizer reads them.

        Returns:
            The folder.
        """
        target = Path(folder)
        self.to_huggingface().save_pretrained(str(target))
        if self.vocab_size == len(self.vocabulary):
            lines = [self._tokens[index] for index in range(self.vocab_size)]
            (target / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return target

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> KmerTokenizer:
        """Read a folder in the conventions of Hugging Face: ours, NTv2's, or that of another model.

        `tokenizer.json`, `vocab.txt` or `vocab.json` is read, whichever comes first; k is the longest length
        of which the vocabulary holds every word.

        Raises:
            DataError: no vocabulary there, a damaged one, or one that is not of non-overlapping k-mers.
        """
        found = read_vocabulary(Path(folder))
        known = {token.upper() for token in found.ids}
        fits = [k for k in range(_LARGEST_K, 0, -1) if all("".join(w) in known for w in _probe(k))]
        try:
            if not fits:
                raise ValueError("it holds neither k-mers nor letters")
            return cls(fits[0], vocabulary=found.ids, starts_with=found.starts_with, named=found.named)
        except ValueError as error:
            raise DataError(
                f"{found.path}: not a vocabulary of non-overlapping k-mers or of characters ({error}). "
                "Overlapping k-mers (DNABERT) and byte pairs (DNABERT-2) have no character groups to align to"
            ) from error


def _probe(k: int) -> list[tuple[str, ...]]:
    """A few words of length k; whether all 4^k are there is checked by the constructor."""
    return [(letter,) * k for letter in LETTERS]


def _special_tokens(vocabulary: Mapping[str, int], named: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for role, usual in _ROLES.items():
        token = next((t for t in (named.get(role), *usual) if t is not None and t in vocabulary), None)
        if token is not None:
            found[role] = token
    return found


def _lengths(lengths: NDArray[np.int64] | Tensor, rows: int, width: int) -> NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.shape != (rows,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"lengths is {array.dtype} {array.shape}; it must be integers [B] with B = {rows}")
    if array.size and (array.min() < 0 or array.max() > width):
        raise ValueError(f"lengths lie in [{array.min()}, {array.max()}]; allowed: [0, L = {width}]")
    return array.astype(np.int64)
