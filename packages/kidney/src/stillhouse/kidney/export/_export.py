"""Write an export, check that it computes what the student computes, then put it in its place."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.errors import ConfigError, DataError, MissingDependencyError, StillhouseError

from ..store import FinishedStudent
from ._module import OUTPUTS, ExportedStudent

FORMATS = ("torch", "onnx", "monai")
BATCHES = (1, 2, 5)
TOLERANCE = 1e-4  # absolute, on probabilities, distances in [0, 2] and unit embeddings in float32

Run = Callable[[Tensor], Sequence[Tensor]]


class ParityError(StillhouseError):
    """An export does not compute what the student computes; it was not kept."""


def export_student(
    student: FinishedStudent,
    format: str,
    folder: str | os.PathLike[str],
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Export a student and check the export against it on random images.

    | format | files | runs with |
    |---|---|---|
    | torch | student.pt2, student.json | torch alone (`torch.export.load`) |
    | onnx | student.onnx, student.json | any ONNX runtime |
    | monai | a MONAI bundle | torch and MONAI (`monai.bundle run`) |

    Args:
        student: a loaded artefact; exported on the CPU.
        format: one of `FORMATS`.
        folder: where the files go; made if need be. Files of an earlier export there are replaced.
        tolerance: largest absolute difference allowed in any output.
        seed: seed of the random images.

    Returns:
        JSON-able: `format`, `folder`, `files` (name → bytes), `parity`: one row a batch size with the largest
        difference of each output, and `tolerance`. The same stands in `export.json`.

    Raises:
        ConfigError: an unknown format.
        MissingDependencyError: a library of the format is not installed.
        ParityError: the export computes something else; nothing was written.
        DataError: the folder holds something else.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: allowed are {', '.join(FORMATS)}")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file; give a folder")
    module = ExportedStudent(dataclasses.replace(student, network=student.network.to("cpu"))).eval()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        run = _WRITERS[format](module, student, work)
        parity = check_parity(module, run, size=module.side, tolerance=tolerance, seed=seed)
        result = {"format": format, "folder": str(target), "tolerance": tolerance, "parity": parity}
        table = {**result, "folder": ".", **describe(module, student)}
        (work / "export.json").write_text(
            json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        files = {
            path.relative_to(work).as_posix(): path.stat().st_size
            for path in sorted(work.rglob("*"))
            if path.is_file()
        }
        _place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {**result, "files": files}


def check_parity(
    module: ExportedStudent,
    run: Run,
    *,
    size: int,
    tolerance: float,
    seed: int,
    batches: Sequence[int] = BATCHES,
) -> list[dict[str, float]]:
    """Compare an export with the module on random images of several batch sizes.

    Returns:
        For each batch size `batch` and the largest absolute difference of each output.

    Raises:
        ParityError: a difference is above the tolerance or not finite, a shape differs, or a probable class
            changes.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch in batches:
        images = torch.rand(batch, 3, size, size, generator=generator)
        with torch.inference_mode():
            wanted = module(images)
        got = run(images.clone())
        row: dict[str, float] = {"batch": batch}
        for name, ours, theirs in zip(OUTPUTS, wanted, got, strict=True):
            if tuple(ours.shape) != tuple(theirs.shape):
                raise ParityError(
                    f"{name}: the export gives the shape {tuple(theirs.shape)}, the student "
                    f"{tuple(ours.shape)}"
                )
            row[name] = float((ours - theirs).abs().max())
            if not row[name] <= tolerance:
                raise ParityError(
                    f"{name}: the export differs from the student by {row[name]:.2g} at batch size {batch}, "
                    f"more than "
                    f"{tolerance:.2g}; nothing was written"
                )
        rows.append(row)
    return rows


def describe(module: ExportedStudent, student: FinishedStudent) -> dict[str, Any]:
    """What a user of the export needs to know, as plain JSON types."""
    config, gallery = student.network.config, student.gallery
    return {
        "input": {
            "name": "images",
            "shape": ["batch", 3, module.side, module.side],
            "dtype": "float32",
            "range": [0, 1],
            "colour": "RGB",
            "prepare": (
                "cut the longer side to a centred square; resize to the input size, bilinear with "
                "antialiasing, "
                "rounded to 8 bits; divide by 255. Do not standardise: that is inside."
            ),
        },
        "outputs": {
            "probabilities": ["batch", len(gallery.classes)],
            "distance": ["batch"],
            "embedding": ["batch", config.dim],
        },
        "classes": list(gallery.classes),
        "temperature": gallery.temperature,
        "unknown_threshold": gallery.threshold,
        "unknown": gallery.calibration.statement,
        "crops": student.crops,
        "zoom": student.zoom,
        "student": {"kind": student.artifact.kind, "digest": student.artifact.digest},
    }


def _place(work: Path, target: Path) -> None:
    """Move what was written into the target, the table last, so that its presence means the rest is there."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == "export.json"):
        end = target / path.name
        if end.is_dir() and not end.is_symlink():
            shutil.rmtree(end)
        os.replace(path, end)


def export_program(module: ExportedStudent) -> torch.export.ExportedProgram:
    """torch.export with a free batch size."""
    batch = torch.export.Dim("batch", min=1, max=65_536)
    example = torch.rand(2, 3, module.side, module.side)
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


def _write_torch(module: ExportedStudent, student: FinishedStudent, work: Path) -> Run:
    path = work / "student.pt2"
    torch.export.save(export_program(module), path)
    loaded = torch.export.load(path).module()

    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return tuple(loaded(images))

    return run


def _write_onnx(module: ExportedStudent, student: FinishedStudent, work: Path) -> Run:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401, the exporter needs it
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX export needs {error.name or 'onnx'}, which is not installed: pip install "
            f"'stillhouse-kidney[onnx]'"
        ) from error
    path = work / "student.onnx"
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)  # it says that torchvision's operators are missing, which nobody asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter uses what torch itself deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            module,
            (torch.rand(2, 3, module.side, module.side),),
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65_536)},),
            external_data=False,
            verbose=False,
        )
    log.setLevel(level)
    if program is None:
        raise StillhouseError("the ONNX exporter returned nothing; upgrade torch and onnxscript")
    program.save(str(path), external_data=False)
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Sequence[Tensor]:
        values: Sequence[np.ndarray] = session.run(list(OUTPUTS), {"images": images.numpy()})
        return tuple(torch.from_numpy(value) for value in values)

    return run


def _write_monai(module: ExportedStudent, student: FinishedStudent, work: Path) -> Run:
    from ._monai import write_bundle

    return write_bundle(module, student, work)


_WRITERS: Mapping[str, Callable[[ExportedStudent, FinishedStudent, Path], Run]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
    "monai": _write_monai,
}
