"""The sections on what the student sees: the map, neighbours, new and unknown classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stillhouse.core.report import Report

from ._numbers import interval, is_inside
from ._results import KidneyResults


def add_embedding(report: Report, results: KidneyResults, folder: Path) -> None:
    """The map of embeddings and rows of nearest references."""
    if results.embedding is None and not results.retrieval:
        return
    section = report.section("What the student sees")
    if results.embedding is not None:
        from stillhouse.core.report.figures import embedding_map

        table = results.embedding
        section.figure(
            embedding_map(
                table["points"],
                np.asarray(table["labels"], dtype=int),
                table["classes"],
                prototypes=table["prototypes"],
            ),
            caption=(
                "Test images in the two principal components of the embedding "
                f"({100 * table['explained']:.0f}\u202f% of its variance); large marks are prototypes."
            ),
            alt=(
                f"Map of {len(table['points'])} test embeddings of {len(table['classes'])} classes, with "
                f"prototypes."
            ),
        )
    rows, missing = [], 0
    for row in results.retrieval:
        names = [row.image, *(n["image"] for n in row.neighbours)]
        if not all(is_inside(folder, name) for name in names):
            missing += 1
            continue
        verdict = "right" if row.predicted == row.label else f"taken for {row.predicted}"
        tiles = [(folder / row.image, f"{row.label} {row.view}: {verdict}", "query")]
        tiles += [
            (
                folder / n["image"],
                f"{n['label']} {n['view']}, {n['distance']:.2f}",
                "hit" if n["label"] == row.label else "miss",
            )
            for n in row.neighbours
        ]
        rows.append(tiles)
    if rows:
        section.images(
            rows,
            caption=(
                "Test images, answered rightly and wrongly, with their nearest references and distances. The "
                "answer is the class of the nearest prototype, which need not be that of the nearest "
                "references."
            ),
        )
    if missing:
        section.text(
            f"{missing} rows of pictures are left out: their files are no longer in the run’s folder."
        )


def add_new_classes(report: Report, results: KidneyResults) -> None:
    """Few-shot accuracy on held-out classes and the detection of unknown ones."""
    section = report.section("New and unknown classes")
    if results.new_class:
        some = next(iter(results.new_class.values()))
        section.text(
            f"Held out of training: {', '.join(results.new_classes)}. A new class is learnt from "
            f"{some['shots']} images by adding its "
            f"prototype; the questions come from other stones, over {some['episodes']} draws. Chance is "
            f"{100 * some['chance']:.0f}\u202f%."
        )
        section.table(
            [
                {
                    "model": name,
                    "among new classes": interval(value["accuracy"]),
                    "nearest image": interval(value["precision_at_1"]),
                    "among all classes": interval(value.get("accuracy_among_all")),
                }
                for name, value in results.new_class.items()
            ],
            best={"among new classes": "max", "nearest image": "max", "among all classes": "max"},
            formats=dict.fromkeys(("among new classes", "nearest image", "among all classes"), ".3f"),
            caption=(
                "By the nearest prototype among the new classes alone, by the nearest of the few images, and "
                "by the nearest prototype of new and known classes together."
            ),
        )
    if results.unknown:
        section.table(
            [
                {
                    "model": name,
                    "AUROC": interval(value["auroc"]),
                    "known called unknown": value["false_unknown_rate"],
                    "unknown found": value["detected_rate"],
                    "known called unknown where 95 % are found": value["fpr_at_95_tpr"],
                }
                for name, value in results.unknown.items()
            ],
            best={"AUROC": "max"},
            formats={
                "AUROC": ".3f",
                "known called unknown": "percent",
                "unknown found": "percent",
                "known called unknown where 95 % are found": "percent",
            },
            caption=(
                "Telling images of held-out classes by their distance to the nearest prototype; rates at "
                "the gallery’s threshold."
            ),
        )
    if not results.new_class and not results.unknown:
        section.text("No class was held out of this training, so neither was measured.")
    if results.calibration.get("statement"):
        section.text(str(results.calibration["statement"]))
