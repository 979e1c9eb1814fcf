"""The distance past which an image is called unknown, and the temperature of the confidence.

Both come from known images seen as if their stone were new: the image's stone is left out of the references,
the prototypes are built again, and the distance to the nearest one is taken. The threshold is the quantile of
*hierarchical* conformal prediction (Lee, Barber & Willett 2023, "Distribution-free inference with
hierarchical data"): stones are exchangeable, images of one stone are not, so every stone carries the same
weight and one further, unseen stone carries infinite distance.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..metrics import class_prototypes, euclidean


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How the unknown threshold was found, and how far it can be trusted.

    Attributes:
        threshold: distance past which an image is called unknown; None when nothing could be calibrated.
        rate: the asked share of known images that may be called unknown.
        low: lower end of the threshold's 95 % bootstrap interval over stones; None with fewer than two
            stones.
        high: its upper end.
        stones: stones it rests on.
        images: images it rests on.
        left_out: classes that could not take part (only one stone).
        temperature: τ of the class probabilities.
        statement: the above in words.
    """

    threshold: float | None
    rate: float
    low: float | None
    high: float | None
    stones: int
    images: int
    left_out: tuple[str, ...]
    temperature: float
    statement: str


def hierarchical_quantile(values: np.ndarray, groups: np.ndarray, rate: float) -> float:
    """(1 − rate) quantile where each of K groups weighs 1/(K + 1) and infinity weighs the rest.

    Args:
        values: scores [N].
        groups: group of each score [N].
        rate: in (0, 1).

    Returns:
        The smallest value whose cumulative weight reaches 1 − rate; infinity when K groups are too few (K + 1
        < 1/rate).

    Example:
        >>> hierarchical_quantile(np.array([1.0, 2.0, 3.0]), np.array(["a", "b", "c"]), 0.25)
        3.0
        >>> hierarchical_quantile(np.array([1.0, 2.0, 3.0]), np.array(["a", "b", "c"]), 0.05)
        inf
    """
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1.0 / ((len(counts) + 1) * counts[inverse])
    order = np.argsort(values, kind="stable")
    reached = np.flatnonzero(np.cumsum(weight[order]) >= 1 - rate - 1e-12)
    return float(values[order][reached[0]]) if len(reached) else math.inf


def leave_one_stone_out(
    embeddings: Tensor, labels: Tensor, stones: np.ndarray
) -> tuple[np.ndarray, Tensor, np.ndarray, set[int]]:
    """Distances and logits of each reference image with its own stone removed from the prototypes.

    Args:
        embeddings: [M, d].
        labels: class indices [M].
        stones: stone of each row [M].

    Returns:
        Distance to the nearest prototype [n]; squared distances to all prototypes of all classes [n, C]
        (classes ascending); the rows they belong to [n]; the classes left out because they have a single
        stone.
    """
    present, prototypes = class_prototypes(embeddings, labels)
    per_class = {int(c): set(stones[(labels == c).numpy()]) for c in present}
    single = {c for c, own in per_class.items() if len(own) < 2}
    rows, squares = [], []
    for stone in sorted(set(stones)):
        mine = np.flatnonzero(stones == stone)
        mine = mine[[int(labels[i]) not in single for i in mine]]
        if not len(mine):
            continue
        centres = prototypes.clone()
        for c in {int(labels[i]) for i in mine}:
            rest = (labels == c).numpy() & (stones != stone)
            centres[int((present == c).nonzero())] = embeddings[torch.from_numpy(rest)].mean(dim=0)
        rows.append(mine)
        squares.append(euclidean(embeddings[torch.from_numpy(mine)], centres).square())
    if not rows:
        return np.zeros(0), embeddings.new_zeros(0, len(present)), np.zeros(0, dtype=np.int64), single
    squared = torch.cat(squares)
    return squared.amin(dim=1).sqrt().double().numpy(), squared, np.concatenate(rows), single


