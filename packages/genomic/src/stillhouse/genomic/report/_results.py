"""Everything that the report shows, as plain data that is saved with the run and read again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from stillhouse.core.report import read_results, write_results

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model in the tables.

    Attributes:
        name: what the report calls it, for example "HAD" or "reconstruct only".
        role: which part it plays; the headline compares the student with the teacher and the ablations.
        parameters: of the encoder that answers, without what is used in training alone; None where unknown.
        note: what a reader needs to know, for example how a row was trained.
    """

    name: str
    role: Literal["teacher", "student", "ablation", "peer", "baseline"]
    parameters: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One task of the evaluation.

    Attributes:
        name: for example "donor, hard decoys".
        metric: what the scores are, with its convention, for example "mcc (plain)".
        classes: class names.
        train: windows that the probe or head was fitted on.
        test: windows that it was scored on.
        groups: how many independent groups (genes, records) the test windows come from; None where unknown.
        chance: the score of a guess; None where unknown.
        note: how the windows were chosen.
    """

    name: str
    metric: str
    classes: Sequence[str] = ()
    train: int | None = None
    test: int | None = None
    groups: int | None = None
    chance: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenomicResults:
    """The results of a run.

    Attributes:
        data: what to call the corpus, for example "a simulated genome".
        simulated: whether the corpus was simulated; the report then says that scores say nothing about
            organisms.
        models: the rows of the tables, in their order; one has the role "student".
        tasks: the tasks, in their order.
        scores: model → task → {"estimate", "low", "high"} and, where there are several seeds, "seeds": [...],
            and further numbers of the same probe ("accuracy", "auroc": numbers or intervals).
        differences: rows {"difference", "task", "estimate", "low", "high"} of paired differences, for example
            "HAD − reconstruct only".
        finetuned: rows {"task", "metric", "estimate", "low", "high", "half_range", "seeds"} of fine-tuning.
        profiles: rows of `profile_rows`: size and latency, the teacher first.
        profile_note: on what the latency was measured.
        throughput: rows {"model", "bases_per_second", "parameters"}, the teacher first.
        embedding: tables of `embedding_points`, one a panel.
        consistency: model → {"cosine", "low", "high"}: agreement of the two strands' embeddings, mean over
            windows and its 95 % interval.
        logs: the trainer's logs, title → path relative to the run's folder.
        gradient_logs: title → path of logs whose terms `gradient_…` are norms of the gradient of each loss
            term; empty where they are in `logs` already or were not measured.
        parts: part of the split → {"tiles", "bases", "records"}.
        notes: sentences that a reader has to know.
        licences: rows {"what", "name", "licence"} of weights and data.
        card: the artefact's model card, Markdown.
        timings: what took how long: name → seconds.
        config: the resolved configuration, nested.
        command: the command line that made it.
        made: time, UTC, ISO 8601.
        seed: seed of the run.
        versions: library → version.
    """

    data: str
    simulated: bool
    models: Sequence[ModelRow]
    tasks: Sequence[TaskRow]
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]
    config: Mapping[str, Any]
    command: str
    made: str
    seed: int
    differences: Sequence[Mapping[str, Any]] = ()
    finetuned: Sequence[Mapping[str, Any]] = ()
    profiles: Sequence[Mapping[str, Any]] = ()
    profile_note: str = ""
    throughput: Sequence[Mapping[str, Any]] = ()
    embedding: Sequence[Mapping[str, Any]] = ()
    consistency: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    logs: Mapping[str, str] = field(default_factory=dict)
    gradient_logs: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    licences: Sequence[Mapping[str, str]] = ()
    card: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names, tasks = [row.name for row in self.models], [row.name for row in self.tasks]
        for what, found in (("models", names), ("tasks", tasks)):
            if len(set(found)) != len(found):
                raise ValueError(f"{what} has two rows of one name; names must differ")
        students = [row for row in self.models if row.role == "student"]
        if len(students) != 1:
            raise ValueError(f"models has {len(students)} rows with the role 'student'; it needs exactly one")
        for model, scored in self.scores.items():
            strange = [task for task in scored if task not in tasks]
            if model not in names or strange:
                raise ValueError(f"scores has {model!r}: {strange or 'not'} among models and tasks")

    def by_role(self, *roles: str) -> list[ModelRow]:
        """The rows of some roles, in order."""
        return [row for row in self.models if row.role in roles]

    @property
    def student(self) -> ModelRow:
        """The student's row."""
        return self.by_role("student")[0]


def save_results(results: GenomicResults, folder: str | os.PathLike[str]) -> Path:
    """Write `results.json` into a run's folder, atomically, and return its path.

    Raises:
        TypeError: something in the results is no plain data.
    """
    return write_results(results, folder, domain="genomic")


def load_results(folder: str | os.PathLike[str]) -> GenomicResults:
    """Read `results.json` of a run's folder.

    Raises:
        DataError: it is missing or not what `save_results` wrote.
    """
    return read_results(GenomicResults, folder, domain="genomic", convert=_rows)


def _rows(table: dict[str, Any]) -> None:
    table["models"] = [ModelRow(**row) for row in table["models"]]
    table["tasks"] = [TaskRow(**row) for row in table["tasks"]]


def embedding_points(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: Sequence[str],
    *,
    title: str = "",
    method: Literal["pca", "tsne"] = "pca",
    limit: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """A flat map of embeddings, for `GenomicResults.embedding`.

    Args:
        features: [N, d].
        labels: indices into `classes` [N].
        classes: class names.
        title: the panel's title, for example "HAD, regions".
        method: "pca", two principal components of the standardised features, or "tsne", which shows
            neighbourhoods and exaggerates clusters.
        limit: most points; more are thinned out at random.
        seed: seed of the thinning and of t-SNE.

    Returns:
        `title`, `method`, `points` [n][2], `labels` [n], `classes`, and `explained`: share of the variance in
        the two components, None for t-SNE.

    Raises:
        ValueError: fewer than 5 rows, or shapes that do not fit.
    """
    rows, marks = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if rows.ndim != 2 or marks.shape != rows.shape[:1] or len(rows) < 5:
        raise ValueError(f"features has shape {rows.shape} and labels {marks.shape}; give [N ≥ 5, d] and [N]")
    kept = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    rows = rows[kept] - rows[kept].mean(axis=0)
    spread = rows.std(axis=0)
    rows /= np.where(spread > 0, spread, 1.0)
    explained: float | None = None
    if method == "pca":
        from sklearn.decomposition import PCA

        projection = PCA(n_components=2, svd_solver="full").fit(rows)
        points = projection.transform(rows)
        explained = float(projection.explained_variance_ratio_.sum())
    elif method == "tsne":
        from sklearn.manifold import TSNE

        around = min(30.0, (len(rows) - 1) / 3)
        points = TSNE(n_components=2, perplexity=around, init="pca", random_state=seed).fit_transform(rows)
    else:
        raise ValueError(f"method is {method!r}; give 'pca' or 'tsne'")
    return {
        "title": title,
        "method": method,
        "points": np.asarray(points, dtype=np.float64).round(4).tolist(),
        "labels": marks[kept].tolist(),
        "classes": list(classes),
        "explained": explained,
    }
