"""Classification metrics under named conventions: the same word means different numbers in different papers.

| convention | histone, enhancer | promoter | splice | splice_all | gb | covid |
|---|---|---|---|---|---|---|
| `caduceus` | MCC | F1 of class 1 | F1 of class 1 | accuracy | accuracy | – |
| `hyenadna` | MCC | macro F1 | macro F1 | – | accuracy | – |
| `gue` | MCC | MCC | MCC | – | – | macro F1 |
| `plain` | MCC | MCC | MCC | MCC | MCC | MCC |

The columns are kinds of tasks: histone marks, enhancers, promoters and splice sites of the Nucleotide
Transformer benchmark, the Genomic Benchmarks (`gb`), and the variants of GUE (`covid`). A dash is a task that
the convention's repository does not score. `plain` is this package's own.

Sources: the data-set configurations of kuleshov-group/caduceus and HazyResearch/hyena-dna, and
finetune/train.py of MAGICS-LAB/DNABERT_2; macro F1 of `covid` is recalled, not read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from stillhouse.core.errors import ConfigError
from stillhouse.core.metrics import Interval, bootstrap_interval, seed_interval

Convention = Literal["caduceus", "hyenadna", "gue", "plain"]
Kind = Literal["histone", "enhancer", "promoter", "splice", "splice_all", "gb", "covid", "other"]
Average = Literal["binary", "macro", "weighted"]
KEYS = ("accuracy", "mcc", "f1_binary", "f1_macro", "f1_weighted", "auroc")

_F1: dict[str, str] = {
    "caduceus": "f1_binary",
    "hyenadna": "f1_macro",
    "gue": "f1_macro",
    "plain": "f1_macro",
}
_TABLE: dict[str, dict[str, str]] = {
    "caduceus": {
        "histone": "mcc",
        "enhancer": "mcc",
        "promoter": "f1_binary",
        "splice": "f1_binary",
        "splice_all": "accuracy",
        "gb": "accuracy",
    },
    "hyenadna": {
        "histone": "mcc",
        "enhancer": "mcc",
        "promoter": "f1_macro",
        "splice": "f1_macro",
        "gb": "accuracy",
    },
    "gue": {"histone": "mcc", "enhancer": "mcc", "promoter": "mcc", "splice": "mcc", "covid": "f1_macro"},
    "plain": dict.fromkeys(get_args(Kind), "mcc"),
}


def confusion(labels: npt.ArrayLike, predictions: npt.ArrayLike, classes: int) -> npt.NDArray[np.int64]:
    """Count true against predicted classes.

    Args:
        labels: [N] true classes, 0…classes − 1.
        predictions: [N] predicted classes.
        classes: number of classes C ≥ 2.

    Returns:
        [C, C], rows true, columns predicted.

    Raises:
        ValueError: the shapes differ, there is no item, or a class is out of range.

    Example:
        >>> confusion([0, 0, 1, 1], [0, 1, 1, 1], 2).tolist()
        [[1, 1], [0, 2]]
    """
    y, p = np.asarray(labels), np.asarray(predictions)
    if y.ndim != 1 or y.shape != p.shape or not len(y):
        raise ValueError(f"labels has shape {y.shape} and predictions {p.shape}; give [N] and [N], N ≥ 1")
    if min(y.min(), p.min()) < 0 or max(y.max(), p.max()) >= classes:
        raise ValueError(f"labels and predictions must lie in 0…{classes - 1} for {classes} classes")
    return np.bincount(y * classes + p, minlength=classes * classes).reshape(classes, classes)


def accuracy(counts: npt.NDArray[np.int64]) -> float:
    """Share of right answers, from a confusion matrix [C, C]."""
    return float(np.trace(counts) / counts.sum())


def mcc(counts: npt.NDArray[np.int64]) -> float:
    """Matthews' correlation coefficient, in [−1, 1], of any number of classes; 0 where it is undefined.

    Args:
        counts: [C, C] confusion matrix.

    Source: Gorodkin, Computational Biology and Chemistry 28 (2004) 367–374.

    Example:
        >>> mcc(np.array([[4, 1], [2, 3]])).__round__(4)
        0.4082
    """
    table = counts.astype(np.float64)
    true, predicted, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    across = np.trace(table) * total - true @ predicted
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float(across / np.sqrt(spread)) if spread > 0 else 0.0


def f1(counts: npt.NDArray[np.int64], average: Average = "binary") -> float:
    """F1, the harmonic mean of precision and recall; a class that is neither there nor predicted counts 0.

    Args:
        counts: [C, C] confusion matrix.
        average: "binary" is F1 of class 1 of two classes, "macro" the mean over the classes, "weighted" the
            mean by the true classes' sizes.

    Raises:
        ValueError: "binary" with other than two classes, or an unknown average.

    Example:
        >>> [round(f1(np.array([[4, 1], [2, 3]]), how), 4) for how in ("binary", "macro", "weighted")]
        [0.6667, 0.697, 0.697]
    """
    right = np.diag(counts).astype(np.float64)
    true, predicted = counts.sum(axis=1), counts.sum(axis=0)
    each = np.divide(2 * right, true + predicted, out=np.zeros_like(right), where=true + predicted > 0)
    if average == "binary":
        if len(counts) != 2:
            raise ValueError(f"F1 of class 1 needs two classes, not {len(counts)}; use macro or weighted")
        return float(each[1])
    if average == "macro":
        present = true + predicted > 0
        return float(each[present].mean())
    if average == "weighted":
        return float(each @ true / true.sum())
    raise ValueError(f"average is {average!r}; give binary, macro or weighted")


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that a random positive scores above a random negative.

    Args:
        labels: [N] classes.
        scores: [N] scores of class 1, or [N, C] scores of each class: then the mean over the classes that
            occur of one against the rest, for C = 2 the column of class 1.

    Returns:
        The area, in [0, 1]; 0.5 where only one class occurs.

    Example:
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    from scipy.stats import rankdata

    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if s.ndim == 2 and s.shape[1] == 2:
        s = s[:, 1]
    if s.ndim == 2:
        present = [c for c in range(s.shape[1]) if 0 < (y == c).sum() < len(y)]
        return float(np.mean([auroc(y == c, s[:, c]) for c in present])) if present else 0.5
    if y.ndim != 1 or y.shape != s.shape:
        raise ValueError(f"labels has shape {y.shape} and scores {s.shape}; give [N] and [N] or [N, C]")
    positive = y.astype(bool)
    count, rest = int(positive.sum()), int((~positive).sum())
    if not count or not rest:
        return 0.5
    ranks = rankdata(s)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric and whose definition it is.

    Attributes:
        key: one of `KEYS`.
        convention: whose choice it is.
        task: the kind of task it was chosen for.

    Example:
        >>> metric("auto", "caduceus", "promoter").label, metric("auto", "hyenadna", "promoter").label
        ('f1_binary (caduceus)', 'f1_macro (hyenadna)')
    """

    key: str
    convention: Convention
    task: str

    @property
    def label(self) -> str:
        """How tables name it, with the convention."""
        return f"{self.key} ({self.convention})"

    def __call__(
        self, labels: npt.ArrayLike, predictions: npt.ArrayLike, scores: npt.ArrayLike | None = None
    ) -> float:
        """Score predictions.

        Args:
            labels: [N] true classes.
            predictions: [N] predicted classes.
            scores: [N, C] probabilities; AUROC needs them, and they tell the number of classes.

        Raises:
            ValueError: shapes that do not fit, or AUROC without scores.
        """
        y, p = np.asarray(labels), np.asarray(predictions)
        if self.key == "auroc":
            if scores is None:
                raise ValueError("scores is None; AUROC needs them")
            return auroc(y, scores)
        classes = int(max(y.max(initial=1), p.max(initial=1))) + 1
        if scores is not None and np.asarray(scores).ndim == 2:
            classes = max(classes, np.asarray(scores).shape[1])
        return _from_counts(self.key, confusion(y, p, classes))


