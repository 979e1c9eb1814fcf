"""Everything that the report shows, as plain data that is saved with the run and read again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.report import read_results, write_results

if TYPE_CHECKING:
    from ..data import Collection
    from ..data.leakage import LeakageReport
    from ..gallery import Gallery


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model in the tables.

    Attributes:
        name: what the report calls it, for example "student", "student without distillation".
        role: which part it plays; the headline compares the student with the teacher and the baselines.
        scores: what `evaluate_embeddings` returned on the test part.
        note: what a reader needs to know, for example how a baseline was trained.
    """

    name: str
    role: Literal["teacher", "student", "baseline"]
    scores: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieved:
    """A test image and its nearest references.

    Attributes:
        image: picture of the query, relative to the run's folder.
        label: its true class.
        view: its view.
        predicted: the class it was given, "unknown" past the threshold.
        neighbours: for each the keys `image`, `label`, `view`, `stone`, `distance`.
    """

    image: str
    label: str
    view: str
    predicted: str
    neighbours: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KidneyResults:
    """The results of a run.

    Attributes:
        data: what to call the data, for example "simulated stones".
        simulated: whether the images were simulated; the report then says that scores say nothing about
            patients.
        models: teacher, student and baselines, in the order of the tables; one has the role "student".
        differences: sentence → interval {estimate, low, high} of a paired difference in accuracy, for example
            "student − student without distillation", of `accuracy_difference`.
        seeds: model → accuracy in each of several trainings that differ by seed alone; empty with one
            training.
        new_class: model → what `kshot_new_class` returned; empty where no class was held out.
        new_classes: the classes that were held out of training.
        unknown: model → what `unknown_detection` returned; empty where no class was held out.
        calibration: the gallery's calibration as a dictionary (threshold, rate, statement, …).
        gallery: class → [images, stones] of the references.
        embedding: `embedding_points` of the student: points [[x, y]], labels, classes, prototypes, explained;
            None leaves the map out.
        retrieval: query images with their neighbours, of `save_retrieval`.
        profiles: rows of `profile_rows`: size and latency, the teacher first.
        profile_note: on what the latency was measured: device, threads, batch.
        parts: part of the split → class → view → number of images (`Collection.counts()`).
        stones: part of the split → number of stones; empty where stones are not known.
        split: "stone", "patch" or "given".
        notes: sentences of the collection that a reader has to know.
        leakage: `leakage_table` of what `check_leakage` found; None where it was not checked.
        split_gap: protocol → accuracy {estimate, low, high} of the same student under a stone-level and a
            patch-level split; empty where only one was run.
        log: the trainer's logs, title → path relative to the run's folder.
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
    calibration: Mapping[str, Any]
    gallery: Mapping[str, Sequence[int]]
    parts: Mapping[str, Mapping[str, Mapping[str, int]]]
    split: str
    config: Mapping[str, Any]
    command: str
    made: str
    seed: int
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    new_class: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    new_classes: Sequence[str] = ()
    unknown: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    embedding: Mapping[str, Any] | None = None
    retrieval: Sequence[Retrieved] = ()
    profiles: Sequence[Mapping[str, Any]] = ()
    profile_note: str = ""
    stones: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    leakage: Mapping[str, Any] | None = None
    split_gap: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    log: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        students = [row.name for row in self.models if row.role == "student"]
        if len(students) != 1:
            raise ValueError(f"models has {len(students)} rows with the role 'student'; it needs exactly one")
        if len({row.name for row in self.models}) != len(self.models):
            raise ValueError("models has two rows of one name; names must differ")

    def by_role(self, role: str) -> list[ModelRow]:
        """The rows of one role, in order."""
        return [row for row in self.models if row.role == role]

    @property
    def student(self) -> ModelRow:
        """The student's row."""
        return self.by_role("student")[0]


def save_results(results: KidneyResults, folder: str | os.PathLike[str]) -> Path:
    """Write `results.json` into a run's folder, atomically, and return its path.

    Raises:
        TypeError: something in the results is no plain data.
    """
    return write_results(results, folder, domain="kidney")


def load_results(folder: str | os.PathLike[str]) -> KidneyResults:
    """Read `results.json` of a run's folder.

    Raises:
        DataError: it is missing or not what `save_results` wrote.
    """
    return read_results(KidneyResults, folder, domain="kidney", convert=_rows)


def _rows(table: dict[str, Any]) -> None:
    table["models"] = [ModelRow(**row) for row in table["models"]]
    table["retrieval"] = [Retrieved(**row) for row in table.get("retrieval", [])]


def leakage_table(report: LeakageReport) -> dict[str, Any]:
    """What `check_leakage` found, as plain data for `KidneyResults.leakage`."""
    return {
        "ok": report.ok,
        "stones_known": report.stone_known,
        "shared_stones": list(report.shared_stones),
        "duplicate_images": [f"{d.train_name} and {d.test_name} ({d.kind})" for d in report.duplicates],
        "pairs_compared": report.pairs,
    }


