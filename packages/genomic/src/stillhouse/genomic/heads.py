"""Classification heads on an encoder: pooling over the real positions, and the average over both strands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Pool = Literal["mean", "center"]
Compat = Literal["none", "reference"]
_COMPLEMENT = np.arange(256, dtype=np.uint8)
_COMPLEMENT[np.frombuffer(b"ACGT", np.uint8)] = np.frombuffer(b"TGCA", np.uint8)
Bytes = npt.NDArray[np.uint8]


class CharacterCoder(Protocol):
    """What a classifier needs of a tokenizer; `CharacterTokenizer` has it."""

    pad_id: int

    def encode(self, windows: Bytes) -> Tensor:
        """Ids int64 [B, L] of letters uint8 [B, L]."""
        ...


def attended(lengths: Tensor | npt.ArrayLike, width: int) -> Tensor:
    """True at the real positions of windows that are padded on the right.

    Args:
        lengths: [B] real lengths, 0…width.
        width: L.

    Returns:
        bool [B, L].

    Example:
        >>> attended([1, 3], 3).int().tolist()
        [[1, 0, 0], [1, 1, 1]]
    """
    ends = torch.as_tensor(lengths)
    if ends.dim() != 1 or (len(ends) and not 0 <= int(ends.min()) <= int(ends.max()) <= width):
        raise ValueError(f"lengths must be [B] whole numbers in 0…{width}")
    return torch.arange(width, device=ends.device) < ends[:, None]


def real_letters(windows: Bytes, lengths: Tensor | npt.ArrayLike | None = None) -> Tensor:
    """The positions of windows that a student reads: everything from the first nucleotide to the last.

    N at either end is padding, whether it fills a window up, stands for what lies over the end of a record,
    or is the edge of a gap; N between nucleotides is a letter of its own. Pre-training, fine-tuning, probes,
    embeddings and variant scores all follow this rule.

    Args:
        windows: letters A C G T N, uint8 [B, L].
        lengths: [B]; what lies behind is padding whatever it is. None: L.

    Returns:
        bool [B, L]; all False for a window without a nucleotide.

    Example:
        >>> real_letters(np.frombuffer(b"NANCGN", np.uint8)[None]).int().tolist()
        [[0, 1, 1, 1, 1, 0]]
    """
    x = np.asarray(windows)
    known = x != ord("N")
    if lengths is not None:
        known &= attended(lengths, x.shape[1]).cpu().numpy()
    ahead = np.logical_or.accumulate(known, axis=1)
    behind = np.logical_or.accumulate(known[:, ::-1], axis=1)[:, ::-1]
    return torch.from_numpy(ahead & behind)


def left_padded(windows: Bytes, lengths: npt.ArrayLike) -> Bytes:
    """Move the padding of windows from the right to the left, as the reference's loaders have it.

    Args:
        windows: uint8 [B, L], padded with N on the right.
        lengths: [B] real lengths.

    Returns:
        uint8 [B, L].

    Example:
        >>> left_padded(np.frombuffer(b"ACNN", np.uint8)[None], [2]).tobytes()
        b'NNAC'
    """
    x, ends = np.asarray(windows), np.asarray(lengths)
    place = (np.arange(x.shape[1]) + ends[:, None]) % max(x.shape[1], 1)
    return np.take_along_axis(x, place, axis=1)


def other_strand(windows: Bytes, lengths: npt.ArrayLike | None = None) -> Bytes:
    """Reverse complement of windows; the padding stays on the right.

    Args:
        windows: uint8 [B, L], upper case.
        lengths: [B] real lengths; None: all of every window is real.

    Returns:
        uint8 [B, L].

    Example:
        >>> other_strand(np.frombuffer(b"AACGNN", np.uint8)[None], [4]).tobytes()
        b'CGTTNN'
    """
    turned = _COMPLEMENT[np.asarray(windows)[:, ::-1]]
    if lengths is None:
        return np.ascontiguousarray(turned)
    shift = turned.shape[1] - np.asarray(lengths)
    place = (np.arange(turned.shape[1]) + shift[:, None]) % max(turned.shape[1], 1)
    return np.take_along_axis(turned, place, axis=1)


def flipped(features: Tensor, lengths: Tensor | npt.ArrayLike) -> Tensor:
    """Reverse the positions of features of windows that are padded on the right.

    Args:
        features: [B, L, …].
        lengths: [B].

    Returns:
        [B, L, …]: position i has what position length − 1 − i had; what lies behind stays.
    """
    ends = torch.as_tensor(lengths, device=features.device)[:, None]
    place = torch.arange(features.shape[1], device=features.device)
    index = torch.where(place < ends, ends - 1 - place, place)
    index = index.view(*index.shape, *(1,) * (features.dim() - 2)).expand_as(features)
    return features.gather(1, index)


def pooled(
    features: Tensor,
    attend: Tensor,
    pool: Pool = "mean",
    *,
    compat: Compat = "none",
    middle: int = 6,
    inside: Tensor | None = None,
) -> Tensor:
    """One vector a window.

    Args:
        features: [B, L, d].
        attend: bool [B, L], True at real positions.
        pool: "mean" of the real positions, or "center", the mean of those among the middle ones of the
            window.
        compat: "reference" divides the sum over *all* positions by L: padding is counted, as in Caduceus'
            and HyenaDNA's sequence decoders.
        middle: positions that "center" takes, where there are as many.
        inside: bool [B, L], what the window is of which "center" takes the middle: it is not moved by N at an
            end of the window. None: `attend`.

    Returns:
        [B, d]; zero for a window without a real position.

    Raises:
        ValueError: an unknown pool or shapes that do not fit.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> real = torch.tensor([[True, True, False]])
        >>> pooled(x, real).item(), pooled(x, real, compat="reference").item()
        (2.0, 4.0)
    """
    if features.dim() != 3 or attend.shape != features.shape[:2]:
        raise ValueError(
            f"features has shape {tuple(features.shape)} and attend {tuple(attend.shape)}; "
            "give [B, L, d] and [B, L]"
        )
    if pool == "mean" and compat == "reference":
        return features.mean(dim=1)
    chosen = attend
    if pool == "center":
        window = attend if inside is None else inside
        place = window.cumsum(dim=1) - 1  # rank in the window
        length = window.sum(dim=1, keepdim=True)
        first = (length - middle).clamp_min(0) // 2
        chosen = attend & (place >= first) & (place < first + middle)
    elif pool != "mean":
        raise ValueError(f"pool is {pool!r}; give 'mean' or 'center'")
    weight = chosen.to(features.dtype)[..., None]
    # padding may hold anything, NaN included: where() and not a product keeps it out
    total = torch.where(chosen[..., None], features, features.new_zeros(())).sum(dim=1)
    return total / weight.sum(dim=1).clamp_min(1)


class Head(nn.Module):
    """Pooling and a linear layer.

    Args:
        width: d of the features.
        classes: C ≥ 2.
        pool: see `pooled`.
        compat: see `pooled`.
        bias: with a bias; the reference has none.

    Inputs:
        features [B, L, d] and attend bool [B, L] (None: all real) → logits [B, C].

    Source: kuleshov-group/caduceus, SequenceDecoder; there the pool counts the padding (`compat`).

    Example:
        >>> Head(8, 3)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        width: int,
        classes: int,
        pool: Pool = "mean",
        *,
        compat: Compat = "none",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if width < 1 or classes < 2:
            raise ValueError(f"width is {width} and classes {classes}; give width ≥ 1 and classes ≥ 2")
        if compat not in ("none", "reference") or pool not in ("mean", "center"):
            raise ValueError(
                f"pool is {pool!r} and compat {compat!r}; give mean or center, none or reference"
            )
        self.pool: Pool = pool
        self.compat: Compat = compat
        self.linear = nn.Linear(width, classes, bias=bias)

    def forward(
        self, features: Tensor, attend: Tensor | None = None, *, inside: Tensor | None = None
    ) -> Tensor:
        """Logits [B, C]; see the class, and `pooled` for `inside`."""
        real = features.new_ones(features.shape[:2], dtype=torch.bool) if attend is None else attend
        vectors = pooled(features, real, self.pool, compat=self.compat, inside=inside)
        logits: Tensor = self.linear(vectors)
        return logits


