"""KITTI and SemanticKITTI files: sweeps, labels, poses and calibration; everything is little-endian."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from stillhouse.core.errors import DataError

from ._scan import Scan

FARTHEST = 10_000.0  # metres; no LiDAR on a car sees as far, bytes in the wrong order do
_LARGEST_LABEL = 259  # semantic ids of SemanticKITTI


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; a file that cannot be read is a `DataError`."""
    try:
        return path.read_bytes()
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder, not a file; name a file in it") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist; check the path") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check the path and its rights"
        ) from error


def nonfinite_rows(points: np.ndarray) -> np.ndarray:
    """Return a mask bool [N] of the rows of points [N, C] that hold NaN or Inf."""
    return ~np.isfinite(points).all(axis=1)


def check_points(path: Path, points: np.ndarray, drop_invalid: bool) -> np.ndarray:
    """Return a mask bool [N] of the rows of points [N, C] to keep.

    Raises:
        DataError: no points, NaN or Inf among them (unless they are to be dropped), impossible coordinates.
    """
    if len(points) == 0:
        raise DataError(f"{path}: holds no points; give a sweep with at least one")
    bad = nonfinite_rows(points)
    if bad.all():
        raise DataError(f"{path}: every point holds NaN or Inf; the file is damaged")
    farthest = float(np.abs(points[~bad, :3]).max())
    if farthest > FARTHEST:
        raise DataError(
            f"{path}: has a coordinate of {farthest:.3g} m, more than {FARTHEST:,.0f} m; expected metres as "
            "little-endian float32 in the sensor's frame (wrong format, unit or byte order?)"
        )
    if bad.any() and not drop_invalid:
        raise DataError(
            f"{path}: {int(bad.sum()):,} of {len(bad):,} points hold NaN or Inf (the first is number "
            f"{int(bad.argmax())}); remove them, or read with drop_invalid=True"
        )
    return ~bad


def read_bin(path: str | os.PathLike[str], *, columns: int = 4, drop_invalid: bool = False) -> Scan:
    """Read a sweep of float32 rows without header.

    Args:
        path: the file. KITTI: rows of 4, x y z remission; nuScenes `.pcd.bin`: rows of 5, the fifth is the
            ring. A remission above 1 (nuScenes: 0 to 255) is divided by 255.
        columns: floats in a row, 4 or 5.
        drop_invalid: leave out rows with NaN or Inf instead of refusing the file.

    Raises:
        DataError: cannot be read, a size that is no multiple of the row, no points, NaN or Inf, coordinates
            that no sensor gives.
    """
    if columns not in (4, 5):
        raise ValueError(f"columns: {columns} is not allowed; 4 (KITTI) or 5 (nuScenes)")
    path = Path(path)
    raw = read_bytes(path)
    row = 4 * columns
    if len(raw) % row:
        raise DataError(
            f"{path}: {len(raw):,} bytes are no multiple of {row} ({columns} float32 a point); the file is "
            "cut off or has another format"
        )
    values = np.frombuffer(raw, dtype="<f4").reshape(-1, columns)
    keep = check_points(path, values[:, :4], drop_invalid)
    values = values[keep]
    remission = values[:, 3].astype(np.float32)
    if remission.max(initial=0.0) > 1.0:
        remission = remission / np.float32(255.0)
    return Scan(values[:, :3].astype(np.float32), remission, None, path.name.split(".")[0])


def read_labels(path: str | os.PathLike[str], *, count: int | None = None) -> np.ndarray:
    """Read the semantic ids of a SemanticKITTI `.label` file: the low 16 of 32 bits.

    Args:
        path: the file.
        count: number of points of the sweep that it belongs to; None does not check.

    Returns:
        int32 [N], 0 to 259.

    Raises:
        DataError: cannot be read, a size that is no multiple of 4, another number than `count`, ids that
            SemanticKITTI does not have.
    """
    path = Path(path)
    raw = read_bytes(path)
    if len(raw) % 4:
        raise DataError(
            f"{path}: {len(raw):,} bytes are no multiple of 4 (one uint32 a point); it is cut off"
        )
    words = np.frombuffer(raw, dtype="<u4")
    if count is not None and len(words) != count:
        raise DataError(
            f"{path}: has {len(words):,} labels for {count:,} points; give the labels of the same sweep"
        )
    semantic = (words & 0xFFFF).astype(np.int32)
    if len(semantic) and (
        semantic.max() > _LARGEST_LABEL or (not semantic.any() and bool((words >> 16 > 0xFF).any()))
    ):
        raise DataError(
            f"{path}: holds ids that SemanticKITTI does not have (0 to {_LARGEST_LABEL} in the low 16 bits "
            "of a little-endian uint32); wrong format or byte order"
        )
    return semantic


def read_calib(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the transform from the LiDAR to the left camera: the line `Tr:` of a KITTI odometry `calib.txt`.

    Returns:
        float64 [4, 4]. Other lines (`P0:` to `P3:`) need not be there.

    Raises:
        DataError: cannot be read, no `Tr:` line, not 12 numbers, not a rigid motion.
    """
    path = Path(path)
    for number, line in enumerate(_text(path).splitlines(), start=1):
        key, colon, rest = line.partition(":")
        if colon and key.strip() == "Tr":
            return _rigid(path, number, rest)
    raise DataError(f"{path}: has no line `Tr:` with 12 numbers (LiDAR to camera); give a KITTI calib.txt")


def read_poses(
    path: str | os.PathLike[str], calib: str | os.PathLike[str] | np.ndarray | None = None
) -> np.ndarray:
    """Read poses, one a line: 12 numbers, the row-major 3 × 4 matrix that moves a sweep into the first frame.

    KITTI gives them for the left camera; T_i = Tr⁻¹ · P_i · Tr turns them to the LiDAR.

    Args:
        path: the file.
        calib: `calib.txt`, or Tr as float64 [4, 4]; None takes the poses as they are.

    Returns:
        float64 [S, 4, 4].

    Raises:
        DataError: cannot be read, no poses, a line without 12 finite numbers, one that is no rigid motion.
    """
    path = Path(path)
    lines = _text(path).splitlines()
    poses = np.stack(
        [_rigid(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        or [np.zeros((4, 4))]
    )
    if not poses.any():
        raise DataError(f"{path}: holds no poses; expected 12 numbers a line, one line a sweep")
    if calib is None:
        return poses
    move = calib if isinstance(calib, np.ndarray) else read_calib(calib)
    if move.shape != (4, 4):
        raise ValueError(f"calib must be [4, 4], got {list(move.shape)}")
    return np.linalg.inv(move) @ poses @ move


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no text file; expected lines of numbers") from error


def _rigid(path: Path, number: int, line: str) -> np.ndarray:
    """The [4, 4] of one line of 12 numbers."""
    words = line.split()
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise DataError(f"{path}, line {number}: {line.strip()[:40]!r} is not 12 numbers") from error
    if len(values) != 12:
        raise DataError(f"{path}, line {number}: has {len(values)} numbers; a pose has 12 (row-major 3 × 4)")
    matrix = np.eye(4)
    matrix[:3] = np.reshape(values, (3, 4))
    rotation = matrix[:3, :3]
    if (
        not np.isfinite(matrix).all()
        or not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2)
        or np.linalg.det(rotation) < 0
    ):
        raise DataError(
            f"{path}, line {number}: is no rigid motion (its left 3 × 3 part must be a rotation); the file "
            "is damaged or has another order of numbers"
        )
    return matrix
