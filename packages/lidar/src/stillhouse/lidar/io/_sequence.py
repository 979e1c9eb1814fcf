"""`Sequence`: the sweeps of one drive, read when they are asked for, with their poses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from stillhouse.core.errors import DataError

from ._kitti import read_poses
from ._read import SUFFIXES, read_scan
from ._scan import Scan


@runtime_checkable
class ScanSource(Protocol):
    """What training reads: sweeps by number with their poses; files and simulated drives are both one."""

    @property
    def name(self) -> str:
        """What the drive is called; unique in a training set."""
        ...

    @property
    def poses(self) -> np.ndarray | None:
        """float64 [S, 4, 4]: sweep i into the frame of the map; None where unknown."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Scan: ...


class Sequence:
    """Sweeps of one drive; each is read when it is asked for and none is kept.

    Args:
        name: what the drive is called.
        paths: the sweeps' files, in order.
        labels: their `.label` files; None where there are none.
        poses: float64 [S, 4, 4], sweep i into the frame of the first one; None where unknown.
        drop_invalid: as in `read_scan`.

    Raises:
        ValueError: no sweeps, or numbers of labels or poses that differ from theirs.
    """

    def __init__(
        self,
        name: str,
        paths: list[Path],
        *,
        labels: list[Path] | None = None,
        poses: np.ndarray | None = None,
        drop_invalid: bool = False,
    ) -> None:
        if not paths:
            raise ValueError("paths: is empty; a sequence needs at least one sweep")
        if labels is not None and len(labels) != len(paths):
            raise ValueError(f"labels: {len(labels)} files for {len(paths)} sweeps")
        if poses is not None and poses.shape != (len(paths), 4, 4):
            raise ValueError(f"poses: {list(poses.shape)} must be [{len(paths)}, 4, 4]")
        self.name = name
        self.paths = list(paths)
        self.labels = labels
        self.poses = poses
        self.drop_invalid = drop_invalid

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Scan:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sweep {index} of {len(self)}")
        labels = None if self.labels is None else self.labels[index]
        return read_scan(self.paths[index], labels=labels, drop_invalid=self.drop_invalid)

    def __iter__(self) -> Iterator[Scan]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Sequence({self.name!r}, {len(self)} sweeps)"


def read_sequence(
    folder: str | os.PathLike[str],
    *,
    poses: str | os.PathLike[str] | None = None,
    calib: str | os.PathLike[str] | None = None,
    drop_invalid: bool = False,
) -> Sequence:
    """Read a sequence folder of KITTI's layout, or a plain folder of sweeps.

    KITTI: `velodyne/NNNNNN.bin`, and where they are there `labels/NNNNNN.label`, `poses.txt` and `calib.txt`.
    Plain: `.bin`, `.pcd.bin`, `.ply` or `.pcd` files, sorted by name, with an optional `poses.txt`.

    Args:
        folder: the folder.
        poses: a pose file elsewhere.
        calib: a calibration file elsewhere.
        drop_invalid: as in `read_scan`.

    Returns:
        Sequence: with labels where every sweep has them. Sweeps with numbers for names take the pose of that
        number, so that a pose file of the whole drive serves a part of it; others need one pose each.

    Raises:
        DataError: no such folder, no sweeps, labels for some sweeps only, fewer poses than sweeps, a pose or
            calibration file that cannot be used.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: is no folder; give one with velodyne/*.bin or with sweeps in it")
    scans = root / "velodyne" if (root / "velodyne").is_dir() else root
    paths = sorted(
        path
        for path in scans.iterdir()
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise DataError(f"{scans}: holds no sweeps ({', '.join(SUFFIXES)})")
    pose_file = Path(poses) if poses is not None else root / "poses.txt"
    calib_file = Path(calib) if calib is not None else root / "calib.txt"
    found = None
    if poses is not None or pose_file.is_file():
        use = calib_file if calib is not None or calib_file.is_file() else None
        found = _match_poses(pose_file, read_poses(pose_file, use), paths)
    return Sequence(
        root.resolve().name, paths, labels=_match_labels(root, paths), poses=found, drop_invalid=drop_invalid
    )


def _match_poses(file: Path, poses: np.ndarray, paths: list[Path]) -> np.ndarray:
    stems = [path.name.split(".")[0] for path in paths]
    if all(stem.isdecimal() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if max(numbers) >= len(poses) and len(poses) != len(paths):
            raise DataError(
                f"{file}: has {len(poses):,} poses, and the sweep {paths[int(np.argmax(numbers))].name} "
                f"needs number {max(numbers):,}; give the poses of this sequence"
            )
        return poses[numbers] if max(numbers) < len(poses) else poses
    if len(poses) != len(paths):
        raise DataError(f"{file}: has {len(poses):,} poses for {len(paths):,} sweeps; one a sweep is needed")
    return poses


def _match_labels(root: Path, paths: list[Path]) -> list[Path] | None:
    folder = root / "labels"
    if not folder.is_dir():
        return None
    labels = [folder / f"{path.name.split('.')[0]}.label" for path in paths]
    missing = [label for label in labels if not label.is_file()]
    if len(missing) == len(labels):
        return None
    if missing:
        raise DataError(
            f"{missing[0]}: is missing, other sweeps of the sequence have labels; add it, or move the folder "
            "labels away"
        )
    return labels
