"""The other strand: weights shared between both, or predictions averaged over both.

`RcEquivariant` is parameter sharing as in Caduceus-PS: one half of the channels reads a sequence, the other
its reverse complement, with the same network, so that f(RC x) is f(x) flipped in letters and channels.
`conjoin` needs no such network: it averages what any model says of a window and of its reverse complement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._layers import check_ids

if TYPE_CHECKING:
    from .encoder import Encoder

A, C, G, T = 7, 8, 9, 10  # ids of CharacterTokenizer
LETTERS = (A, C, G, T)
Logits = TypeVar("Logits", Tensor, NDArray[np.floating])


def complement_ids(vocab: int = 16) -> tuple[int, ...]:
    """Id → id of the complementary letter: A ↔ T, C ↔ G, everything else itself.

    Args:
        vocab: number of ids, at least 12.
    """
    table = list(range(vocab))
    for one, other in ((A, T), (C, G)):
        table[one], table[other] = other, one
    return tuple(table)


class RcEquivariant(nn.Module):
    """An encoder made equivariant under reverse complement: f(x) = [E(x), flip(E(RC x))].

    The flip turns both letters and channels round, so that f(RC x) = flip(f(x)) exactly, with flip over
    letters and over all 2d channels. It costs two passes of E, run as one batch.

    Args:
        encoder: E, features of width d.
        complement: id → id of the complementary letter; None is that of `CharacterTokenizer`.

    Attributes:
        width: 2d.

    Shapes: ids int64 [B, L], attend bool [B, L] or None → [B, L, 2d].

    Example:
        >>> from stillhouse.genomic.student import build_student, preset
        >>> f = RcEquivariant(build_student(preset("cnn_32")))
        >>> x, rc = torch.tensor([[7, 7, 8]]), torch.tensor([[9, 10, 10]])      # AAC and GTT
        >>> torch.allclose(f(rc), f(x).flip(1, 2), atol=1e-5)
        True
    """

    complement: Tensor

    def __init__(self, encoder: Encoder, *, complement: Sequence[int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.width = 2 * encoder.width
        self.depth = encoder.depth
        table = complement_ids(encoder.config.vocab) if complement is None else tuple(complement)
        if len(table) != encoder.config.vocab:
            raise ValueError(f"complement has {len(table)} ids; the vocabulary has {encoder.config.vocab}")
        self.register_buffer("complement", torch.tensor(table))

    def reverse_complement(self, ids: Tensor) -> Tensor:
        """Ids [B, L] of the other strand, read in its own direction."""
        return self.complement[ids].flip(1)

    @overload
    def forward(
        self, ids: Tensor, *, attend: Tensor | None = None, hidden: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, ids: Tensor, *, attend: Tensor | None = None, hidden: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward(
        self, ids: Tensor, *, attend: Tensor | None = None, hidden: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode both strands; arguments and results as of `Encoder.forward`, with 2d channels."""
        check_ids(ids, attend)
        both = torch.cat([ids, self.reverse_complement(ids)])
        masks = None if attend is None else torch.cat([attend, attend.flip(1)])
        if not hidden:
            return _join(self.encoder(both, attend=masks))
        _, layers = self.encoder(both, attend=masks, hidden=True)
        joined = [_join(layer) for layer in layers]
        return joined[-1], joined


def _join(features: Tensor) -> Tensor:
    """[2B, L, d] of a sequence and its reverse complement → [B, L, 2d]."""
    own, other = features.chunk(2)
    return torch.cat([own, other.flip(1, 2)], -1)


class RcHead(nn.Module):
    """Nucleotide logits of `RcEquivariant` features: logits(RC x) = logits(x) reversed and complemented.

    W h for the own strand plus the complementary letter's W h of the other, one W for both.

    Args:
        width: channels of the features, 2d.

    Shapes: [B, L, 2d] → [B, L, 4] over A, C, G, T.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width is {width}; features of two strands have an even number of channels")
        self.proj = nn.Linear(width // 2, 4, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, L, 2d] to logits [B, L, 4]."""
        own, other = features.chunk(2, -1)
        return self.proj(own) + self.proj(other.flip(-1)).flip(-1)  # flipping A, C, G, T complements


def conjoin(logits_fn: Callable[[NDArray[np.uint8]], Logits], windows: NDArray[np.uint8]) -> Logits:
    """Average a prediction over both strands.

    Args:
        logits_fn: windows uint8 [B, L] → logits [B, …] of whole windows.
        windows: ASCII letters, uint8 [B, L].

    Returns:
        (logits_fn(x) + logits_fn(RC x)) / 2, the same for x and RC x.

    Example:
        >>> count_a = lambda x: (x == ord("A")).sum(1, keepdims=True).astype(float)
        >>> conjoin(count_a, np.frombuffer(b"AACT", np.uint8)[None])
        array([[1.5]])
    """
    from stillhouse.genomic.data import reverse_complement

    return (logits_fn(windows) + logits_fn(reverse_complement(windows))) / 2
