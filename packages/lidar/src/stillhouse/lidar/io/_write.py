"""Writers: a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from stillhouse.core.errors import DataError
from stillhouse.core.files import replacing


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; it gets that name when the block ends without error.

    Missing folders are made.

    Raises:
        DataError: `path` is a folder, or nothing can be written there.
    """
    try:
        with replacing(path) as work, work.open("wb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error


def write_cloud(
    path: str | os.PathLike[str],
    points: np.ndarray,
    colours: np.ndarray | None = None,
    *,
    remission: np.ndarray | None = None,
) -> Path:
    """Write a point cloud as `.ply`, `.pcd` (both binary, little-endian) or KITTI `.bin`.

    Args:
        path: the file; its folder must exist.
        points: [N, 3], metres, finite, N ≥ 1.
        colours: [N, 3], uint8 or floating-point from 0 to 1; not for `.bin`.
        remission: [N]; the field `intensity` of `.ply` and `.pcd`, the fourth column of `.bin` (None: 0).

    Returns:
        The path.

    Raises:
        ValueError: wrong shapes, non-finite points, colours for `.bin`.
        DataError: an unknown format, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_cloud(Path(folder, "cloud.ply"), np.eye(3)).stat().st_size > 36
        True
    """
    path = Path(path)
    points = np.asarray(points, dtype=np.float32)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"points must be [N, 3] with N at least 1, got {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError("points hold NaN or Inf; remove those rows")
    columns: list[tuple[str, str, np.ndarray]] = [(name, "<f4", points[:, k]) for k, name in enumerate("xyz")]
    if remission is not None:
        values = np.asarray(remission, dtype=np.float32)
        if values.shape != (len(points),):
            raise ValueError(f"remission must be [{len(points)}], got {list(values.shape)}")
        columns.append(("intensity", "<f4", values))
    rgb = None if colours is None else _colours(colours, len(points))
    suffix = path.suffix.lower()
    if suffix == ".bin":
        if rgb is not None:
            raise ValueError("colours: .bin files have none; write .ply or .pcd, or leave them out")
        if remission is None:
            columns.append(("intensity", "<f4", np.zeros(len(points), np.float32)))
        header = b""
    elif suffix == ".ply":
        if rgb is not None:
            columns += [(name, "u1", rgb[:, k]) for k, name in enumerate(("red", "green", "blue"))]
        header = _ply_header(columns)
    elif suffix == ".pcd":
        if rgb is not None:
            wide = rgb.astype("<u4")
            packed = (wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2]).astype("<u4").view("<f4")
            columns.append(("rgb", "<f4", packed))
        header = _pcd_header(columns)
    else:
        raise DataError(f"{path}: has an unknown format; known are .ply, .pcd and .bin")
    table = np.empty(len(points), dtype=[(name, kind) for name, kind, _ in columns])
    for name, _, column in columns:
        table[name] = column
    with atomic_file(path) as file:
        file.write(header)
        file.write(table.tobytes())
    return path


def write_labels(path: str | os.PathLike[str], labels: np.ndarray) -> Path:
    """Write semantic ids int [N] (0 to 65535) as a SemanticKITTI `.label` file, instance 0."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be int [N], got {labels.dtype} {list(labels.shape)}")
    if len(labels) and (labels.min() < 0 or labels.max() > 0xFFFF):
        raise ValueError(f"labels must be 0 to 65535, got {labels.min()} to {labels.max()}")
    with atomic_file(path) as file:
        file.write(labels.astype("<u4").tobytes())
    return Path(path)


def write_poses(path: str | os.PathLike[str], poses: np.ndarray) -> Path:
    """Write poses [S, 4, 4] as KITTI's text, 12 numbers a line, with all digits of float64."""
    poses = np.asarray(poses, dtype=np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise ValueError(f"poses must be [S, 4, 4], got {list(poses.shape)}")
    lines = [" ".join(repr(float(value)) for value in pose[:3].ravel()) for pose in poses]
    with atomic_file(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return Path(path)


def _colours(colours: np.ndarray, count: int) -> np.ndarray:
    colours = np.asarray(colours)
    if colours.shape != (count, 3):
        raise ValueError(f"colours must be [{count}, 3], got {list(colours.shape)}")
    if colours.dtype == np.uint8:
        return colours
    if colours.dtype.kind != "f" or not (colours.min() >= 0 and colours.max() <= 1):
        raise ValueError("colours must be uint8, or floating-point from 0 to 1")
    return np.round(255 * colours).astype(np.uint8)


def _ply_header(columns: list[tuple[str, str, np.ndarray]]) -> bytes:
    kinds = {"<f4": "float", "u1": "uchar"}
    fields = "".join(f"property {kinds[kind]} {name}\n" for name, kind, _ in columns)
    count = len(columns[0][2])
    return f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\n{fields}end_header\n".encode()


def _pcd_header(columns: list[tuple[str, str, np.ndarray]]) -> bytes:
    count, width = len(columns[0][2]), len(columns)
    names = " ".join(name for name, _, _ in columns)
    lines = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        f"FIELDS {names}",
        "SIZE" + " 4" * width,
        "TYPE" + " F" * width,
        "COUNT" + " 1" * width,
        f"WIDTH {count}",
        "HEIGHT 1",
        "VIEWPOINT 0 0 0 1 0 0 0",
        f"POINTS {count}",
        "DATA binary",
    ]
    return ("\n".join(lines) + "\n").encode()
