"""Triangles with a label and a reflectivity each, and the shapes that streets are built of."""

from __future__ import annotations

import numpy as np

_BOX = np.array(
    [[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7], [0, 1, 5], [0, 5, 4],
     [1, 2, 6], [1, 6, 5], [2, 3, 7], [2, 7, 6], [3, 0, 4], [3, 4, 7]]
)  # fmt: skip
_CORNERS = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], dtype=np.float64)


class Mesh:
    """A growing set of triangles.

    Attributes:
        vertices: float64 [V, 3], metres, after `finish`.
        triangles: int [T, 3].
        labels: int [T], semantic id of each triangle.
        reflectivity: float [T], 0 to 1.
    """

    def __init__(self) -> None:
        self._vertices: list[np.ndarray] = []
        self._triangles: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._reflectivity: list[np.ndarray] = []
        self._count = 0

    def add(self, vertices: np.ndarray, triangles: np.ndarray, label: int, reflectivity: float) -> None:
        """Add triangles [T, 3] over vertices [V, 3], all with one label and reflectivity."""
        self._vertices.append(np.asarray(vertices, dtype=np.float64))
        self._triangles.append(np.asarray(triangles) + self._count)
        self._labels.append(np.full(len(triangles), label))
        self._reflectivity.append(np.full(len(triangles), reflectivity))
        self._count += len(vertices)

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return vertices [V, 3], triangles [T, 3], labels [T] and reflectivity [T]."""
        if not self._vertices:
            return np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros(0, int), np.zeros(0)
        return (
            np.concatenate(self._vertices),
            np.concatenate(self._triangles),
            np.concatenate(self._labels),
            np.concatenate(self._reflectivity),
        )


class Frame:
    """A place to build at: local x forward, y left, z up, put at `origin` and turned by `yaw` radians."""

    def __init__(self, origin: np.ndarray, yaw: float) -> None:
        self.origin = np.asarray(origin, dtype=np.float64)
        cos, sin = np.cos(yaw), np.sin(yaw)
        self._turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    def out(self, points: np.ndarray) -> np.ndarray:
        """Local points [N, 3] to the world."""
        return np.asarray(points, dtype=np.float64) @ self._turn.T + self.origin


def box(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and triangles of the box between two corners."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    unit = np.concatenate([_CORNERS, _CORNERS + np.array([0, 0, 1])])
    middle, half = (low + high) / 2, (high - low) / 2
    vertices = np.empty((8, 3))
    vertices[:, :2] = unit[:, :2] * half[:2] + middle[:2]
    vertices[:, 2] = np.where(unit[:, 2] > 0, high[2], low[2])
    return vertices, _BOX


def quads(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and triangles of quadrilaterals [Q, 4, 3], corners in order around each."""
    count = len(corners)
    base = 4 * np.arange(count)[:, None]
    triangles = np.concatenate([base + np.array([0, 1, 2]), base + np.array([0, 2, 3])])
    return np.reshape(corners, (-1, 3)), triangles


def strip(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and triangles of the band between two lines [K, 3]."""
    return quads(np.stack([right[:-1], right[1:], left[1:], left[:-1]], axis=1))


def cylinder(
    bottom: np.ndarray, top: np.ndarray, radius: float, radius_top: float | None = None, sides: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and triangles of a (tapered) cylinder between two points, with caps."""
    bottom, top = np.asarray(bottom, float), np.asarray(top, float)
    axis = (top - bottom) / np.linalg.norm(top - bottom)
    helper = np.array([1.0, 0, 0]) if abs(axis[0]) < 0.9 else np.array([0, 1.0, 0])
    u = np.cross(axis, helper)
    u /= np.linalg.norm(u)
    v = np.cross(axis, u)
    angle = 2 * np.pi * np.arange(sides) / sides
    ring = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * v
    end = radius if radius_top is None else radius_top
    vertices = np.concatenate([bottom + radius * ring, top + end * ring, bottom[None], top[None]])
    here = np.arange(sides)
    following = (here + 1) % sides
    triangles = np.concatenate(
        [
            np.stack([here, following, following + sides], 1),
            np.stack([here, following + sides, here + sides], 1),
            np.stack([following, here, np.full(sides, 2 * sides)], 1),
            np.stack([here + sides, following + sides, np.full(sides, 2 * sides + 1)], 1),
        ]
    )
    return vertices, triangles


def prism(profile: np.ndarray, width_low: float, width_high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and triangles of a convex side profile (x, z) [K, 2] drawn across y, tapered with z."""
    profile = np.asarray(profile, float)
    share = (profile[:, 1] - profile[:, 1].min()) / np.ptp(profile[:, 1])
    half = 0.5 * (width_low + share * (width_high - width_low))
    count = len(profile)
    right = np.stack([profile[:, 0], -half, profile[:, 1]], 1)
    left = np.stack([profile[:, 0], half, profile[:, 1]], 1)
    here = np.arange(count)
    following = (here + 1) % count
    fan = np.stack([np.zeros(count - 2, int), np.arange(1, count - 1), np.arange(2, count)], 1)
    triangles = np.concatenate(
        [
            np.stack([here, following, following + count], 1),
            np.stack([here, following + count, here + count], 1),
            fan,
            fan[:, ::-1] + count,
        ]
    )
    return np.concatenate([right, left]), triangles


def leaves(centres: np.ndarray, size: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and triangles of leaves: one triangle of about `size` metres at each centre [N, 3]."""
    offsets = rng.normal(size=(len(centres), 3, 3))
    offsets *= size / np.linalg.norm(offsets, axis=2, keepdims=True)
    vertices = centres[:, None] + offsets
    return vertices.reshape(-1, 3), np.arange(3 * len(centres)).reshape(-1, 3)


def in_ball(count: int, rng: np.random.Generator, *, shell: float = 0.5) -> np.ndarray:
    """Return random points [count, 3] of the unit ball, denser towards its surface as `shell` falls to 0."""
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return direction * rng.random((count, 1)) ** (shell / 3)
