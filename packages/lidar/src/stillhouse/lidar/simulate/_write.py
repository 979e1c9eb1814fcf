"""Simulated drives as files of SemanticKITTI's layout."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from stillhouse.core.errors import DataError

from ..io import ScanSource, write_cloud, write_labels, write_poses

_TR = np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]])  # LiDAR to camera
_NOTE = (
    "A simulated drive, ray-cast by stillhouse-lidar. It is for trying the software and holds no road data.\n"
)


def write_kitti(sequence: ScanSource, folder: str | os.PathLike[str]) -> Path:
    """Write a drive as `velodyne/`, `labels/`, `poses.txt`, `calib.txt`, and `map.npy` where it has a map.

    The poses are the camera's, as in KITTI; with `calib.txt` they become the sensor's again. The folder
    appears in one step when it is complete.

    Args:
        sequence: a `SimulatedSequence`, or any other source of sweeps with poses.
        folder: folder to make; must not exist or be empty.

    Returns:
        The folder.

    Raises:
        DataError: the folder is not empty or cannot be written.
        ValueError: the drive has no poses.
    """
    target = Path(folder)
    if sequence.poses is None:
        raise ValueError(f"sequence: {sequence.name} has no poses; KITTI's layout needs them")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists and is not empty; give another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror}); give another folder") from error
    try:
        os.chmod(work, 0o755)
        (work / "velodyne").mkdir()
        for index in range(len(sequence)):
            scan = sequence[index]
            write_cloud(work / "velodyne" / f"{index:06d}.bin", scan.points, remission=scan.remission)
            if scan.labels is not None:
                (work / "labels").mkdir(exist_ok=True)
                write_labels(work / "labels" / f"{index:06d}.label", scan.labels)
        write_poses(work / "poses.txt", _TR @ sequence.poses @ np.linalg.inv(_TR))
        numbers = " ".join(repr(float(value)) for value in _TR[:3].ravel())
        (work / "calib.txt").write_text(f"Tr: {numbers}\n", encoding="utf-8")
        points = getattr(sequence, "map", None)
        if points is not None:
            np.save(work / "map.npy", points)
            (work / "README.txt").write_text(_NOTE, encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return target
