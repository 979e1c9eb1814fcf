"""Houses: walls with recessed windows and doors, gabled or flat roofs, some with a bay."""

from __future__ import annotations

import numpy as np

from ._config import LABELS
from ._mesh import Frame, Mesh, box, quads


def add_house(
    mesh: Mesh,
    frame: Frame,
    *,
    length: float,
    depth: float,
    floors: int,
    rng: np.random.Generator,
    gable: bool,
) -> None:
    """Add a house whose front is on local x from 0 to `length`, facing −y, `depth` metres deep towards +y."""
    label, shine = LABELS["building"], rng.uniform(0.2, 0.6)
    floor = rng.uniform(2.7, 3.3)
    high = floors * floor + rng.uniform(0.2, 0.8)
    style = {
        "pitch": rng.uniform(2.0, 3.2),
        "width": rng.uniform(0.9, 1.3),
        "sill": rng.uniform(0.7, 1.0),
        "window": rng.uniform(1.2, 1.6),
        "recess": rng.uniform(0.12, 0.3),
    }
    sides = (
        (np.array([0.0, 0, 0]), np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), length, True),
        (np.array([length, depth, 0]), np.array([-1.0, 0, 0]), np.array([0, -1.0, 0]), length, False),
        (np.array([0.0, depth, 0]), np.array([0, -1.0, 0]), np.array([1.0, 0, 0]), depth, False),
        (np.array([length, 0.0, 0]), np.array([0, 1.0, 0]), np.array([-1.0, 0, 0]), depth, False),
    )
    for start, along, inward, wide, front in sides:
        corners, glass = _wall(wide, floors, floor, high, style, door=front)
        for part, reflectivity in ((corners, shine), (glass, 0.15)):
            if len(part) == 0:
                continue
            world = start + part[..., :1] * along + part[..., 1:2] * inward + part[..., 2:] * [0, 0, 1.0]
            vertices, triangles = quads(world)
            mesh.add(frame.out(vertices), triangles, label, reflectivity)
    _roof(mesh, frame, length, depth, high, gable, rng)
    if rng.random() < 0.35 and length > 9:
        x, wide, out = rng.uniform(1.5, length - 4.5), rng.uniform(2.0, 3.0), rng.uniform(0.5, 0.9)
        vertices, triangles = box(np.array([x, -out, 0.0]), np.array([x + wide, 0.0, floor * min(floors, 2)]))
        mesh.add(frame.out(vertices), triangles, label, shine)


def _wall(
    wide: float, floors: int, floor: float, high: float, style: dict[str, float], *, door: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Quadrilaterals [Q, 4, 3] (along, inward, up) of a wall with its reveals, and those of its glass."""
    columns = max(int((wide - 0.8) / style["pitch"]), 1)
    pitch = wide / columns
    half = min(style["width"], 0.6 * pitch) / 2
    middle = pitch * (np.arange(columns) + 0.5)
    x = np.concatenate([[0.0], np.stack([middle - half, middle + half], 1).ravel(), [wide]])
    low = floor * np.arange(floors) + style["sill"]
    z = np.concatenate([[0.0], np.stack([low, low + style["window"]], 1).ravel(), [high]])
    depth = np.zeros((len(x) - 1, len(z) - 1))
    depth[1::2, 1::2] = style["recess"]
    if door:
        depth[2 * (columns // 2) + 1, :2] = style["recess"] + 0.1
    i, j = (index.ravel() for index in np.indices(depth.shape))
    d = depth[i, j]
    cells = _quad(x[i], x[i + 1], z[j], z[j + 1], d)
    glass = d > 0
    reveals = [cells[~glass]]
    a, b = np.nonzero(depth[1:] != depth[:-1])
    reveals.append(_reveal_upright(x[a + 1], z[b], z[b + 1], depth[a, b], depth[a + 1, b]))
    a, b = np.nonzero(depth[:, 1:] != depth[:, :-1])
    reveals.append(_reveal_level(x[a], x[a + 1], z[b + 1], depth[a, b], depth[a, b + 1]))
    return np.concatenate(reveals), cells[glass]


def _quad(x0: np.ndarray, x1: np.ndarray, z0: np.ndarray, z1: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack(
        [np.stack(corner, 1) for corner in ((x0, d, z0), (x1, d, z0), (x1, d, z1), (x0, d, z1))], axis=1
    )


def _reveal_upright(
    x: np.ndarray, z0: np.ndarray, z1: np.ndarray, d0: np.ndarray, d1: np.ndarray
) -> np.ndarray:
    corners = ((x, d0, z0), (x, d1, z0), (x, d1, z1), (x, d0, z1))
    return np.stack([np.stack(corner, 1) for corner in corners], axis=1)


def _reveal_level(
    x0: np.ndarray, x1: np.ndarray, z: np.ndarray, d0: np.ndarray, d1: np.ndarray
) -> np.ndarray:
    corners = ((x0, d0, z), (x1, d0, z), (x1, d1, z), (x0, d1, z))
    return np.stack([np.stack(corner, 1) for corner in corners], axis=1)


def _roof(
    mesh: Mesh, frame: Frame, length: float, depth: float, high: float, gable: bool, rng: np.random.Generator
) -> None:
    label = LABELS["building"]
    if not gable:
        vertices, triangles = box(
            np.array([-0.1, -0.1, high]), np.array([length + 0.1, depth + 0.1, high + 0.35])
        )
        mesh.add(frame.out(vertices), triangles, label, 0.25)
        return
    ridge = high + 0.5 * depth * rng.uniform(0.5, 0.9)
    eaves = 0.4
    front = [[-0.2, -eaves, high - 0.2], [length + 0.2, -eaves, high - 0.2]]
    top = [[length + 0.2, depth / 2, ridge], [-0.2, depth / 2, ridge]]
    back = [[length + 0.2, depth + eaves, high - 0.2], [-0.2, depth + eaves, high - 0.2]]
    vertices, triangles = quads(np.array([[*front, *top], [*back, top[1], top[0]]]))
    mesh.add(frame.out(vertices), triangles, label, 0.25)
    ends = np.array(
        [[[x, 0, high], [x, depth, high], [x, depth / 2, ridge - 0.2]] for x in (0.0, length)]
    ).reshape(-1, 3)
    mesh.add(frame.out(ends), np.arange(6).reshape(2, 3), label, 0.35)
