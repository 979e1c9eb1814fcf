"""Distances, prototypes and retrieval scores (P@1, R-precision, MAP@R).

The averages come from pytorch-metric-learning's `AccuracyCalculator`, the field's reference implementation.
It returns averages only, so `retrieval_per_query` computes the same three scores one query at a time;
intervals over stones need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._check import as_embeddings, as_labels

RETRIEVAL = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, computed from differences so that near-identical rows keep their digits.

    Args:
        a: [N, d].
        b: [M, d].

    Returns:
        [N, M], ≥ 0.

    Example:
        >>> euclidean(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"embeddings have {a.shape[1]} and {b.shape[1]} dimensions; both must come from one model"
        )
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def class_prototypes(embeddings: Tensor, labels: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean embedding of each class, as in prototypical networks (Snell et al. 2017, eq. 1).

    The mean is *not* normalised again: its length says how tight the class is.

    Args:
        embeddings: [N, d].
        labels: integers ≥ 0 [N].

    Returns:
        The labels that occur, ascending [C], and their prototypes [C, d].

    Example:
        >>> labels, prototypes = class_prototypes(torch.tensor([[0.0], [2.0], [5.0]]), [1, 1, 4])
        >>> labels.tolist(), prototypes.tolist()
        ([1, 4], [[1.0], [5.0]])
    """
    embeddings = as_embeddings("embeddings", embeddings)
    labels = as_labels("labels", labels, len(embeddings))
    if not len(labels):
        raise ValueError("embeddings is empty: a prototype needs at least one embedding")
    present, inverse = torch.unique(labels, return_inverse=True)
    sums = torch.zeros(len(present), embeddings.shape[1], dtype=embeddings.dtype)
    sums.index_add_(0, inverse, embeddings)
    counts = torch.bincount(inverse, minlength=len(present)).to(embeddings.dtype)
    return present, sums / counts[:, None]


