"""Pictures of point clouds without a display: from above and obliquely, drawn with a depth buffer.

Colours say height. Where there is a display, `show` opens Open3D's window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stillhouse.core.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

View = Literal["above", "oblique"]

BACKGROUND = (18, 20, 26)


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """Where a cloud is looked at from; the point looked at is the sensor's place on the ground.

    Args:
        view: "above" (orthographic, x forward is up) or "oblique" (in perspective, from behind and above).
        extent: metres from the sensor to the edge of the picture ("above") or to the things in view.
        width: of the picture, pixels.
        height: of the picture, pixels.
        elevation: angle above the ground that the oblique view looks from, degrees.
        azimuth: direction it looks to, degrees; 0 is the driving direction.

    Raises:
        ValueError: a value out of range.
    """

    view: View = "above"
    extent: float = 25.0
    width: int = 720
    height: int = 720
    elevation: float = 28.0
    azimuth: float = 20.0

    def __post_init__(self) -> None:
        if self.view not in ("above", "oblique"):
            raise ValueError(f"view is {self.view!r}; allowed: 'above', 'oblique'")
        if not (math.isfinite(self.extent) and self.extent > 0):
            raise ValueError(f"extent is {self.extent!r}; it must be above 0 metres")
        if not (16 <= self.width <= 8192 and 16 <= self.height <= 8192):
            raise ValueError(f"width and height are {self.width} and {self.height}; allowed: 16 to 8192")

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Project points [N, 3] to columns and rows [N], pixels, and depth [N]; small is near."""
        x, y, z = (points[:, i].astype(np.float64) for i in range(3))
        if self.view == "above":
            return self.width / 2 - y * self.scale, self.height / 2 - x * self.scale, -z
        yaw, pitch = math.radians(self.azimuth), math.radians(self.elevation)
        ahead = x * math.cos(yaw) + y * math.sin(yaw)
        left = -x * math.sin(yaw) + y * math.cos(yaw)
        distance = self.distance
        above = z + 1.7  # the ground lies about that far below the sensor
        depth = distance + ahead * math.cos(pitch) - above * math.sin(pitch)
        up = above * math.cos(pitch) + ahead * math.sin(pitch)
        depth_safe = np.maximum(depth, 0.1)
        focal = self.scale * distance
        column = self.width / 2 - focal * left / depth_safe
        row = self.height * 0.52 - focal * up / depth_safe
        return np.where(depth > 0.5, column, -1e9), row, depth

    @property
    def distance(self) -> float:
        """Metres from the camera of the oblique view to the point it looks at."""
        return 2.0 * self.extent

    @property
    def scale(self) -> float:
        """Pixels of a metre: anywhere from above, at the point looked at obliquely."""
        if self.view == "above":
            return min(self.width, self.height) / (2 * self.extent)
        return 1.1 * self.width / (2 * self.extent)

    def magnification(self, depth: np.ndarray) -> np.ndarray:
        """Pixels of a metre at depths [N] as `project` gives them."""
        if self.view == "above":
            return np.full(len(depth), self.scale)
        return self.scale * self.distance / np.maximum(depth, 0.1)


def height_colours(z: np.ndarray, *, low: float = -2.0, high: float = 4.0) -> np.ndarray:
    """Colours uint8 [N, 3] of heights [N], in metres relative to the sensor.

    >>> height_colours(np.array([-2.0, 4.0])).shape
    (2, 3)
    """
    from matplotlib import colormaps

    share = np.clip((np.asarray(z, dtype=np.float64) - low) / (high - low), 0, 1)
    return (colormaps["turbo"](0.08 + 0.87 * share)[:, :3] * 255).astype(np.uint8)