def metric(name: str = "auto", convention: str = "plain", task: str = "other") -> Metric:
    """Choose a metric under a convention.

    Args:
        name: "auto" takes the convention's metric for the kind of task; "f1" the convention's kind of F1;
            else one of `KEYS`.
        convention: "caduceus", "hyenadna", "gue" or "plain".
        task: the kind of task, see the table at the head of this module.

    Raises:
        ConfigError: an unknown name, or a kind of task that the convention does not score.
    """
    if convention not in get_args(Convention):
        raise ConfigError(
            f"convention {convention!r} is unknown; allowed are {', '.join(get_args(Convention))}"
        )
    if task not in get_args(Kind):
        raise ConfigError(f"kind of task {task!r} is unknown; allowed are {', '.join(get_args(Kind))}")
    chosen: Convention = convention  # type: ignore[assignment]
    if name == "auto":
        if task not in _TABLE[convention]:
            raise ConfigError(
                f"the convention {convention!r} does not score tasks of the kind {task!r}; it has "
                f"{', '.join(_TABLE[convention])}; name a metric, or take the convention plain"
            )
        return Metric(_TABLE[convention][task], chosen, task)
    if name == "f1":
        return Metric(_F1[convention], chosen, task)
    if name not in KEYS:
        raise ConfigError(f"metric {name!r} is unknown; allowed are auto, f1, {', '.join(KEYS)}")
    return Metric(name, chosen, task)


