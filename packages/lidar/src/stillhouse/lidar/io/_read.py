"""`read_scan`: a sweep from whatever format its file has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from stillhouse.core.errors import DataError

from ._headers import Header, read_pcd_header, read_ply_header
from ._kitti import check_points, read_bin, read_labels
from ._open3d import import_open3d
from ._scan import Scan

SUFFIXES = (".bin", ".pcd.bin", ".ply", ".pcd")
_REMISSION = ("intensity", "remission", "reflectance", "scalar_intensity")


def read_scan(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    drop_invalid: bool = False,
) -> Scan:
    """Read one sweep, its format by the name: `.bin` (KITTI), `.pcd.bin` (nuScenes), `.ply` or `.pcd`.

    Args:
        path: the file.
        labels: the SemanticKITTI `.label` file of the same sweep.
        drop_invalid: leave out points with NaN or Inf instead of refusing the file. Organised `.pcd` files
            mark the rays without echo like that.

    Returns:
        Scan: remission where the file has it (for `.ply` and `.pcd` a field called intensity, remission,
        reflectance or scalar_intensity).

    Raises:
        DataError: an unknown format, a file that cannot be read or is cut off, no points, NaN or Inf,
            coordinates that no sensor gives, labels that do not match.
        MissingDependencyError: a `.ply` or `.pcd` file and no Open3D.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "000000.bin")
        ...     _ = path.write_bytes(np.array([[3, 4, 0, 0.5]], "<f4").tobytes())
        ...     read_scan(path).points.tolist()
        [[3.0, 4.0, 0.0]]
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(".bin"):
        if labels is not None and drop_invalid:
            return _labelled_bin(path, labels)
        scan = read_bin(path, columns=5 if name.endswith(".pcd.bin") else 4, drop_invalid=drop_invalid)
    elif name.endswith((".ply", ".pcd")):
        if labels is not None:
            raise DataError(f"{labels}: labels belong to .bin sweeps, {path.name} is none; leave them out")
        return _cloud(path, drop_invalid)
    else:
        raise DataError(f"{path}: has an unknown format; known are {', '.join(SUFFIXES)}")
    if labels is None:
        return scan
    return Scan(scan.points, scan.remission, read_labels(labels, count=len(scan)), scan.name)


def _labelled_bin(path: Path, labels: str | os.PathLike[str]) -> Scan:
    """Drop invalid points together with their labels."""
    columns = 5 if path.name.lower().endswith(".pcd.bin") else 4
    scan = read_bin(path, columns=columns, drop_invalid=True)
    values = np.fromfile(path, dtype="<f4").reshape(-1, columns)
    found = read_labels(labels, count=len(values))
    return Scan(scan.points, scan.remission, found[np.isfinite(values[:, :4]).all(axis=1)], scan.name)


def _cloud(path: Path, drop_invalid: bool) -> Scan:
    header = read_ply_header(path) if path.name.lower().endswith(".ply") else read_pcd_header(path)
    points, remission = _with_open3d(path, header)
    keep = check_points(path, points, drop_invalid)
    scan = Scan(points[keep], None if remission is None else remission[keep], None, path.stem)
    return scan


def _with_open3d(path: Path, header: Header) -> tuple[np.ndarray, np.ndarray | None]:
    """Points float32 [N, 3] and remission [N] of a file whose header has been checked."""
    open3d = import_open3d(f"reading {path.suffix} files")
    try:
        with open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error):
            cloud = open3d.t.io.read_point_cloud(
                str(path), remove_nan_points=False, remove_infinite_points=False
            )
    except (RuntimeError, ValueError) as error:  # a ValueError: bytes of a header that are no text
        raise DataError(f"{path}: cannot be read ({_first_line(error)}); the file is damaged") from error
    if "positions" not in cloud.point:
        raise DataError(f"{path}: is cut off or damaged; no points could be read")
    points = cloud.point.positions.numpy()
    if len(points) != header.count:
        raise DataError(f"{path}: declares {header.count:,} points and holds {len(points):,}; it is cut off")
    for name in _REMISSION:
        if name in cloud.point:
            remission = np.nan_to_num(cloud.point[name].numpy().astype(np.float32).reshape(len(points), -1))
            return points.astype(np.float32), remission[:, 0]
    return points.astype(np.float32), None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["unknown reason"])[-1].strip()
