"""How well embeddings identify stones: every score of the report from query and gallery embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._check import as_embeddings, as_labels, as_names
from ._interval import share_interval
from .fusion import fuse_views
from .retrieval import RETRIEVAL, class_prototypes, clustering, euclidean, nearest, retrieval, vote


def prototype_logits(embeddings: Tensor, prototypes: Tensor, temperature: float = 1.0) -> Tensor:
    """Class logits of a prototypical network: −‖f(x) − c_k‖² / τ; their softmax is p(k|x).

    For scoring; it goes through a square root, whose gradient at distance 0 is infinite. A loss takes
    `hypothesis.hypothesis_logits`, the same formula with the prototypes made of a support set.

    Args:
        embeddings: [N, d].
        prototypes: [C, d].
        temperature: τ > 0.

    Returns:
        [N, C].

    Example:
        >>> prototype_logits(torch.tensor([[1.0, 0.0]]), torch.eye(2), temperature=0.5).round()
        tensor([[-0., -4.]])
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be greater than 0")
    return -euclidean(embeddings, prototypes).square() / temperature


def evaluate_embeddings(
    query: Tensor,
    query_labels: Tensor | Sequence[int],
    gallery: Tensor,
    gallery_labels: Tensor | Sequence[int],
    *,
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
    views: Sequence[str] | None = None,
    gallery_groups: Sequence[str] | None = None,
    gallery_views: Sequence[str] | None = None,
    fuse: str | None = "max",
    k: int = 5,
    temperature: float = 1.0,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score query embeddings against a gallery of labelled embeddings.

    Queries whose class has no member in the gallery cannot be right; they are left out of *every* score, as
    pytorch-metric-learning leaves them out of its own, and their classes are listed under `lone`. Score them
    with `unknown_detection`.

    Args:
        query: test embeddings [N, d].
        query_labels: integers into `classes` [N].
        gallery: labelled reference embeddings, from other stones [M, d].
        gallery_labels: integers into `classes` [M].
        classes: class names.
        groups: stone of each query [N]; intervals then resample stones. None: intervals resample images, and
            the result says so.
        views: view of each query [N]; with `gallery_views` adds `per_view`, and with both groups `fused`.
        gallery_groups: stone of each gallery item [M].
        gallery_views: view of each gallery item [M].
        fuse: how `fused` joins the views of a stone: "max", "mean", "concat"; None leaves it out.
        k: neighbours of the k-NN vote; fewer where the gallery is smaller.
        temperature: τ of the class probabilities.
        level: confidence level of the intervals.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        JSON-able, an interval's ends are None with one stone: `items`, `stones` (None when unknown),
        `resampled` ("stones" | "images"), `lone`; intervals {estimate, low, high} for `accuracy` (nearest
        prototype), `accuracy_knn`, `precision_at_1`, `r_precision`, `map_at_r`; `macro_f1`, `nmi`, `ami`;
        `per_class` (name → recall, precision, items, stones); `confusion` (classes, counts
        [true][predicted]); `calibration` (temperature, ece, brier, nll, reliability; None with one class);
        `per_view` (view → the same without views); `fused` (the same per stone, with `how`,
        `complete_stones`, which show every view, and `mixed_stones`, left out for having two classes).

    Raises:
        ValueError: shapes, labels or names do not fit, or no query class is in the gallery.
    """
    query = as_embeddings("query", query)
    gallery = as_embeddings("gallery", gallery)
    labels = as_labels("query_labels", query_labels, len(query))
    reference = as_labels("gallery_labels", gallery_labels, len(gallery))
    stones, seen_views = as_names("groups", groups, len(query)), as_names("views", views, len(query))
    own_stones = as_names("gallery_groups", gallery_groups, len(gallery))
    own_views = as_names("gallery_views", gallery_views, len(gallery))
    for name, values in (("query_labels", labels), ("gallery_labels", reference)):
        if len(values) and int(values.max()) >= len(classes):
            raise ValueError(f"{name} holds {int(values.max())}, but classes has {len(classes)} names")
    options: dict[str, Any] = {
        "classes": tuple(classes),
        "k": k,
        "temperature": temperature,
        "level": level,
        "resamples": resamples,
        "seed": seed,
    }
    result = _scores(query, labels, stones, gallery, reference, **options)
    if seen_views is None or own_views is None:
        return result

    result["per_view"] = {}
    for view in sorted(set(seen_views) & set(own_views)):
        mine, theirs = seen_views == view, own_views == view
        if not set(labels[mine].tolist()) & set(reference[theirs].tolist()):
            continue
        result["per_view"][view] = _scores(
            query[mine],
            labels[mine],
            None if stones is None else stones[mine],
            gallery[theirs],
            reference[theirs],
            **options,
        )
    several = len(set(seen_views) | set(own_views)) > 1
    if fuse is not None and several and stones is not None and own_stones is not None:
        all_views = sorted(set(seen_views) | set(own_views))
        left = _fused_stones(query, labels, stones, seen_views, fuse, all_views)
        right = _fused_stones(gallery, reference, own_stones, own_views, fuse, all_views)
        fused = _scores(left.embeddings, left.labels, left.stones, right.embeddings, right.labels, **options)
        result["fused"] = {"how": fuse, "complete_stones": left.complete, "mixed_stones": left.mixed, **fused}
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stones:
    """One fused embedding per stone of a single class, and how many stones were complete and mixed."""

    embeddings: Tensor
    labels: Tensor
    stones: np.ndarray
    complete: int
    mixed: int


def _fused_stones(
    embeddings: Tensor,
    labels: Tensor,
    stones: np.ndarray,
    views: np.ndarray,
    how: str,
    all_views: Sequence[str],
) -> _Stones:
    classes_of: dict[str, set[int]] = {}
    for stone, label in zip(stones, labels.tolist(), strict=True):
        classes_of.setdefault(stone, set()).add(label)
    pure = np.array([len(classes_of[stone]) == 1 for stone in stones], dtype=bool)
    kept = torch.from_numpy(pure)
    fused = fuse_views(embeddings[kept], stones[pure], views[pure], how, all_views=all_views)
    return _Stones(
        embeddings=fused.embeddings,
        labels=torch.tensor([classes_of[stone].copy().pop() for stone in fused.stones], dtype=torch.int64),
        stones=np.asarray(fused.stones, dtype=object),
        complete=int(fused.complete.sum()),
        mixed=sum(len(own) > 1 for own in classes_of.values()),
    )


def prototype_correct(
    query: Tensor,
    query_labels: Tensor | Sequence[int],
    gallery: Tensor,
    gallery_labels: Tensor | Sequence[int],
) -> np.ndarray:
    """Whether the nearest prototype has the right class, query by query; what a paired comparison needs.

    Args:
        query: [N, d].
        query_labels: integers ≥ 0 [N].
        gallery: [M, d].
        gallery_labels: integers ≥ 0 [M].

    Returns:
        float64 [N], 1 for right and 0 for wrong; queries of a class that the gallery lacks are wrong.
    """
    query, gallery = as_embeddings("query", query), as_embeddings("gallery", gallery)
    labels = as_labels("query_labels", query_labels, len(query))
    present, prototypes = class_prototypes(gallery, gallery_labels)
    return (present[euclidean(query, prototypes).argmin(dim=1)] == labels).double().numpy()


def accuracy_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float | None]:
    """Accuracy of one model minus that of another on the same queries, with a paired interval over stones.

    Args:
        first: `prototype_correct` of one model [N].
        second: of the other, same queries in the same order [N].
        groups: stone of each query [N]; None resamples images.
        level: coverage.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        `estimate`, `low`, `high`; the ends are None with one stone.
    """
    from stillhouse.core.metrics import bootstrap_interval

    names = as_names("groups", groups, len(first))
    estimate = float(np.mean(first) - np.mean(second))
    if (len(first) if names is None else len(set(names))) < 2:
        return {"estimate": estimate, "low": None, "high": None}
    got = bootstrap_interval(
        first, paired_with=second, groups=names, level=level, resamples=resamples, seed=seed
    )
    return {"estimate": estimate, "low": got.low, "high": got.high}


def _scores(
    query: Tensor,
    labels: Tensor,
    stones: np.ndarray | None,
    gallery: Tensor,
    reference: Tensor,
    *,
    classes: tuple[str, ...],
    k: int,
    temperature: float,
    level: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    present, prototypes = class_prototypes(gallery, reference)
    kept = torch.isin(labels, present)
    lone = sorted({classes[int(label)] for label in labels[~kept]})
    if not bool(kept.any()):
        raise ValueError(
            f"no query class is in the gallery: {', '.join(lone) or 'there is no query'}; add reference "
            f"images"
        )
    query, labels = query[kept], labels[kept]
    stones = None if stones is None else stones[kept.numpy()]

    logits = prototype_logits(query, prototypes, temperature)
    predicted = present[logits.argmax(dim=1)]
    distances, indices = nearest(query, gallery, min(k, len(gallery)))
    voted = vote(reference[indices], distances, len(classes))
    found = retrieval(query, labels, gallery, reference)

    def interval(values: np.ndarray) -> dict[str, float | None]:
        return share_interval(values, stones, level=level, resamples=resamples, seed=seed)

    scores = {
        "accuracy": interval((predicted == labels).double().numpy()),
        "accuracy_knn": interval((voted == labels).double().numpy()),
    }
    for name in RETRIEVAL:
        value = interval(found["per_query"][name])
        scores[name.replace("mean_average_precision", "map")] = {**value, "estimate": found[name]}
    return {
        "items": len(query),
        "stones": None if stones is None else len(set(stones)),
        "resampled": "images" if stones is None else "stones",
        "level": level,
        "k": min(k, len(gallery)),
        "lone": lone,
        **scores,
        **clustering(query, labels),
        **_per_class(labels, predicted, stones, classes),
        "calibration": calibration_scores(logits, labels, present, temperature),
    }


def _per_class(
    labels: Tensor, predicted: Tensor, stones: np.ndarray | None, classes: tuple[str, ...]
) -> dict[str, Any]:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    shown = sorted({*labels.tolist(), *predicted.tolist()})
    true, guess = labels.numpy(), predicted.numpy()
    precision, recall, f1, support = precision_recall_fscore_support(
        true, guess, labels=shown, zero_division=0.0
    )
    tested = [i for i, count in enumerate(support) if count]
    per_class = {
        classes[shown[i]]: {
            "recall": float(recall[i]),
            "precision": float(precision[i]),
            "items": int(support[i]),
            "stones": None if stones is None else len(set(stones[true == shown[i]])),
        }
        for i in tested
    }
    # scikit-learn warns of a 1 × 1 matrix even where `labels` says so.
    counts = confusion_matrix(true, guess, labels=shown) if len(shown) > 1 else np.array([[len(true)]])
    return {
        "macro_f1": float(np.mean([f1[i] for i in tested])),
        "per_class": per_class,
        "confusion": {"classes": [classes[i] for i in shown], "counts": counts.tolist()},
    }


def calibration_scores(
    logits: Tensor, labels: Tensor, present: Tensor, temperature: float
) -> dict[str, Any] | None:
    """Calibration of softmax(logits).

    Args:
        logits: [N, C].
        labels: class numbers [N], each among `present`.
        present: class number of each column, ascending [C].
        temperature: τ that the logits were made with, for the record.

    Returns:
        `temperature`, `ece`, `brier`, `nll`, `reliability`; None where there is only one class to choose
    from.
    """
    from stillhouse.core.metrics import brier_score, negative_log_likelihood, reliability_curve

    if len(present) < 2:
        return None
    column = torch.searchsorted(present, labels).numpy()
    probabilities = logits.double().softmax(dim=1).numpy()
    curve = reliability_curve(probabilities, column, bins=10)
    return {
        "temperature": temperature,
        "ece": curve.error,
        "brier": brier_score(probabilities, column),
        "nll": negative_log_likelihood(logits.double().numpy(), column),
        "reliability": {
            "confidence": curve.confidence.tolist(),
            "accuracy": curve.accuracy.tolist(),
            "count": curve.count.tolist(),
            "edges": curve.edges.tolist(),
        },
    }