def _from_counts(key: str, counts: npt.NDArray[np.int64]) -> float:
    if key == "accuracy":
        return accuracy(counts)
    if key == "mcc":
        return mcc(counts)
    return f1(counts, key.removeprefix("f1_"))  # type: ignore[arg-type]


def score(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    keys: Sequence[str] = ("accuracy", "mcc", "auroc"),
    groups: npt.ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Score class probabilities, each metric with a bootstrap interval.

    Args:
        labels: [N] true classes.
        probabilities: [N, C]; the largest is the prediction.
        keys: which of `KEYS`.
        groups: [N] cluster of each item (gene, record); whole clusters are resampled. None: single items.
        resamples: bootstrap samples, ≥ 100.
        level: coverage.
        seed: seed of the resampling.

    Returns:
        key → interval.

    Raises:
        ValueError: shapes that do not fit, or fewer than two groups.
    """
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or y.shape != p.shape[:1]:
        raise ValueError(f"labels has shape {y.shape} and probabilities {p.shape}; give [N] and [N, C]")
    classes = p.shape[1]
    table = np.column_stack([y, p.argmax(axis=1), p])

    def statistic(key: str, rows: npt.NDArray[Any]) -> float:
        if key == "auroc":
            return auroc(rows[:, 0], rows[:, 2:])
        return _from_counts(key, confusion(rows[:, 0].astype(int), rows[:, 1].astype(int), classes))

    found = {}
    for key in keys:
        if key not in KEYS:
            raise ValueError(f"keys has {key!r}; allowed are {', '.join(KEYS)}")
        found[key] = bootstrap_interval(
            table,
            statistic=lambda rows, key=key: statistic(key, rows),  # type: ignore[misc]
            groups=groups,
            resamples=resamples,
            level=level,
            seed=seed,
        )
    return found


def over_seeds(values: Sequence[float], *, level: float = 0.95) -> dict[str, Any]:
    """Summarise a metric over trainings that differ by their seed.

    Returns:
        `mean`; `half_range` = (max − min)/2, which Caduceus' tables print after ± (recalled, not read there);
        `low` and `high` of Student's t interval of the mean, None for one training; `values`.

    Example:
        >>> over_seeds([0.80, 0.82, 0.84])["half_range"].__round__(3)
        0.02
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise ValueError(f"values is {values!r}; give at least one finite number")
    around = seed_interval(data, level=level) if len(data) > 1 else None
    return {
        "mean": float(data.mean()),
        "half_range": float((data.max() - data.min()) / 2),
        "low": None if around is None else around.low,
        "high": None if around is None else around.high,
        "values": [float(value) for value in data],
    }