def embedding_points(
    embeddings: Tensor, labels: Tensor | Sequence[int], gallery: Gallery, *, limit: int = 1500, seed: int = 0
) -> dict[str, Any]:
    """A flat map of embeddings: their two principal components, with the prototypes projected the same way.

    A linear projection keeps straight lines and can place prototypes; it does not exaggerate clusters as
    t-SNE does.

    Args:
        embeddings: [N, d].
        labels: indices into the gallery's classes, −1 for other classes [N].
        gallery: its prototypes and class names.
        limit: most points; more are thinned out at random.
        seed: seed of the thinning.

    Returns:
        `points` [n][2], `labels` [n], `classes`, `prototypes` [C][2], `explained`: share of the variance in
        the two components.
    """
    from sklearn.decomposition import PCA

    rows = embeddings.detach().cpu().double().numpy()
    marks = np.asarray(torch.as_tensor(labels).cpu())
    if len(rows) < 3:
        raise ValueError(f"embeddings has {len(rows)} rows; a map needs at least 3")
    kept = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    projection = PCA(n_components=2, svd_solver="full").fit(rows[kept])
    return {
        "points": projection.transform(rows[kept]).round(5).tolist(),
        "labels": marks[kept].tolist(),
        "classes": list(gallery.classes),
        "prototypes": projection.transform(gallery.prototypes.double().numpy()).round(5).tolist(),
        "explained": float(projection.explained_variance_ratio_.sum()),
    }


def save_retrieval(
    collection: Collection,
    embeddings: Tensor,
    gallery: Gallery,
    folder: str | os.PathLike[str],
    *,
    count: int = 6,
    k: int = 5,
    side: int = 128,
    seed: int = 0,
) -> list[Retrieved]:
    """Choose some test images, at random but of different classes, wrong ones included, and save them with
    their nearest references.

    Half of the rows, where there are as many, are images that were given a wrong class or called unknown: a
    reader should see how it fails, not only that it works.

    Args:
        collection: N labelled test images.
        embeddings: theirs [N, d].
        gallery: with thumbnails.
        folder: the run's folder; pictures go to `images/`.
        count: rows.
        k: neighbours a row.
        side: side of the query pictures, pixels.
        seed: seed of the choice.

    Returns:
        Rows for `KidneyResults.retrieval`.

    Raises:
        ValueError: the gallery has no thumbnails, or the lengths differ.
    """
    from PIL import Image

    from ..data import resize_square

    if gallery.thumbnails is None:
        raise ValueError("the gallery has no thumbnails; build it with thumbnails=…")
    if len(collection) != len(embeddings):
        raise ValueError(f"embeddings has {len(embeddings)} rows for {len(collection)} images")
    found = gallery.match(embeddings, k=k)
    predicted = [
        "unknown" if bool(unknown) else gallery.classes[int(c)]
        for c, unknown in zip(found.nearest_class, found.unknown, strict=True)
    ]
    chosen = _choose([item.label for item in collection.items], predicted, count, seed)
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, at in enumerate(chosen):
        item, neighbours = collection.items[at], []
        query = f"images/query-{place}.png"
        Image.fromarray(resize_square(item.load(), side)).save(Path(folder) / query)
        for reference, distance in zip(
            found.neighbours[at].tolist(), found.neighbour_distances[at].tolist(), strict=True
        ):
            name = f"images/reference-{reference}.png"
            if not (Path(folder) / name).exists():
                Image.fromarray(gallery.thumbnails[reference].numpy()).save(Path(folder) / name)
            neighbours.append(
                {
                    "image": name,
                    "label": gallery.classes[int(gallery.labels[reference])],
                    "view": gallery.views[reference],
                    "stone": gallery.stones[reference],
                    "distance": distance,
                }
            )
        rows.append(
            Retrieved(
                image=query, label=item.label, view=item.view, predicted=predicted[at], neighbours=neighbours
            )
        )
    return rows


def _choose(labels: Sequence[str], predicted: Sequence[str], count: int, seed: int) -> list[int]:
    """Rows of different classes in turn, up to half of them wrong, right ones first."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    wrong = _spread([i for i in order if labels[i] != predicted[i]], labels)[: count // 2]
    right = _spread([i for i in order if labels[i] == predicted[i]], labels)[: count - len(wrong)]
    return right + wrong


def _spread(rows: Sequence[int], labels: Sequence[str]) -> list[int]:
    seen: dict[str, int] = {}
    ranked = []
    for row in rows:
        seen[labels[row]] = seen.get(labels[row], 0) + 1
        ranked.append((seen[labels[row]], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
