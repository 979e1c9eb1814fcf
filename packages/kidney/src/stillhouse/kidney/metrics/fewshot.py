"""Classes that nobody trained on: how well K labelled images make a new class known, without retraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._check import as_embeddings, as_labels, as_names
from ._interval import share_interval
from .retrieval import class_prototypes, euclidean


def kshot_new_class(
    embeddings: Tensor,
    labels: Tensor | Sequence[int],
    *,
    shots: int = 5,
    episodes: int = 200,
    groups: Sequence[str] | None = None,
    known: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy on new classes when each gets a prototype from K random images.

    An episode draws K images of each new class as its support; all other images are queries. With `groups`
    the queries of an episode never share a stone with the support, so K images of one stone are one stone's
    worth of knowledge. An image's score is the share of the episodes, in which it was a query, that named it
    rightly; the interval resamples stones (images without `groups`). It covers which stones were met,
    averaged over the draws of the support.

    Args:
        embeddings: images of the new classes only [N, d].
        labels: integers ≥ 0 [N], at least two classes unless `known` is given.
        shots: K ≥ 1 images a class.
        episodes: how many draws of the support.
        groups: stone of each image [N].
        known: prototypes of the classes the model was trained on [C, d]; adds `accuracy_among_all`, where
            they compete as well.
        level: confidence level.
        resamples: bootstrap resamples.
        seed: seed of the draws and of the bootstrap.

    Returns:
        JSON-able: `shots`, `episodes`, `classes` (how many), `items` scored, `accuracy` (nearest prototype)
        and `precision_at_1` (nearest support image) as {estimate, low, high}, `accuracy_among_all` likewise
        or None, `chance` = 1 / number of new classes.

    Raises:
        ValueError: too few classes, or a class that cannot give K support images and a query of another
            stone.
    """
    embeddings = as_embeddings("embeddings", embeddings)
    label = as_labels("labels", labels, len(embeddings))
    stones = as_names("groups", groups, len(embeddings))
    unit = np.arange(len(embeddings)) if stones is None else np.unique(stones, return_inverse=True)[1]
    if shots < 1 or episodes < 1:
        raise ValueError(f"shots and episodes must be at least 1, got {shots} and {episodes}")
    present = torch.unique(label)
    if len(present) < (1 if known is not None else 2):
        raise ValueError(
            f"labels holds {len(present)} class(es); two new classes are needed to tell them apart, or pass "
            f"known"
        )
    members = {int(c): np.flatnonzero(label.numpy() == int(c)) for c in present}
    for c, rows in members.items():
        _, sizes = np.unique(unit[rows], return_counts=True)
        if len(sizes) < 2 or len(rows) - sizes.max() < shots:
            raise ValueError(
                f"class {c} has {len(rows)} images of {len(sizes)} stones, the largest stone {sizes.max()}; "
                f"{shots} shots must come from "
                "the others, so that a stone is left to ask about: lower shots or leave the class out"
            )

    rng = np.random.default_rng(seed)
    hits = {name: np.zeros(len(embeddings)) for name in ("accuracy", "precision_at_1", "accuracy_among_all")}
    counted = np.zeros(len(embeddings))
    for _ in range(episodes):
        support = np.concatenate([_draw(rng, rows, unit, shots) for rows in members.values()])
        held = ~np.isin(unit, unit[support])
        query = np.flatnonzero(held)
        order, prototypes = class_prototypes(embeddings[support], label[support])
        to_new = euclidean(embeddings[query], prototypes)
        right = label[query]
        counted[query] += 1
        hits["accuracy"][query] += (order[to_new.argmin(dim=1)] == right).numpy()
        closest = euclidean(embeddings[query], embeddings[support]).argmin(dim=1)
        hits["precision_at_1"][query] += (label[support][closest] == right).numpy()
        if known is not None:
            best_known = euclidean(embeddings[query], known.to(embeddings.dtype)).amin(dim=1)
            nearest_new = to_new.min(dim=1)
            ok = (order[nearest_new.indices] == right) & (nearest_new.values < best_known)
            hits["accuracy_among_all"][query] += ok.numpy()

    scored = counted > 0
    where = None if stones is None else stones[scored]

    def interval(name: str) -> dict[str, float | None]:
        values = hits[name][scored] / counted[scored]
        return share_interval(values, where, level=level, resamples=resamples, seed=seed)

    return {
        "shots": shots,
        "episodes": episodes,
        "classes": len(present),
        "items": int(scored.sum()),
        "resampled": "images" if stones is None else "stones",
        "level": level,
        "accuracy": interval("accuracy"),
        "precision_at_1": interval("precision_at_1"),
        "accuracy_among_all": None if known is None else interval("accuracy_among_all"),
        "chance": 1.0 / len(present),
    }


def _draw(rng: np.random.Generator, rows: np.ndarray, unit: np.ndarray, shots: int) -> np.ndarray:
    """K random images of one class, after setting one random stone of it aside for the queries."""
    stones = rng.permutation(np.unique(unit[rows]))[:-1]
    pool = rng.permutation(rows[np.isin(unit[rows], stones)])
    return pool[:shots]