def render(
    points: np.ndarray,
    camera: Camera | None = None,
    *,
    colours: np.ndarray | None = None,
    size: int | None = None,
) -> np.ndarray:
    """Draw a cloud.

    Args:
        points: float [N, 3], metres, in the frame of the sensor.
        camera: where from; the default looks from above.
        colours: uint8 [N, 3]; height where None.
        size: side of every point, pixels. None: each point is as wide as the gap to its neighbours, within
            5 and 30 cm, so that what is sampled densely looks closed and what is sparse stays visible.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: a wrong shape.

    Example:
        >>> picture = render(np.zeros((1, 3)), Camera(width=64, height=64))
        >>> picture.shape, bool((picture[32, 32] != BACKGROUND).any())
        ((64, 64, 3), True)
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be [N, 3], got {list(points.shape)}")
    camera = camera or Camera()
    shades = height_colours(points[:, 2]) if colours is None else np.asarray(colours, dtype=np.uint8)
    if shades.shape != (len(points), 3):
        raise ValueError(f"colours must be [{len(points)}, 3], got {list(shades.shape)}")
    column, row, depth = camera.project(points)
    seen_by = (np.abs(column) < 1e8) & np.isfinite(row) & np.isfinite(depth)
    points, shades, column, row, depth = (v[seen_by] for v in (points, shades, column, row, depth))
    sides = np.full(len(points), size) if size is not None else _sides(points, camera.magnification(depth))
    owner, buffer = _paint(camera, column, row, depth, sides)
    picture = np.empty((camera.height * camera.width, 3), dtype=np.uint8)
    picture[:] = BACKGROUND
    seen = owner >= 0
    shade = shades[owner[seen]].astype(np.float64)
    if camera.view == "oblique" and seen.any():  # what is far fades, which makes depth visible
        near, far = np.quantile(buffer[seen], (0.02, 0.98))
        fade = np.clip((buffer[seen] - near) / max(far - near, 1e-6), 0, 1)[:, None] * 0.55
        shade = shade * (1 - fade) + np.array(BACKGROUND) * fade
    picture[seen] = shade.astype(np.uint8)
    return picture.reshape(camera.height, camera.width, 3)


def _sides(points: np.ndarray, magnification: np.ndarray) -> np.ndarray:
    """Sides in pixels, int [N], of points as wide as the gap to their neighbours."""
    if len(points) < 4:
        return np.full(len(points), 4)
    from scipy.spatial import cKDTree

    gaps = cKDTree(points).query(points, k=4)[0][:, 1:].mean(axis=1)
    metres = np.clip(1.2 * gaps, 0.05, 0.3)
    return np.clip(np.ceil(metres * magnification), 1, 16).astype(np.int64)


def _paint(
    camera: Camera, column: np.ndarray, row: np.ndarray, depth: np.ndarray, sides: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which point each pixel shows, int [H·W], −1 for none; and its depth."""
    buffer = np.full(camera.height * camera.width, np.inf)
    owner = np.full(camera.height * camera.width, -1, dtype=np.int64)
    left = np.floor(column - sides / 2 + 0.5).astype(np.int64)
    top = np.floor(np.clip(row, -1e6, 1e6) - sides / 2 + 0.5).astype(np.int64)
    far_first = np.argsort(-depth, kind="stable")  # what is drawn last is nearest: assignment is the buffer
    for dc in range(int(sides.max(initial=0))):
        for dr in range(int(sides.max(initial=0))):
            c, r = left + dc, top + dr
            drawn = (c >= 0) & (c < camera.width) & (r >= 0) & (r < camera.height)
            drawn &= (dc < sides) & (dr < sides)
            order = far_first[drawn[far_first]]
            if not len(order):
                continue
            pixel = r[order] * camera.width + c[order]
            last = np.full(len(owner), -1, dtype=np.int64)
            last[pixel] = order
            hit = np.flatnonzero(last >= 0)
            hit = hit[depth[last[hit]] < buffer[hit]]
            buffer[hit] = depth[last[hit]]
            owner[hit] = last[hit]
    return owner, buffer


def views(points: np.ndarray, *, extent: float = 25.0, width: int = 720) -> dict[View, np.ndarray]:
    """Draw a cloud [N, 3] from above and obliquely; pictures uint8 [height, width, 3]."""
    return {
        "above": render(points, Camera(view="above", extent=extent, width=width, height=width)),
        "oblique": render(
            points, Camera(view="oblique", extent=extent, width=width, height=int(width * 0.62))
        ),
    }


def save_views(
    points: np.ndarray, folder: Path, stem: str, *, extent: float = 25.0, width: int = 1080
) -> list[Path]:
    """Write `STEM-above.png` and `STEM-oblique.png` and return their paths."""
    from PIL import Image as pillow

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for view, picture in views(points, extent=extent, width=width).items():
        image: Image = pillow.fromarray(picture)
        path = folder / f"{stem}-{view}.png"
        image.save(path)
        paths.append(path)
    return paths


def show(points: np.ndarray, *, title: str = "cloud") -> None:
    """Open an interactive window; returns when it is closed.

    Raises:
        MissingDependencyError: Open3D cannot be used, or there is no display.
    """
    from .io import import_open3d

    open3d: Any = import_open3d("the interactive window")
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(np.asarray(points, dtype=np.float64)))
    cloud.colors = open3d.utility.Vector3dVector(height_colours(np.asarray(points)[:, 2]) / 255.0)
    window = open3d.visualization.Visualizer()
    if not window.create_window(window_name=title, width=1280, height=800):
        raise MissingDependencyError(
            "no window can be opened: there is no display here; leave --window out to write pictures"
        )
    window.add_geometry(cloud)
    window.run()
    window.destroy_window()
