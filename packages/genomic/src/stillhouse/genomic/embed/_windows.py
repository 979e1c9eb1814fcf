"""Embed windows with a student or a teacher: the same call, the same positions, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..heads import Bytes, attended, flipped, other_strand, padded_ids, pooled, real_letters

if TYPE_CHECKING:
    from ..teacher import Teacher

Pool = Literal["mean", "center", "none"]
POOLS = ("mean", "center", "none")


@torch.no_grad()
def embed_windows(
    model: nn.Module | Teacher,
    windows: Bytes,
    *,
    lengths: npt.ArrayLike | None = None,
    pool: Pool = "mean",
    batch: int = 32,
    device: torch.device | str | None = None,
    conjoin: bool = False,
    middle: int = 6,
    progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Embed windows.

    A teacher's tokens are spread to the characters they stand for, by the map of its tokenizer, so that
    "mean" weighs each by its characters and "center" takes the same bases for every model.

    N at either end of a window is padding, as in pre-training (see `heads.real_letters`): a student does not
    read it and no pool counts it, so that a window is embedded as it is without. It still has its place: the
    centre is that of the window. A teacher's tokens end with the last nucleotide; N ahead of the first is
    read as the teacher's own tokens for it. N between nucleotides is a letter.

    Args:
        model: a student's encoder (ids int64 [B, L], `attend=` → [B, L, d]), or a `Teacher`.
        windows: letters, uint8 [N, L]; shorter sequences padded with N on the right.
        lengths: [N] real lengths, ≥ 1; None: all of every window is real.
        pool: "mean" over the real positions, "center" over those among the `middle` positions around the
            centre, or "none", one vector a position.
        batch: windows at a time.
        device: where to compute; None leaves the model where it is.
        conjoin: average with the embedding of the reverse complement (of each position, where "none").
        middle: positions of "center".
        progress: called with the number of windows done since the last call.

    Returns:
        float32 [N, d], or [N, L, d] for "none"; zero at padding, and for a window of N alone.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    x = np.asarray(windows)
    if x.ndim != 2 or x.dtype != np.uint8 or not x.shape[1]:
        raise ValueError(f"windows has shape {x.shape} and dtype {x.dtype}; give uint8 [N, L], L ≥ 1")
    ends = np.full(len(x), x.shape[1]) if lengths is None else np.asarray(lengths)
    if ends.shape != (len(x),) or (len(ends) and (ends.min() < 1 or ends.max() > x.shape[1])):
        raise ValueError(f"lengths must be one number in 1…{x.shape[1]} for each of {len(x)} windows")
    if pool not in POOLS or batch < 1 or middle < 1:
        raise ValueError(f"pool is {pool!r}, batch {batch}, middle {middle}; give {POOLS}, numbers ≥ 1")
    network = model if isinstance(model, nn.Module) else model.network
    if device is not None:
        network.to(device)
    place = _place(network, device)
    was_training = network.training
    network.eval()
    parts: list[npt.NDArray[np.float32]] = []
    try:
        for start in range(0, len(x), batch):
            rows, lengths_of = x[start : start + batch], ends[start : start + batch]
            features, attend = _features(model, rows, lengths_of, place)
            if conjoin:
                turned, _ = _features(model, other_strand(rows, lengths_of), lengths_of, place)
                features = (features + flipped(turned, lengths_of)) / 2
            if pool == "none":
                out = features.masked_fill(~attend[..., None], 0.0)
            else:
                inside = attended(lengths_of, rows.shape[1]).to(attend.device)
                out = pooled(features, attend, pool, middle=middle, inside=inside)
            parts.append(out.float().cpu().numpy())
            if progress is not None:
                progress(len(rows))
    finally:
        network.train(was_training)
    if not parts:
        width = int(getattr(model, "width", 0))
        return np.zeros((0, width) if pool != "none" else (0, x.shape[1], width), np.float32)
    return np.concatenate(parts)


def _features(
    model: nn.Module | Teacher, windows: Bytes, lengths: npt.NDArray[Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """One vector a character [B, L, d], and which of them are real, bool [B, L]."""
    attend = real_letters(windows, lengths)
    if isinstance(model, nn.Module):
        from ..tokenizers import CharacterTokenizer

        ids, attend = padded_ids(CharacterTokenizer(), windows, attend, device)
        features: Tensor = model(ids, attend=attend)
        return features, attend
    place = torch.arange(1, windows.shape[1] + 1)
    ends = (attend * place).amax(1).numpy()  # one past the last nucleotide, as `view_of` has it
    tokens = model.tokenizer.encode(windows, ends).to(device)
    return tokens.spread(model.features(tokens)[0].to(device)), attend.to(device)


def _place(network: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    first = next(network.parameters(), None)
    return torch.device("cpu") if first is None else first.device
