"""A finished student as an artefact: weights, network settings, preprocessing and gallery in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.core.artifact import Artifact
from stillhouse.core.errors import DataError

from .gallery import Gallery, gallery_files, load_gallery

if TYPE_CHECKING:
    from .student import Student

KIND = "kidney.student"
NETWORK = "student.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStudent:
    """A student ready to identify stones.

    Attributes:
        network: the network, in evaluation mode.
        gallery: what it compares an image with.
        crops: crops of each image whose embeddings are averaged; 1 shrinks the whole image.
        zoom: side that images are resized to before they are cropped, in units of the input's; None: see
            `PatchDataset`.
        artifact: the folder it came from.
    """

    network: Student
    gallery: Gallery
    crops: int
    artifact: Artifact
    zoom: float | None = None


def save_student(
    folder: str | os.PathLike[str],
    network: Student,
    gallery: Gallery,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: str,
    crops: int = 1,
    zoom: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Artifact:
    """Write a student's artefact, atomically.

    Args:
        folder: where to; an artefact that lies there is replaced.
        network: the trained student.
        gallery: its gallery.
        config: the resolved configuration of the run.
        metrics: what was measured.
        card: Markdown for README.md.
        crops: crops of each image, as in `PatchDataset`; must be as in training.
        zoom: likewise.
        provenance: data, teacher, licences.
        files: further files, name → bytes or path.

    Returns:
        The artefact, of the kind "kidney.student", with `student.json` and the two gallery files beside the
        weights.
    """
    settings = {"network": asdict(network.config), "preprocessing": {"crops": crops, "zoom": zoom}}
    own: dict[str, bytes | Path] = {
        NETWORK: (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode(),
        **gallery_files(gallery),
    }
    return Artifact.save(
        folder,
        kind=KIND,
        tensors=network.state_dict(),
        config=config,
        metrics=metrics,
        card=card,
        provenance=provenance,
        files={**own, **dict(files or {})},
    )


def load_student(source: str | os.PathLike[str] | Artifact, *, device: str = "cpu") -> FinishedStudent:
    """Read a student's artefact.

    Args:
        source: its folder, or the artefact.
        device: where the network goes.

    Raises:
        DataError: there is no artefact, it is of another kind, or it is damaged.
    """
    from .student import StudentConfig, build_student

    artifact = (source if isinstance(source, Artifact) else Artifact.load(_find(Path(source)))).expect(KIND)
    path = artifact.file(NETWORK)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        network = build_student(StudentConfig(**settings["network"]))
        crops = settings["preprocessing"]["crops"]
        if type(crops) is not int or crops < 1:
            raise ValueError(f"crops is {crops!r}")
        zoom = settings["preprocessing"].get("zoom")
        if zoom is not None and not (isinstance(zoom, int | float) and zoom >= 1):
            raise ValueError(f"zoom is {zoom!r}")
        network.load_state_dict(artifact.tensors())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: does not describe the weights beside it ({reason}); train again") from error
    gallery = load_gallery(artifact)
    if gallery.embeddings.shape[1] != network.config.dim:
        raise DataError(
            f"{artifact.folder}: the gallery has {gallery.embeddings.shape[1]} dimensions and the student "
            f"{network.config.dim}; they are not of one training"
        )
    return FinishedStudent(
        network=network.to(device).eval(), gallery=gallery, crops=crops, artifact=artifact, zoom=zoom
    )


def _find(folder: Path) -> Path:
    """The artefact itself, or the one inside a run's folder."""
    inside = folder / "student"
    return (
        inside
        if not (folder / "artifact.json").is_file() and (inside / "artifact.json").is_file()
        else folder
    )
