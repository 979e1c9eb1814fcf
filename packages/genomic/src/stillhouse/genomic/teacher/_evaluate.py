"""How well a teacher guesses hidden nucleotides: the same number for every kind of teacher."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._masked_language import corrupt
from ._protocol import Teacher


@torch.no_grad()
def evaluate_teacher(
    teacher: Teacher,
    windows: NDArray[np.uint8] | Tensor,
    *,
    ratio: float = 0.15,
    batch: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Hide tokens and ask for the nucleotides in them.

    Args:
        teacher: any.
        windows: ASCII letters, uint8 [N, L].
        ratio: share of the tokens of each window that are hidden (all of them by the mask token).
        batch: windows at once (≥ 1).
        seed: of the choice.

    Returns:
        "cross_entropy" in nats a character (guessing: log 4 = 1.386), "accuracy" of the likeliest nucleotide,
        and "characters", the number asked for.

    Raises:
        ValueError: no window holds a nucleotide.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be ≥ 1")
    total, right, count = 0.0, 0, 0
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        tokens = teacher.tokenizer.encode(part)
        chosen = corrupt(
            tokens, teacher.tokenizer, key=seed, ratio=ratio, mask_share=1, random_share=0
        ).chosen
        log_probs = teacher.nucleotide_log_probs(tokens, visible=~chosen).cpu()
        truth = torch.from_numpy(_ACGT[teacher.tokenizer.decode(tokens)])
        asked = tokens.spread(chosen) & (truth >= 0)
        picked, target = log_probs[asked], truth[asked]
        total -= float(picked.gather(1, target[:, None]).double().sum())
        right += int((picked.argmax(1) == target).sum())
        count += len(target)
    if not count:
        raise ValueError("windows holds no nucleotide; give windows of A, C, G, T")
    return {"cross_entropy": total / count, "accuracy": right / count, "characters": float(count)}


_ACGT = np.full(256, -1, np.int64)
for _index, _letter in enumerate("ACGT"):
    _ACGT[ord(_letter)] = _index
