"""What a teacher says about a fixed set of windows, computed once and read from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stillhouse.core.cache import CacheSpec, TeacherCache, settings_hash, vocabulary_hash
from stillhouse.core.errors import DataError
from stillhouse.core.teacher import HiddenSignal, weight_hash

from ..tokenizers import KmerTokenizer, KmerTokens
from ._protocol import Teacher, layer_indices


class CachedTeacher:
    """A teacher that looks the features of known windows up; made by `cached_features`.

    Windows are known by the ids of their tokens. What is not in the cache is asked of the teacher itself:
    windows that were not stored, layers that were not stored, and every call with `visible`, since a mask
    drawn anew each time makes each answer new.

    Args:
        teacher: the teacher.
        cache: its cache.
        layers: the stored layers, each in [0, depth].

    Attributes:
        hits, misses: windows whose features came from the cache, and from the teacher.
    """

    def __init__(self, teacher: Teacher, cache: TeacherCache, layers: Sequence[int]) -> None:
        self.teacher, self.cache, self.layers = teacher, cache, tuple(layers)
        self.hits = self.misses = 0

    @property
    def name(self) -> str:
        """That of the teacher inside."""
        return self.teacher.name

    @property
    def tokenizer(self) -> KmerTokenizer:
        """That of the teacher inside."""
        return self.teacher.tokenizer

    @property
    def network(self) -> nn.Module:
        """That of the teacher inside."""
        return self.teacher.network

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.teacher.width

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.teacher.depth

    @property
    def licence(self) -> str | None:
        """That of the teacher inside."""
        return self.teacher.licence

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.teacher.parameters

    def untrained(self, seed: int) -> Teacher:
        """The architecture of the teacher inside with fresh weights; not cached."""
        return self.teacher.untrained(seed)

    def nucleotide_log_probs(self, tokens: KmerTokens, *, visible: Tensor | None = None) -> Tensor:
        """See `Teacher.nucleotide_log_probs`; not cached."""
        return self.teacher.nucleotide_log_probs(tokens, visible=visible)

    def features(
        self, tokens: KmerTokens, *, visible: Tensor | None = None, layers: Sequence[int] = (-1,)
    ) -> list[Tensor]:
        """See `Teacher.features`; cached values have the precision they were stored with."""
        wanted = layer_indices(layers, self.depth)
        count = len(tokens.ids)
        if visible is not None or not set(wanted) <= set(self.layers) or not tokens.ids.numel():
            self.misses += count
            return self.teacher.features(tokens, visible=visible, layers=layers)
        names = window_ids(tokens)
        absent = self.cache.missing(names)
        known = sorted(set(range(count)) - set(absent))
        self.hits, self.misses = self.hits + len(known), self.misses + len(absent)
        device = next(self.network.parameters()).device
        found = [torch.zeros(*tokens.ids.shape, self.width, device=device) for _ in wanted]
        if known:
            signal = self.cache.lookup([names[row] for row in known]).signal
            if not isinstance(signal, HiddenSignal):
                raise DataError(f"{self.cache.path}: holds no hidden states; delete it and make it again")
            for values, layer in zip(found, wanted, strict=True):
                stored = signal.values[f"layer{layer}"].float().to(device)
                values[torch.tensor(known, device=device), : stored.shape[1]] = stored
        if absent:
            rows = torch.tensor(absent)
            live = self.teacher.features(tokens.select(rows.to(tokens.ids.device)), layers=layers)
            for values, fresh in zip(found, live, strict=True):
                values[rows.to(device)] = fresh.to(device)
        return found


def cached_features(
    teacher: Teacher,
    windows: NDArray[np.uint8] | Tensor,
    folder: str | Path,
    *,
    layers: Sequence[int] = (-1,),
    batch: int = 64,
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16",
) -> CachedTeacher:
    """Ask a teacher about windows, unmasked, and keep the answers.

    A run that was interrupted goes on where it stopped. Both strands of a window are two windows: store both
    if training reverse-complements.

    Args:
        teacher: the teacher.
        windows: ASCII letters, uint8 [N, L].
        folder: of the cache; new, or one made from the same teacher with the same settings.
        layers: which hidden states, see `Teacher.features`.
        batch: windows at once (≥ 1).
        dtype: of the stored values. Size: N · T · width · layers · bytes.

    Returns:
        The teacher with the cache before it.

    Raises:
        DataError: the folder holds a cache of another teacher or other settings.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be ≥ 1")
    kept = sorted(set(layer_indices(layers, teacher.depth)))
    spec = CacheSpec(
        kind="hidden",
        teacher=teacher.name,
        teacher_hash=weight_hash(teacher.network),
        vocabulary_hash=vocabulary_hash(teacher.tokenizer.vocabulary),
        preprocessing_hash=settings_hash(
            {
                "layers": kept,
                "k": teacher.tokenizer.k,
                "starts_with": teacher.tokenizer.starts_with,
                "final": str(getattr(teacher, "final", "norm")),
                "kind": type(teacher).__name__,
            }
        ),
        dtype=dtype,
        ragged=True,
    )
    path = Path(folder)
    with TeacherCache.create(path, spec) as writer:
        for start in range(0, len(windows), batch):
            tokens = teacher.tokenizer.encode(windows[start : start + batch])
            names = window_ids(tokens)
            first = {name: row for row, name in reversed(list(enumerate(names)))}
            rows = [row for row in writer.missing(names) if first[names[row]] == row]
            if not rows:
                continue
            part = tokens.select(torch.tensor(rows))
            states = teacher.features(part, layers=kept)
            values = {f"layer{layer}": state.cpu() for layer, state in zip(kept, states, strict=True)}
            writer.add([names[row] for row in rows], HiddenSignal(values), mask=part.valid.cpu())
        writer.finish()
    return CachedTeacher(teacher, TeacherCache.open(path, expect=spec), kept)


def window_ids(tokens: KmerTokens) -> list[str]:
    """A name for each window that follows from its tokens alone."""
    ids, lengths = tokens.ids.cpu().numpy().astype("<i8"), tokens.lengths.tolist()
    return [
        hashlib.blake2b(np.ascontiguousarray(row[:length]).tobytes(), digest_size=16).hexdigest()
        for row, length in zip(ids, lengths, strict=True)
    ]
