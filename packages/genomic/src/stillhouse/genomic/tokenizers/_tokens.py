"""k-mers of a batch of windows, and which characters belong to which."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KmerTokens:
    """A batch of tokenised windows; B windows of L characters, at most T tokens.

    Attributes:
        ids: token ids, int64 [B, T], without [CLS]; the pad id beyond `lengths`.
        groups: index of the token that each character belongs to, int64 [B, L]; −1 for characters beyond the
            end of a sequence that is shorter than its window. Within a window it never decreases.
        lengths: number of tokens of each window, int64 [B].
        sizes: number of characters of each token, int64 [B, T]; 0 on padding.

    Example:
        >>> import numpy as np
        >>> from stillhouse.genomic.tokenizers import KmerTokenizer
        >>> tokens = KmerTokenizer(k=2).encode(np.frombuffer(b"ACGNTAC", np.uint8)[None])
        >>> tokens.sizes.tolist(), tokens.groups.tolist()
        ([[2, 1, 1, 2, 1]], [[0, 0, 1, 2, 3, 3, 4]])
    """

    ids: Tensor
    groups: Tensor
    lengths: Tensor
    sizes: Tensor

    @property
    def valid(self) -> Tensor:
        """True where there is a token and not padding, bool [B, T]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def starts(self) -> Tensor:
        """Index of each token's first character, int64 [B, T]; on padding the end of the sequence."""
        return self.sizes.cumsum(1) - self.sizes

    @property
    def offsets(self) -> Tensor:
        """Place of each character within its token, int64 [B, L], from 0; −1 where `groups` is −1."""
        if not self.ids.shape[1]:
            return self.groups.clone()
        first = self.starts.gather(1, self.groups.clamp_min(0))
        place = torch.arange(self.groups.shape[1], device=self.groups.device) - first
        return place.where(self.groups >= 0, -1)

    def to(self, device: torch.device | str) -> KmerTokens:
        """The same on a device."""
        return KmerTokens(*(getattr(self, f.name).to(device) for f in fields(self)))

    def select(self, rows: Tensor | slice) -> KmerTokens:
        """Some of the windows, by an index or boolean tensor [b] or a slice; T stays."""
        return KmerTokens(*(getattr(self, f.name)[rows] for f in fields(self)))

    def spread(self, values: Tensor, fill: float | bool = False) -> Tensor:
        """Give each character what its token has.

        Args:
            values: [B, T] or [B, T, …].
            fill: for characters beyond the end.

        Returns:
            [B, L] or [B, L, …].
        """
        inside = self.groups >= 0
        index = self.groups.clamp_min(0)
        rest = values.dim() - 2
        for _ in range(rest):
            index, inside = index[..., None], inside[..., None]
        if not values.shape[1]:
            return values.new_full((*self.groups.shape, *values.shape[2:]), fill)
        spread = values.gather(1, index.expand(*self.groups.shape, *values.shape[2:]))
        return spread.masked_fill(~inside, fill)

    def pool(self, features: Tensor) -> Tensor:
        """Mean over the characters of each token.

        Args:
            features: one vector a character, [B, L, d].

        Returns:
            [B, T, d]; zero on padding. Gradients flow.
        """
        if features.shape[:2] != self.groups.shape:
            raise ValueError(
                f"features has the shape {tuple(features.shape)}; it must be [B, L, d] with [B, L] = "
                f"{tuple(self.groups.shape)}, the characters of these tokens"
            )
        batch, count = self.ids.shape
        rows = torch.arange(batch, device=self.groups.device)[:, None] * count
        index = (self.groups + rows)[self.groups >= 0]
        flat = features[self.groups >= 0]
        total = features.new_zeros(batch * count, features.shape[-1]).index_add(0, index, flat)
        mean = total / self.sizes.clamp_min(1).view(-1, 1).to(features.dtype)
        return mean.view(batch, count, features.shape[-1])
