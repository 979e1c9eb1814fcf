"""Simulated stones as files: patches with their table, or whole fragments with masks to cut patches from."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stillhouse.core.errors import DataError

from .data import SimulateConfig, simulate, simulate_fragments

Progress = Callable[[int, int], None]
_NOTE = (
    "Simulated pictures of kidney stones, drawn by stillhouse-kidney. They are for trying the software "
    "and say nothing about patients.\n"
)


def write_simulated(
    config: SimulateConfig,
    folder: str | os.PathLike[str],
    *,
    fragments: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write simulated stones; the folder appears in one step when it is complete.

    Args:
        config: what to simulate.
        folder: folder to make; must not exist or be empty.
        fragments: False writes patches to `<view>/<class>/` with `manifest.csv`; True writes fragments to
            `images/<view>/<class>/` with `images/manifest.csv`, and their masks to `masks/`.
        progress: called as `progress(done, total)`.

    Returns:
        The number of pictures written, masks not counted.

    Raises:
        DataError: the folder is not empty or cannot be written.
    """
    from PIL import Image

    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists and is not empty; give another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror}); give another folder") from error
    try:
        os.chmod(work, 0o755)
        rows = []
        pictures = _fragments(config, work, progress) if fragments else _patches(config, progress)
        base = work / "images" if fragments else work
        for name, label, view, stone, pixels in pictures:
            relative = f"{view}/{label}/{name}.png"
            (base / relative).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(base / relative)
            rows.append({"path": relative, "class": label, "view": view, "stone": stone})
        with open(base / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        (work / "README.txt").write_text(_NOTE, encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return len(rows)


_Picture = tuple[str, str, str, str, np.ndarray]


def _patches(config: SimulateConfig, progress: Progress | None) -> list[_Picture]:
    found = simulate(config, progress=progress)
    return [(item.title, item.label, item.view, item.stone, item.load()) for item in found.items]


def _fragments(config: SimulateConfig, work: Path, progress: Progress | None) -> list[_Picture]:
    from PIL import Image

    total = len(config.classes) * config.stones_per_class * len(config.views)
    found: list[_Picture] = []
    for done, fragment in enumerate(simulate_fragments(config), start=1):
        mask = work / "masks" / fragment.view / fragment.label / f"{fragment.name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(fragment.mask.astype(np.uint8) * 255).save(mask)
        found.append((fragment.name, fragment.label, fragment.view, fragment.stone, fragment.image))
        if progress is not None:
            progress(done, total)
    return found
