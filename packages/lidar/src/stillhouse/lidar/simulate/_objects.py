"""What stands and moves in a street: cars, people, trees, hedges, lamp posts, signs, fences."""

from __future__ import annotations

import numpy as np

from ._config import LABELS
from ._mesh import Frame, Mesh, box, cylinder, in_ball, leaves, prism, quads

_BODIES = {
    "saloon": (
        [(-2.2, 0.32), (2.15, 0.32), (2.22, 0.62), (1.15, 0.92), (-2.1, 0.98), (-2.25, 0.7)],
        [(-1.75, 0.95), (0.95, 0.9), (0.25, 1.43), (-1.15, 1.45)],
    ),
    "hatchback": (
        [(-1.9, 0.32), (1.85, 0.32), (1.92, 0.66), (1.05, 0.95), (-1.9, 1.0), (-1.98, 0.7)],
        [(-1.88, 0.97), (0.95, 0.93), (0.3, 1.5), (-1.55, 1.52)],
    ),
    "van": (
        [(-2.4, 0.36), (2.3, 0.36), (2.4, 0.75), (2.05, 1.1), (-2.4, 1.1)],
        [(-2.4, 1.08), (2.02, 1.08), (1.4, 1.95), (-2.35, 2.0)],
    ),
}


def add_car(mesh: Mesh, frame: Frame, kind: str, *, label: int, reflectivity: float) -> None:
    """Add a car of a kind ("saloon", "hatchback", "van"), its middle at the frame's origin on the road."""
    body, cabin = _BODIES[kind]
    for profile, low, high, shine in (
        (body, 1.78, 1.72, reflectivity),
        (cabin, 1.62, 1.3 if kind != "van" else 1.5, 0.6 * reflectivity),
    ):
        vertices, triangles = prism(np.array(profile), low, high)
        mesh.add(frame.out(vertices), triangles, label, shine)
    for x in (-1.35, 1.3):
        for y in (-0.8, 0.8):
            wheel = cylinder(np.array([x, y - 0.1, 0.33]), np.array([x, y + 0.1, 0.33]), 0.33, sides=10)
            mesh.add(frame.out(wheel[0]), wheel[1], label, 0.08)


def car_kinds() -> tuple[str, ...]:
    """Names of the kinds of car."""
    return tuple(_BODIES)


def add_person(mesh: Mesh, frame: Frame, *, height: float, stride: float, label: int) -> None:
    """Add a person; `stride` is how far (metres) one foot is before the other."""
    scale = height / 1.75
    parts = [
        ((stride / 2, 0.1, 0), (0, 0.09, 0.85), 0.09),
        ((-stride / 2, -0.1, 0), (0, -0.09, 0.85), 0.09),
        ((0, 0, 0.82), (0, 0, 1.45), 0.19),
        ((0, 0, 1.45), (0, 0, 1.75), 0.11),
        ((-stride / 3, 0.25, 0.85), (0, 0.23, 1.42), 0.06),
        ((stride / 3, -0.25, 0.85), (0, -0.23, 1.42), 0.06),
    ]
    for low, high, radius in parts:
        vertices, triangles = cylinder(np.array(low) * scale, np.array(high) * scale, radius * scale)
        mesh.add(frame.out(vertices), triangles, label, 0.35)


def add_tree(mesh: Mesh, frame: Frame, rng: np.random.Generator) -> None:
    """Add a broad-leaved tree: a trunk, some boughs, a crown of leaves through which rays can pass."""
    trunk = rng.uniform(1.9, 3.0)
    thick = rng.uniform(0.1, 0.24)
    size = np.array([1.0, 1.0, 0.95]) * rng.uniform(1.3, 2.6)
    size[2] *= rng.uniform(0.9, 1.4)
    lean = rng.normal(0, 0.1, 2)
    top = np.array([lean[0], lean[1], trunk + 0.4 * size[2]])
    vertices, triangles = cylinder(np.zeros(3), top, thick, 0.6 * thick)
    mesh.add(frame.out(vertices), triangles, LABELS["trunk"], 0.3)
    middle = np.array([lean[0], lean[1], trunk + 0.85 * size[2]])
    for _ in range(4):
        end = middle + in_ball(1, rng, shell=0.3)[0] * size * 0.7
        vertices, triangles = cylinder(top - [0, 0, 0.3 * size[2]], end, 0.4 * thick, 0.03, sides=5)
        mesh.add(frame.out(vertices), triangles, LABELS["trunk"], 0.3)
    clumps = middle + in_ball(14, rng, shell=0.6) * size * 0.75
    count = int(90 * size[0] ** 2)
    spread = rng.integers(len(clumps), size=count)
    centres = clumps[spread] + in_ball(count, rng, shell=0.8) * 0.42 * size[0]
    vertices, triangles = leaves(centres, 0.2, rng)
    mesh.add(frame.out(vertices), triangles, LABELS["vegetation"], 0.45)


