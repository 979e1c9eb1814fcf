"""Training a k-mer teacher: masked language modelling as a distiller of one role.

15 % of the tokens are chosen; 80 % of these become the mask token, 10 % another k-mer, 10 % stay (BERT). The
loader that this field copies (kuleshov-group/caduceus, mlm.py) draws the replacement from the whole
vocabulary, special tokens included, and chooses padding and N as well; here a replacement is always a k-mer,
and padding, N and special tokens are never chosen. Two deviations from BERT: each window has exactly
round(15 %) of its tokens chosen, at least one, so that the loss is the mean over a number known before the
step; and the draw is a hash of seed, step and window, so that it depends neither on the number of processes
nor on interruptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.train import Losses, Step

from ..tokenizers import KmerTokenizer, KmerTokens
from ._kmer_teacher import attention
from ._kmer_transformer import KmerTransformer


class Corrupted(NamedTuple):
    """A batch as the network sees it.

    Attributes:
        ids: int64 [B, T].
        chosen: tokens to predict, bool [B, T].
    """

    ids: Tensor
    chosen: Tensor


def chosen_counts(tokens: KmerTokens, tokenizer: KmerTokenizer, ratio: float) -> Tensor:
    """How many tokens of each window are chosen, int64 [B]: round(ratio · candidates), at least 1 of any."""
    candidates = (tokenizer.is_letters(tokens.ids) & tokens.valid).sum(1)
    return (candidates * ratio).round().long().clamp_min(1).minimum(candidates)


def corrupt(
    tokens: KmerTokens,
    tokenizer: KmerTokenizer,
    *,
    key: int,
    ratio: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> Corrupted:
    """Choose tokens and hide them.

    Args:
        tokens: a batch, on any device.
        tokenizer: its vocabulary.
        key: decides the draw together with the content of each window (not its place in the batch).
        ratio: share of the candidates (k-mers and single letters) that are chosen, in (0, 1].
        mask_share: share of the chosen that become the mask token.
        random_share: share of the chosen that become a k-mer drawn from all; the rest stay.

    Returns:
        What the network reads, and where it is asked.

    Raises:
        ValueError: shares out of range.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio!r}; it must lie in (0, 1]")
    if not (mask_share >= 0 and random_share >= 0 and mask_share + random_share <= 1):
        raise ValueError(
            f"mask_share and random_share are {mask_share!r} and {random_share!r}; they must be ≥ 0 and add "
            "up to at most 1"
        )
    ids = tokens.ids
    rows = _window_hash(tokens) + _mix(torch.tensor(key, dtype=torch.int64, device=ids.device))
    order, kind, replacement = (_uniform(rows, ids.shape[1], stream) for stream in range(3))
    candidates = tokenizer.is_letters(ids) & tokens.valid
    ranks = order.masked_fill(~candidates, 2.0).argsort(1).argsort(1)
    chosen = (ranks < chosen_counts(tokens, tokenizer, ratio)[:, None]) & candidates
    kmers = tokenizer.kmer_ids.to(ids.device)
    drawn = kmers[(replacement * len(kmers)).long().clamp_max(len(kmers) - 1)]
    shown = ids.masked_fill(chosen & (kind < mask_share), tokenizer.mask_id)
    swap = chosen & (kind >= mask_share) & (kind < mask_share + random_share)
    return Corrupted(torch.where(swap, drawn, shown), chosen)


class MaskedLanguageDistiller:
    """Trains a `KmerTransformer`; one role, "teacher", and nothing is frozen.

    A batch is windows as the data give them, uint8 [B, L], or `KmerTokens`. Logits are computed for the
    chosen tokens alone, over the whole vocabulary.

    Args:
        network: the network.
        tokenizer: its vocabulary; NTv2's order for the network's k when None.
        ratio, mask_share, random_share: see `corrupt`.
        seed: of the draws (≥ 0).
    """

    def __init__(
        self,
        network: KmerTransformer,
        tokenizer: KmerTokenizer | None = None,
        *,
        ratio: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.tokenizer = KmerTokenizer(network.config.k) if tokenizer is None else tokenizer
        if self.tokenizer.vocab_size != network.vocab_size:
            raise ValueError(
                f"tokenizer has {self.tokenizer.vocab_size} ids and the network {network.vocab_size}"
            )
        self.ratio, self.mask_share, self.random_share, self.seed = ratio, mask_share, random_share, seed

    def trainable(self) -> Mapping[str, nn.Module]:
        """The teacher in the making."""
        return {"teacher": self.network}

    def frozen(self) -> Mapping[str, nn.Module]:
        """Nothing."""
        return {}

    def roles(self, step: int) -> Sequence[str]:
        """Always the teacher."""
        return ("teacher",)

    def num_items(self, batch: Tensor | KmerTokens) -> int:
        """Tokens that are chosen in a batch."""
        return int(chosen_counts(self._tokens(batch), self.tokenizer, self.ratio).sum())

    def loss(self, role: str, batch: Tensor | KmerTokens, step: Step) -> Losses:
        """Cross-entropy of the chosen tokens, their mean over the whole step; "accuracy" is for the log."""
        device = self.network.embedding.weight.device
        tokens = self._tokens(batch).to(device)
        seen = corrupt(
            tokens,
            self.tokenizer,
            key=(self.seed << 32) + step.index,
            ratio=self.ratio,
            mask_share=self.mask_share,
            random_share=self.random_share,
        )
        features = self.network(seen.ids, attend=attention(tokens, device))
        logits = self.network.logits(features[seen.chosen]).float()
        targets = tokens.ids[seen.chosen]
        items = step.num_items if step.num_items is not None else len(targets)
        total = F.cross_entropy(logits, targets, reduction="sum") / max(items, 1)
        right = (logits.detach().argmax(-1) == targets).sum() / max(items, 1)
        return Losses(total, {"mlm": total, "accuracy": right})

    def _tokens(self, batch: Tensor | KmerTokens) -> KmerTokens:
        return batch if isinstance(batch, KmerTokens) else self.tokenizer.encode(batch)


# SplitMix64 on signed integers, whose products wrap around alike on every device.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _STEP
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _window_hash(tokens: KmerTokens) -> Tensor:
    """Hash of each window's tokens and their order, int64 [B]; padding does not enter."""
    place = torch.arange(tokens.ids.shape[1], device=tokens.ids.device)
    return (_mix(tokens.ids + (place << 20)) * tokens.valid).sum(1)


def _uniform(rows: Tensor, count: int, stream: int) -> Tensor:
    """Numbers in [0, 1), float64 [B, count], from a hash of row, stream and place."""
    place = torch.arange(count, device=rows.device)
    bits = _mix(_mix(rows + (stream + 1))[:, None] + place)
    return _shift(bits, 11).double() * 2.0**-53
