"""Grouped masking: hide whole tokens of the teacher, and with each of them all its characters.

Student and teacher read the same window in different alphabets. Masking characters at random would leave
teacher tokens half visible, and what is left would give the rest away; so the mask is drawn over teacher
tokens and handed down to characters by the tokenizer's own map (HAD: "two-stage masking").

What may be masked: every token that holds nucleotides, whole k-mers and the single letters that N or the end
of a window leaves over alike, so that each nucleotide is hidden equally often. N and padding are never
masked, never a target, never aligned. Of k-mers alone being masked, or of the share, nothing was seen in the
paper (our reading).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .tokenizers import KmerTokenizer, KmerTokens


@dataclass(frozen=True, slots=True)
class GroupMask:
    """What is hidden of a batch; B windows of L characters, at most T tokens.

    Attributes:
        groups: masked tokens, bool [B, T].
        characters: masked characters, bool [B, L]: all of every masked token and no other.
        alignable: tokens whose features are compared: visible, with nucleotides in them, bool [B, T].
        letters: characters that are nucleotides, masked or not, bool [B, L].
    """

    groups: Tensor
    characters: Tensor
    alignable: Tensor
    letters: Tensor

    @property
    def visible(self) -> Tensor:
        """Tokens that are not masked, N and padding among them, bool [B, T]: what the teacher may see."""
        return ~self.groups

    def to(self, device: torch.device | str) -> GroupMask:
        """The same on a device."""
        return GroupMask(
            self.groups.to(device),
            self.characters.to(device),
            self.alignable.to(device),
            self.letters.to(device),
        )


def group_mask(
    tokens: KmerTokens, ratio: float, *, tokenizer: KmerTokenizer, generator: torch.Generator
) -> GroupMask:
    """Mask each token independently with probability `ratio`.

    A window with at least two candidates has at least one masked and one visible: where chance leaves none,
    the token nearest to the threshold is taken.

    Args:
        tokens: a batch, on the CPU.
        ratio: share of the tokens with nucleotides that are masked, 0 < ratio < 1.
        tokenizer: of the tokens; says which of them are N.
        generator: of the draws.

    Raises:
        ValueError: `ratio` out of range.

    Example:
        >>> tokenizer = KmerTokenizer(k=3)
        >>> tokens = tokenizer.encode(np.frombuffer(b"ACGTTNACGT", np.uint8)[None])
        >>> mask = group_mask(tokens, 0.5, tokenizer=tokenizer, generator=torch.Generator().manual_seed(3))
        >>> mask.groups.int().tolist(), mask.characters.int().tolist()
        ([[1, 1, 0, 0, 0, 0]], [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]])
    """
    scores = torch.rand(tokens.ids.shape, generator=generator, dtype=torch.float64)
    return mask_of(tokens, scores, ratio, tokenizer=tokenizer)


def seeded_mask(tokens: KmerTokens, ratio: float, *, tokenizer: KmerTokenizer, key: int) -> GroupMask:
    """As `group_mask`, with draws that follow from `key` and the content of each window.

    The mask of a window then does not depend on its neighbours in the batch, so that several processes
    together draw what one would, and a resumed run what an undisturbed one would.

    Args:
        tokens: a batch, on any device.
        ratio: see `group_mask`.
        tokenizer: see `group_mask`.
        key: ≥ 0; give each step another one.
    """
    ids, lengths = tokens.ids.cpu().numpy().astype("<i4"), tokens.lengths.tolist()
    scores = np.ones(ids.shape)
    for row, line, length in zip(scores, ids, lengths, strict=True):
        content = np.ascontiguousarray(line[:length]).tobytes()
        digest = hashlib.blake2b(content, digest_size=16, key=key.to_bytes(16, "little")).digest()
        draws = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))
        row[:length] = draws.random(length)
    return mask_of(tokens, torch.from_numpy(scores).to(tokens.ids.device), ratio, tokenizer=tokenizer)


def mask_of(tokens: KmerTokens, scores: Tensor, ratio: float, *, tokenizer: KmerTokenizer) -> GroupMask:
    """Mask the tokens whose score lies below `ratio`; see `group_mask`.

    Args:
        tokens: a batch.
        scores: numbers in [0, 1), [B, T].
        ratio: threshold, 0 < ratio < 1.
        tokenizer: of the tokens.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is {ratio!r}; it must lie strictly between 0 and 1")
    candidates = tokenizer.is_letters(tokens.ids) & tokens.valid
    masked = candidates & (scores < ratio)
    if tokens.ids.shape[1]:
        masked = _at_least_one_of_each(masked, candidates, scores)
    return _from_groups(tokens, masked, candidates)


def nothing_masked(tokens: KmerTokens, *, tokenizer: KmerTokenizer) -> GroupMask:
    """The mask that hides nothing."""
    candidates = tokenizer.is_letters(tokens.ids) & tokens.valid
    return _from_groups(tokens, torch.zeros_like(candidates), candidates)


def _from_groups(tokens: KmerTokens, masked: Tensor, candidates: Tensor) -> GroupMask:
    return GroupMask(
        groups=masked,
        characters=tokens.spread(masked),
        alignable=candidates & ~masked,
        letters=tokens.spread(candidates),
    )


def _at_least_one_of_each(masked: Tensor, candidates: Tensor, scores: Tensor) -> Tensor:
    enough = candidates.sum(1) >= 2
    lowest = scores.masked_fill(~candidates, 2.0).argmin(1, keepdim=True)
    highest = scores.masked_fill(~candidates, -1.0).argmax(1, keepdim=True)
    none = (enough & ~masked.any(1))[:, None]
    everything = (enough & (masked == candidates).all(1))[:, None]
    masked = masked.scatter(1, lowest, masked.gather(1, lowest) | none)
    return masked.scatter(1, highest, masked.gather(1, highest) & ~everything)