def calibrate(
    embeddings: Tensor,
    labels: Tensor,
    stones: np.ndarray,
    *,
    classes: tuple[str, ...],
    rate: float = 0.05,
    held_out: tuple[Tensor, Tensor, np.ndarray] | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> Calibration:
    """Find the unknown threshold and the temperature.

    Classes with held-out images use those, as they are; the others use their references with each stone left
    out in turn.

    Args:
        embeddings: references [M, d].
        labels: indices into `classes` [M].
        stones: stone of each reference [M].
        classes: class names.
        rate: share of known images that may be called unknown, in (0, 0.5].
        held_out: embeddings [V, d], labels [V] and stones [V] of known images that are no references and were
            not trained on.
        temperature: keep this τ; None fits it by likelihood on the same images.
        seed: seed of the bootstrap.

    Returns:
        A `Calibration`; its threshold is None when no class has two stones and nothing is held out.

    Raises:
        ValueError: `rate` is out of range.
    """
    if not 0 < rate <= 0.5:
        raise ValueError(f"rate is {rate}; it must be in (0, 0.5], for example 0.05")
    present, prototypes = class_prototypes(embeddings, labels)
    distance, squared, rows, single = leave_one_stone_out(embeddings, labels, stones)
    target, where = labels[torch.from_numpy(rows)], stones[rows]
    if held_out is not None and len(held_out[0]):
        other, other_labels, other_stones = held_out
        keep = torch.isin(other_labels, present)
        covered = set(other_labels[keep].tolist())
        mine = np.array([int(c) not in covered for c in target], dtype=bool)
        more = euclidean(other[keep], prototypes).square()
        distance = np.concatenate([distance[mine], more.amin(dim=1).sqrt().double().numpy()])
        squared = torch.cat([squared[torch.from_numpy(mine)], more])
        target = torch.cat([target[torch.from_numpy(mine)], other_labels[keep]])
        where = np.concatenate([where[mine], other_stones[keep.numpy()]])
        single = single - covered
    left_out = tuple(classes[c] for c in sorted(single))
    tau = temperature
    if tau is None:
        tau = (
            fit_tau(squared, torch.searchsorted(present, target)) if len(target) and len(present) > 1 else 1.0
        )
    if not len(distance):
        statement = (
            "No unknown threshold: every class has images of one stone only, so how far a new stone of a "
            "known "
            "class lies is not known."
        )
        return Calibration(
            threshold=None,
            rate=rate,
            low=None,
            high=None,
            stones=0,
            images=0,
            left_out=left_out,
            temperature=tau,
            statement=statement,
        )
    count = len(set(where))
    threshold = hierarchical_quantile(distance, where, rate)
    enough = math.isfinite(threshold)
    threshold = threshold if enough else float(distance.max())
    low, high = _interval(distance, where, rate, seed)
    return Calibration(
        threshold=threshold,
        rate=rate,
        low=low,
        high=high,
        stones=count,
        images=len(distance),
        left_out=left_out,
        temperature=tau,
        statement=_statement(threshold, rate, low, high, count, len(distance), enough, left_out),
    )


def fit_tau(squared: Tensor, target: Tensor) -> float:
    """The τ that makes softmax(−‖f − c‖²/τ) fit the true classes best, in [0.05, 20].

    Args:
        squared: squared distances [n, C].
        target: column of the true class [n].

    Returns:
        τ; a bound where the best lies outside, 1 where the distances are all equal and say nothing.
    """
    from stillhouse.core.metrics import fit_temperature

    logits = -squared.double().numpy()
    if not np.ptp(logits, axis=1).any():
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # at a bound: few images, all of them right
        return fit_temperature(logits, target.numpy(), low=0.05, high=20.0)


def _interval(
    distance: np.ndarray, stones: np.ndarray, rate: float, seed: int
) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the threshold over stones."""
    names = np.unique(stones)
    if len(names) < 2:
        return None, None
    parts = [distance[stones == name] for name in names]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(500):
        drawn = [parts[i] for i in rng.integers(0, len(parts), len(parts))]
        values = np.concatenate(drawn)
        groups = np.repeat(np.arange(len(drawn)), [len(part) for part in drawn])
        found.append(min(hierarchical_quantile(values, groups, rate), float(values.max())))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _statement(
    threshold: float,
    rate: float,
    low: float | None,
    high: float | None,
    stones: int,
    images: int,
    enough: bool,
    left_out: tuple[str, ...],
) -> str:
    needed = math.ceil(1 / rate) - 1
    if enough:
        text = (
            f"Past a distance of {threshold:.3f} an image is called unknown; from {images} images of "
            f"{stones} stones, each seen without "
            f"its own stone, so that at most {100 * rate:.0f}\u202f% of the images of a new stone of these "
            f"classes are "
            f"expected beyond it."
        )
    else:
        text = (
            f"Past a distance of {threshold:.3f}, the largest seen, an image is called unknown; {stones} "
            f"stones cannot support a "
            f"false-unknown rate of {100 * rate:.0f}\u202f% (that takes {needed}), only one of about "
            f"{100 / (stones + 1):.1f}\u202f%."
        )
    if low is not None and high is not None:
        text += f" Resampling the stones moves the threshold between {low:.3f} and {high:.3f}."
    if left_out:
        text += f" Classes with a single stone took no part: {', '.join(left_out)}."
    return text