def nearest(query: Tensor, reference: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The `k` nearest rows of `reference` for each row of `query`, nearest first; ties keep the lower index.

    Args:
        query: [N, d].
        reference: [M, d].
        k: how many, ≥ 1; at most M (M − 1 with `exclude_self`).
        exclude_self: row i of `query` is row i of `reference` and does not count.

    Returns:
        Distances [N, k] and indices [N, k].
    """
    limit = len(reference) - int(exclude_self)
    if not 1 <= k <= limit:
        raise ValueError(
            f"k is {k}; with {len(reference)} reference embeddings it must be between 1 and {limit}"
        )
    distances, indices = [], []
    for start in range(0, len(query), 1024):
        block = euclidean(query[start : start + 1024], reference)
        if exclude_self:
            rows = torch.arange(len(block))
            block[rows, rows + start] = torch.inf
        value, index = torch.sort(block, dim=1, stable=True)
        distances.append(value[:, :k])
        indices.append(index[:, :k])
    if not distances:
        return query.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
    return torch.cat(distances), torch.cat(indices)


def vote(neighbours: Tensor, distances: Tensor, num_classes: int) -> Tensor:
    """Majority class among the nearest neighbours; equal counts go to the class with the nearer sum of
    distances.

    Args:
        neighbours: labels of the neighbours, nearest first [N, k].
        distances: their distances [N, k].
        num_classes: number of classes.

    Returns:
        int64 [N].

    Example:
        >>> distances = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
        >>> vote(torch.tensor([[2, 0, 0], [1, 2, 0]]), distances, 3).tolist()
        [0, 1]
    """
    count = torch.zeros(len(neighbours), num_classes, dtype=torch.float64)
    count.scatter_add_(1, neighbours, torch.ones_like(neighbours, dtype=torch.float64))
    total = torch.zeros_like(count).scatter_add_(1, neighbours, distances.to(torch.float64))
    mean = torch.where(count > 0, total / count.clamp_min(1), torch.inf)
    best = count == count.max(dim=1, keepdim=True).values
    return torch.where(best, mean, torch.inf).argmin(dim=1)


def retrieval_per_query(
    neighbour_labels: Tensor, query_labels: Tensor, relevant: Tensor
) -> dict[str, Tensor]:
    """P@1, R-precision and MAP@R of each query (Musgrave et al. 2020, §3.2).

    Args:
        neighbour_labels: labels of the neighbours, nearest first [N, k] with k ≥ max(relevant).
        query_labels: [N].
        relevant: R, the number of *other* items of the query's class in the reference [N]; 0 marks a lone
            query.

    Returns:
        The three scores by name [N] float64; NaN for lone queries, which count nowhere.

    Example:
        Hits [1, 0, 1] with R = 3 give (1 + 0 + 2/3) / 3.

        >>> scores = retrieval_per_query(torch.tensor([[7, 1, 7]]), torch.tensor([7]), torch.tensor([3]))
        >>> [round(float(value), 4) for value in scores.values()]
        [1.0, 0.6667, 0.5556]
    """
    if len(relevant) and neighbour_labels.shape[1] < int(relevant.max()):
        raise ValueError(
            f"neighbour_labels has {neighbour_labels.shape[1]} columns; R goes up to {int(relevant.max())}, "
            "so pass at least as many neighbours"
        )
    rank = torch.arange(1, neighbour_labels.shape[1] + 1, dtype=torch.float64)
    hit = (neighbour_labels == query_labels[:, None]).to(torch.float64)
    within = hit * (rank[None] <= relevant[:, None])
    lone = relevant == 0
    denominator = relevant.clamp_min(1).to(torch.float64)
    precision = torch.cumsum(within, dim=1) / rank
    scores = {
        "precision_at_1": hit[:, 0].clone(),
        "r_precision": within.sum(dim=1) / denominator,
        "mean_average_precision_at_r": (within * precision).sum(dim=1) / denominator,
    }
    for value in scores.values():
        value[lone] = torch.nan
    return scores


def retrieval(
    query: Tensor,
    query_labels: Tensor | Sequence[int],
    reference: Tensor | None = None,
    reference_labels: Tensor | Sequence[int] | None = None,
    *,
    macro: bool = False,
) -> dict[str, Any]:
    """P@1, R-precision and MAP@R through pytorch-metric-learning's `AccuracyCalculator`.

    Args:
        query: [N, d].
        query_labels: integers ≥ 0 [N].
        reference: [M, d]; None searches `query` itself, each item without itself.
        reference_labels: [M], with `reference`.
        macro: average the classes' averages instead of all queries.

    Returns:
        The three averages by name, `per_query` (name → float64 [N], NaN where lone) and `lone_labels`, the
        query classes without any other member in the reference, which are left out of the averages. An
        average over no query is NaN.

    Raises:
        ValueError: shapes or labels do not fit.
    """
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    query = as_embeddings("query", query)
    query_labels = as_labels("query_labels", query_labels, len(query))
    itself = reference is None
    if reference is None:
        reference, labels = query, query_labels
    else:
        if reference_labels is None:
            raise ValueError("reference_labels is missing: pass it together with reference")
        reference = as_embeddings("reference", reference)
        labels = as_labels("reference_labels", reference_labels, len(reference))
    if not len(query) or len(reference) - int(itself) < 1:
        raise ValueError(
            f"retrieval needs a query and a reference; got {len(query)} and {len(reference)} embeddings"
        )

    size = int(max(query_labels.max(), labels.max())) + 1
    relevant = torch.bincount(labels, minlength=size)[query_labels] - int(itself)
    k = max(1, int(relevant.max()))
    distances, indices = nearest(query, reference, k, exclude_self=itself)
    per_query = retrieval_per_query(labels[indices], query_labels, relevant)
    lone = sorted({int(label) for label in query_labels[relevant == 0]})
    if bool((relevant == 0).all()):
        averages: dict[str, float] = dict.fromkeys(RETRIEVAL, float("nan"))
    else:
        calculator = AccuracyCalculator(
            include=RETRIEVAL,
            avg_of_avgs=macro,
            k="max_bin_count",
            device=torch.device("cpu"),
            knn_func=lambda _query, count, _reference, _same: (distances[:, :count], indices[:, :count]),
            kmeans_func=kmeans_labels,
        )
        averages = calculator.get_accuracy(query, query_labels, reference, labels, ref_includes_query=itself)
    return {
        **{name: float(averages[name]) for name in RETRIEVAL},
        "per_query": {name: value.numpy() for name, value in per_query.items()},
        "lone_labels": lone,
    }


def kmeans_labels(embeddings: Tensor, clusters: int) -> Tensor:
    """k-means cluster of each row, with a fixed seed; the `kmeans_func` of an `AccuracyCalculator` without
    faiss.

    Args:
        embeddings: [N, d].
        clusters: number of clusters, 1…N.

    Returns:
        int64 [N].
    """
    from sklearn.cluster import KMeans

    rows = embeddings.detach().cpu().numpy()
    distinct = len(np.unique(rows, axis=0))
    model = KMeans(n_clusters=min(clusters, distinct), n_init=4, random_state=0)
    return torch.as_tensor(model.fit_predict(rows), dtype=torch.int64)


def clustering(embeddings: Tensor, labels: Tensor | Sequence[int]) -> dict[str, float]:
    """NMI and AMI between the classes and k-means clusters (as many clusters as classes).

    Args:
        embeddings: [N, d].
        labels: integers ≥ 0 [N].

    Returns:
        `nmi` and `ami`; both 1 for a perfect match, AMI about 0 for chance.
    """
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    embeddings = as_embeddings("embeddings", embeddings)
    labels = as_labels("labels", labels, len(embeddings))
    calculator = AccuracyCalculator(
        include=("NMI", "AMI"), device=torch.device("cpu"), knn_func=nearest, kmeans_func=kmeans_labels
    )
    scores = calculator.get_accuracy(embeddings, labels)
    return {"nmi": float(scores["NMI"]), "ami": float(scores["AMI"])}
