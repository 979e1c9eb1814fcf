"""Pictures of one scene side by side: the sweep, the truth, what each network made of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..render import views
from ._results import PictureGroup


def save_scene_pictures(
    folder: str | os.PathLike[str],
    scene: str,
    clouds: Mapping[str, np.ndarray],
    extent: float = 25.0,
    *,
    width: int = 720,
) -> list[PictureGroup]:
    """Draw clouds of one scene from above and obliquely and save them as `images/SCENE-NAME-VIEW.png`.

    Args:
        folder: the run's folder.
        scene: what the scene is called.
        clouds: caption → points [N, 3] in the frame of the sensor, the sweep first; empty clouds are drawn as
            an empty picture.
        extent: metres from the sensor to the edge of the picture.
        width: of a picture, pixels.

    Returns:
        Two groups, "above" and "oblique", for `LidarResults.pictures`.

    Raises:
        ValueError: no clouds, or a cloud that is not [N, 3].
    """
    from PIL import Image

    if not clouds:
        raise ValueError("clouds is empty; give at least the sweep")
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    tiles: dict[str, list[tuple[str, str]]] = {"above": [], "oblique": []}
    used: set[str] = set()
    for caption, cloud in clouds.items():
        stem = _unique(f"{_slug(scene)}-{_slug(caption)}", used)
        for view, picture in views(cloud, extent=extent, width=width).items():
            name = f"images/{stem}-{view}.png"
            Image.fromarray(picture).save(Path(folder) / name)
            tiles[view].append((caption, name))
    return [PictureGroup(scene=scene, view=view, tiles=found) for view, found in tiles.items()]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "cloud"


def _unique(stem: str, used: set[str]) -> str:
    name, number = stem, 2
    while name in used:
        name, number = f"{stem}-{number}", number + 1
    used.add(name)
    return name