class Classifier(nn.Module):
    """An encoder, its tokenizer and a head: letters in, logits out.

    Args:
        encoder: maps ids int64 [B, L] and `attend=` bool [B, L] to [B, L, d]; has `width`.
        head: on top of it.
        tokenizer: has `encode`, `pad_id`.

    Inputs:
        windows uint8 [B, L], lengths [B] or None → logits [B, C].
    """

    def __init__(self, encoder: nn.Module, head: Head, tokenizer: CharacterCoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def prepare(self, windows: Bytes, lengths: npt.ArrayLike | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `logits` takes, on the CPU; see the class.

        Returns:
            Ids int64 [B, L]; the positions that are read (see `real_letters`) and those of the windows
            themselves, N at their ends included, both bool [B, L].
        """
        ends = np.full(len(windows), windows.shape[1]) if lengths is None else np.asarray(lengths)
        inside, attend = attended(ends, windows.shape[1]), real_letters(windows, ends)
        if self.head.compat == "reference":
            windows, inside = left_padded(windows, ends), inside.flip(1)
            attend = real_letters(windows) & inside
        return *padded_ids(self._tokenizer, windows, attend, "cpu"), inside

    def logits(self, ids: Tensor, attend: Tensor, inside: Tensor) -> Tensor:
        """Logits [B, C] of what `prepare` made."""
        out: Tensor = self.head(self.encoder(ids, attend=attend), attend, inside=inside)
        return out

    def forward(self, windows: Bytes, lengths: npt.ArrayLike | None = None) -> Tensor:
        """Logits [B, C]; see the class."""
        return self.logits(*(part.to(self.device) for part in self.prepare(windows, lengths)))

    @torch.no_grad()
    def conjoined(self, windows: Bytes, lengths: npt.ArrayLike | None = None) -> Tensor:
        """Mean of the logits of both strands [B, C]; any B, one included."""
        return conjoined(self.forward, windows, lengths)


def conjoined(
    logits: Callable[[Bytes, npt.ArrayLike | None], Tensor],
    windows: Bytes,
    lengths: npt.ArrayLike | None = None,
) -> Tensor:
    """Average of a classifier's logits over a window and its reverse complement.

    Args:
        logits: (windows uint8 [B, L], lengths [B] or None) → [B, C].
        windows: uint8 [B, L].
        lengths: [B] real lengths or None.

    Returns:
        [B, C], the same for a window and its reverse complement.
    """
    return (logits(windows, lengths) + logits(other_strand(windows, lengths), lengths)) / 2


def padded_ids(
    tokenizer: CharacterCoder, windows: Bytes, attend: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Ids with the pad id at positions that are not real, and the mask, both on the device."""
    ids = tokenizer.encode(windows).masked_fill(~attend, tokenizer.pad_id)
    return ids.to(device), attend.to(device)
