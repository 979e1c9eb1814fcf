"""Telling what the gallery does not know, by the distance to the nearest prototype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ._check import as_embeddings, as_names
from .retrieval import euclidean


def unknown_detection(
    known: Tensor,
    unknown: Tensor,
    prototypes: Tensor,
    *,
    threshold: float | None = None,
    known_groups: Sequence[str] | None = None,
    unknown_groups: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How well the distance to the nearest prototype separates unknown classes from known ones.

    Args:
        known: test embeddings of classes that have a prototype [N, d].
        unknown: embeddings of classes that have none [M, d].
        prototypes: [C, d].
        threshold: the distance past which an image is called unknown; adds the two error rates at it.
        known_groups: stone of each known image [N]; the interval resamples stones where they are given.
        unknown_groups: stone of each unknown image [M].
        level: confidence level.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        JSON-able: `auroc` {estimate, low, high} (0.5 is chance; the interval resamples known
        and unknown stones apart, its ends are None with one stone of either), `fpr_at_95_tpr` (share of known
        images called unknown at the distance that finds 95 % of the unknown ones), `known`, `unknown`
        (counts), `threshold`, `false_unknown_rate` and `detected_rate` at it, or None.

    Raises:
        ValueError: one of the sets is empty, or shapes do not fit.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    known, unknown = as_embeddings("known", known), as_embeddings("unknown", unknown)
    prototypes = as_embeddings("prototypes", prototypes)
    if not len(known) or not len(unknown):
        raise ValueError(f"both sets must hold images; got {len(known)} known and {len(unknown)} unknown")
    stones = [
        as_names("known_groups", known_groups, len(known)),
        as_names("unknown_groups", unknown_groups, len(unknown)),
    ]
    parts = [
        euclidean(part, prototypes.to(part.dtype)).amin(dim=1).double().numpy() for part in (known, unknown)
    ]
    distance = np.concatenate(parts)
    truth = np.concatenate([np.zeros(len(known)), np.ones(len(unknown))])
    low, high = _auroc_interval(parts, stones, level=level, resamples=resamples, seed=seed)
    false_rate, true_rate, _ = roc_curve(truth, distance, drop_intermediate=False)
    result: dict[str, Any] = {
        "known": len(known),
        "unknown": len(unknown),
        "resampled": "stones" if all(part is not None for part in stones) else "images",
        "auroc": {"estimate": float(roc_auc_score(truth, distance)), "low": low, "high": high},
        "fpr_at_95_tpr": float(false_rate[true_rate >= 0.95].min()),
        "threshold": threshold,
        "false_unknown_rate": None,
        "detected_rate": None,
    }
    if threshold is not None:
        past = distance > threshold
        result["false_unknown_rate"] = float(past[truth == 0].mean())
        result["detected_rate"] = float(past[truth == 1].mean())
    return result


def _auroc_interval(
    parts: list[np.ndarray], stones: list[np.ndarray | None], *, level: float, resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """Bootstrap over known stones and, apart from it, over unknown ones.

    AUROC is the share of (known, unknown) pairs in the right order, ties counting half (Mann–Whitney), so one
    table of wins between stones gives every resample as a bilinear form.
    """
    own = [
        np.arange(len(p)) if s is None else np.unique(s, return_inverse=True)[1]
        for p, s in zip(parts, stones, strict=True)
    ]
    sizes = [np.bincount(index).astype(np.float64) for index in own]
    if min(len(size) for size in sizes) < 2:
        return None, None
    wins = np.zeros((len(sizes[0]), len(sizes[1])))
    for stone in range(len(sizes[0])):
        ordered = np.sort(parts[0][own[0] == stone])
        below = np.searchsorted(ordered, parts[1], side="left") + np.searchsorted(
            ordered, parts[1], side="right"
        )
        wins[stone] = np.bincount(own[1], weights=below / 2, minlength=len(sizes[1]))
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(len(size), np.full(len(size), 1 / len(size)), size=resamples) for size in sizes]
    right = np.einsum("rk,ku,ru->r", drawn[0], wins, drawn[1], optimize=True)
    values = right / ((drawn[0] @ sizes[0]) * (drawn[1] @ sizes[1]))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
