"""A gallery on disk: two files inside a student's artefact, or an artefact of its own. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.artifact import Artifact
from stillhouse.core.errors import DataError

from ..metrics._check import as_embeddings, as_labels
from ._calibrate import Calibration
from ._gallery import Gallery, HeldOut

KIND = "kidney.gallery"
TENSORS, TABLE = "gallery.safetensors", "gallery.json"
_FORMAT, _SCHEMA = "stillhouse-kidney-gallery", 1
_COLLECTED = ("created", "command", "python", "platform", "libraries", "git")
_REMEDY = "copy the artefact again from its source, or train again"


def gallery_files(gallery: Gallery) -> dict[str, bytes]:
    """The two files that hold a gallery, for `Artifact.save(files=…)`.

    Returns:
        "gallery.safetensors" and "gallery.json" → content.
    """
    from safetensors.torch import save

    tensors, table = _pack(gallery)
    return {
        TENSORS: save({name: value.contiguous() for name, value in tensors.items()}),
        TABLE: (
            json.dumps(table, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"
        ).encode(),
    }


def save_gallery(gallery: Gallery, folder: str | os.PathLike[str]) -> Path:
    """Write a gallery as a folder of its own, atomically and with checksums.

    Args:
        gallery: what to save.
        folder: the folder; a gallery that lies there is replaced, anything else is refused.

    Returns:
        The folder.
    """
    tensors, table = _pack(gallery)
    counts = "\n".join(
        f"| {name} | {images} | {stones} |" for name, (images, stones) in gallery.counts.items()
    )
    head = "| class | images | stones |\n|---|---:|---:|"
    card = f"# Gallery of {len(gallery.classes)} kidney-stone classes\n\n{head}\n{counts}\n"
    card += f"\n{gallery.calibration.statement}\n"
    saved = Artifact.save(folder, kind=KIND, tensors=tensors, config=table, metrics={}, card=card)
    return saved.folder


def load_gallery(source: str | os.PathLike[str] | Artifact) -> Gallery:
    """Read a gallery from its own folder, or from the artefact of a student that holds one.

    Raises:
        DataError: there is none, or it is damaged; the message names the file and the remedy.
    """
    artifact = source if isinstance(source, Artifact) else Artifact.load(source)
    if artifact.kind == KIND:
        return _unpack(artifact.tensors(), artifact.config, artifact.folder)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, table_path = artifact.file(TENSORS), artifact.file(TABLE)
    try:
        tensors = load_file(path)
        table = json.loads(table_path.read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a gallery ({error}); {_REMEDY}") from error
    return _unpack(tensors, table, path)


def replace_gallery(artifact: Artifact, gallery: Gallery, *, change: str) -> Artifact:
    """Write a student's artefact again with another gallery; the weights stay as they are.

    Args:
        artifact: the student, loaded.
        gallery: its new gallery.
        change: what was done, for the provenance, for example "added the class CYS from 10 images".

    Returns:
        The artefact, read back and verified. How the student was made stays under "trained" in its
        provenance.
    """
    own = {
        "artifact.json",
        "model.safetensors",
        "config.json",
        "metrics.json",
        "provenance.json",
        "README.md",
    }
    files: dict[str, bytes | Path] = {
        name: artifact.file(name).read_bytes()
        for name in artifact.sizes
        if name not in {*own, TENSORS, TABLE}
    }
    files.update(gallery_files(gallery))
    facts = dict(artifact.provenance)
    collected = {key: facts.pop(key) for key in _COLLECTED if key in facts}
    facts.setdefault("trained", collected)
    facts["gallery_changes"] = [*facts.get("gallery_changes", []), change]
    card = artifact.card.split("\n## Contents\n\nA Stillhouse artefact of kind")[0].split(
        "\n## Licences and terms\n"
    )[0]
    return Artifact.save(
        artifact.folder,
        kind=artifact.kind,
        tensors=artifact.tensors(),
        config=artifact.config,
        metrics=artifact.metrics,
        card=card,
        provenance=facts,
        files=files,
    )


def _pack(gallery: Gallery) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"embeddings": gallery.embeddings, "labels": gallery.labels}
    if gallery.thumbnails is not None:
        tensors["thumbnails"] = gallery.thumbnails
    held = gallery.held_out
    if held is not None:
        tensors |= {"held_out.embeddings": held.embeddings, "held_out.labels": held.labels}
    table = {
        "format": _FORMAT,
        "schema": _SCHEMA,
        "classes": list(gallery.classes),
        "stones": list(gallery.stones),
        "views": list(gallery.views),
        "names": list(gallery.names),
        "calibration": {**asdict(gallery.calibration), "left_out": list(gallery.calibration.left_out)},
        "held_out": None if held is None else {"stones": list(held.stones), "views": list(held.views)},
        "added": list(gallery.added),
        "guessed": list(gallery.guessed),
    }
    return tensors, table


def _unpack(tensors: Mapping[str, Tensor], table: Mapping[str, Any], where: Path) -> Gallery:
    if table.get("format") != _FORMAT:
        raise DataError(f"{where}: is not a gallery; give the folder of a trained student")
    if table.get("schema") != _SCHEMA:
        raise DataError(
            f"{where}: has schema {table.get('schema')!r}, this version reads {_SCHEMA}; upgrade "
            f"stillhouse-kidney"
        )
    try:
        embeddings = as_embeddings("embeddings", tensors["embeddings"])
        count = len(embeddings)
        labels = as_labels("labels", tensors["labels"], count)
        texts = {key: _texts(table, key, count) for key in ("stones", "views", "names")}
        classes = _texts(table, "classes", int(labels.max()) + 1)
        if len(set(labels.tolist())) != len(classes):
            raise ValueError("a class has no reference")
        held = None
        if table["held_out"] is not None:
            other = as_embeddings("held_out.embeddings", tensors["held_out.embeddings"])
            held = HeldOut(
                embeddings=other,
                labels=as_labels("held_out.labels", tensors["held_out.labels"], len(other)),
                stones=_texts(table["held_out"], "stones", len(other)),
                views=_texts(table["held_out"], "views", len(other)),
            )
        thumbnails = tensors.get("thumbnails")
        if thumbnails is not None and (thumbnails.dtype != torch.uint8 or len(thumbnails) != count):
            raise ValueError("thumbnails do not fit the references")
        calibration = dict(table["calibration"])
        return Gallery(
            classes=classes,
            embeddings=embeddings,
            labels=labels,
            stones=texts["stones"],
            views=texts["views"],
            names=texts["names"],
            thumbnails=thumbnails,
            calibration=Calibration(**{**calibration, "left_out": tuple(calibration["left_out"])}),
            held_out=held,
            added=_texts(table, "added"),
            guessed=_texts(table, "guessed"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the gallery is damaged ({error}); {_REMEDY}") from error


def _texts(table: Mapping[str, Any], key: str, count: int | None = None) -> tuple[str, ...]:
    values = table[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} is no list of names")
    if count is not None and len(values) != count:
        raise ValueError(f"{key} has {len(values)} names where {count} belong")
    return tuple(values)