def add_hedge(mesh: Mesh, frame: Frame, length: float, rng: np.random.Generator) -> None:
    """Add a hedge along local x, `length` metres long."""
    high, wide = rng.uniform(0.9, 1.7), rng.uniform(0.5, 0.8)
    count = int(130 * length * high)
    centres = rng.uniform([0, -wide / 2, 0.05], [length, wide / 2, high], (count, 3))
    vertices, triangles = leaves(centres, 0.11, rng)
    mesh.add(frame.out(vertices), triangles, LABELS["vegetation"], 0.4)


def add_bush(mesh: Mesh, frame: Frame, rng: np.random.Generator) -> None:
    """Add a round bush."""
    radius = rng.uniform(0.4, 0.9)
    centres = in_ball(int(180 * radius**2), rng) * radius + [0, 0, 0.8 * radius]
    vertices, triangles = leaves(centres, 0.14, rng)
    mesh.add(frame.out(vertices), triangles, LABELS["vegetation"], 0.4)


def add_lamp(mesh: Mesh, frame: Frame, rng: np.random.Generator) -> None:
    """Add a lamp post whose arm points along local x."""
    high = rng.uniform(5.0, 7.5)
    for low, end, radius in (
        ((0, 0, 0), (0, 0, high), 0.08),
        ((0, 0, high), (1.4, 0, high + 0.25), 0.045),
    ):
        vertices, triangles = cylinder(np.array(low, float), np.array(end, float), radius)
        mesh.add(frame.out(vertices), triangles, LABELS["pole"], 0.4)
    vertices, triangles = box(np.array([1.1, -0.12, high + 0.2]), np.array([1.7, 0.12, high + 0.34]))
    mesh.add(frame.out(vertices), triangles, LABELS["pole"], 0.5)


def add_sign(mesh: Mesh, frame: Frame, rng: np.random.Generator) -> None:
    """Add a traffic sign that faces along local x."""
    vertices, triangles = cylinder(np.zeros(3), np.array([0, 0, 2.8]), 0.035, sides=6)
    mesh.add(frame.out(vertices), triangles, LABELS["pole"], 0.5)
    half = rng.uniform(0.28, 0.4)
    vertices, triangles = box(np.array([0.04, -half, 2.15]), np.array([0.07, half, 2.15 + 2 * half]))
    mesh.add(frame.out(vertices), triangles, LABELS["traffic-sign"], 0.95)


def add_fence(mesh: Mesh, frame: Frame, length: float, rng: np.random.Generator) -> None:
    """Add a picket fence along local x."""
    high = rng.uniform(0.9, 1.3)
    label = LABELS["fence"]
    for x in np.arange(0.0, length + 0.01, 2.0):
        vertices, triangles = box(np.array([x - 0.05, -0.05, 0]), np.array([x + 0.05, 0.05, high + 0.1]))
        mesh.add(frame.out(vertices), triangles, label, 0.4)
    for z in (0.25 * high, 0.85 * high):
        vertices, triangles = box(np.array([0, -0.02, z - 0.04]), np.array([length, 0.02, z + 0.04]))
        mesh.add(frame.out(vertices), triangles, label, 0.4)
    x = np.arange(0.1, length - 0.1, 0.16)
    corners = np.zeros((len(x), 4, 3))
    corners[:, :, 0] = x[:, None] + [0, 0.09, 0.09, 0]
    corners[:, :, 1] = 0.03
    corners[:, :, 2] = [0.08, 0.08, high, high]
    vertices, triangles = quads(corners)
    mesh.add(frame.out(vertices), triangles, label, 0.4)


def add_wall(mesh: Mesh, frame: Frame, length: float, rng: np.random.Generator) -> None:
    """Add a low garden wall along local x."""
    vertices, triangles = box(np.array([0, -0.12, 0]), np.array([length, 0.12, rng.uniform(0.6, 1.2)]))
    mesh.add(frame.out(vertices), triangles, LABELS["fence"], 0.3)
