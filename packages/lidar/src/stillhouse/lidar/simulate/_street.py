"""`Street`: where everything is, as static triangles; and where the traffic is at a given time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._config import LABELS, SimulateConfig
from ._house import add_house
from ._mesh import Frame, Mesh, strip
from ._objects import (
    add_bush,
    add_car,
    add_fence,
    add_hedge,
    add_lamp,
    add_person,
    add_sign,
    add_tree,
    add_wall,
    car_kinds,
)

_KERB = 0.12  # metres
_REACH = 75.0  # metres of street before the first and after the last place of the sensor
_EGO_SPEED = 8.0  # metres a second


@dataclass(frozen=True, slots=True)
class _Mover:
    """A car or a person that moves along the street."""

    kind: str
    start: float
    offset: float
    speed: float
    height: float
    phase: float


class Street:
    """One street; everything follows from the configuration's seed.

    Places on it are (s, d): metres along its middle line from the first sweep on, metres to the left of it.

    Args:
        config: the drive.
    """

    def __init__(self, config: SimulateConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 1])
        drive = (config.scans - 1) * config.spacing
        self.first = -_REACH - config.map_lead
        self.last = drive + config.map_lead + _REACH
        self._s = np.arange(self.first, self.last + 0.5, 0.5)
        self._line(rng)
        self.half = rng.uniform(4.6, 5.6)
        self.pavement = rng.uniform(1.8, 3.2)
        self.crossing = rng.uniform(0.35, 0.75) * (drive + 60) - 20 if rng.random() < 0.6 else None
        self._crossing_half = rng.uniform(3.0, 4.5)
        self.static = Mesh()
        self._ground()
        for side in (-1, 1):
            self._houses(side, rng)
            self._kerbside(side, rng)
        self._movers = self._traffic(rng, drive)

    def place(self, s: float | np.ndarray, d: float | np.ndarray, z: float = 0.0) -> np.ndarray:
        """World points [..., 3] at (s, d), `z` metres above the road's height there."""
        s, d = np.broadcast_arrays(np.asarray(s, float), np.asarray(d, float))
        x, y = np.interp(s, self._s, self._x), np.interp(s, self._s, self._y)
        yaw = np.interp(s, self._s, self._yaw)
        height = np.interp(s, self._s, self._z) + z
        return np.stack([x - d * np.sin(yaw), y + d * np.cos(yaw), height], axis=-1)

    def yaw(self, s: float) -> float:
        """Direction of the street at s, radians."""
        return float(np.interp(s, self._s, self._yaw))

    def sensor(self, s: float, wander: float = 0.0) -> np.ndarray:
        """Pose [4, 4] of the sensor when the car is at s in the right lane, sensor's frame into the world."""
        offset = -0.25 * self.half + wander
        ahead = self.place(s + 1.5, offset) - self.place(s - 1.5, offset)
        x = ahead / np.linalg.norm(ahead)
        y = np.cross([0.0, 0, 1], x)
        y /= np.linalg.norm(y)
        pose = np.eye(4)
        pose[:3, 0], pose[:3, 1], pose[:3, 2] = x, y, np.cross(x, y)
        pose[:3, 3] = self.place(s, offset) + self.config.height * pose[:3, 2]
        return pose

    def traffic(self, travelled: float) -> Mesh:
        """Triangles of what moves, at the time when the car has travelled so many metres."""
        mesh = Mesh()
        time = travelled / _EGO_SPEED
        for mover in self._movers:
            s = mover.start + mover.speed * time
            if not self.first + 2 < s < self.last - 2:
                continue
            turn = 0.0 if mover.speed >= 0 else np.pi
            base = _KERB if mover.kind == "person" else 0.0
            frame = Frame(self.place(s, mover.offset, base), self.yaw(s) + turn)
            if mover.kind == "person":
                stride = 0.6 * np.sin(2 * np.pi * (time * abs(mover.speed) / 1.4 + mover.phase))
                add_person(mesh, frame, height=mover.height, stride=stride, label=LABELS["moving-person"])
            else:
                add_car(
                    mesh, frame, mover.kind, label=LABELS["moving-car"], reflectivity=0.2 + 0.5 * mover.phase
                )
        return mesh

    def _line(self, rng: np.random.Generator) -> None:
        """The middle line: a direction that bends slowly, a height that swells a little."""
        s = self._s
        bend = np.zeros_like(s)
        for wave in (rng.uniform(90, 160), rng.uniform(160, 320)):
            bend += rng.uniform(0.1, 0.32) * np.sin(2 * np.pi * s / wave + rng.uniform(0, 2 * np.pi))
        self._yaw = bend - np.interp(0.0, s, bend)
        step = s[1] - s[0]
        x, y = np.cumsum(np.cos(self._yaw)) * step, np.cumsum(np.sin(self._yaw)) * step
        self._x, self._y = x - np.interp(0.0, s, x), y - np.interp(0.0, s, y)
        self._z = rng.uniform(0.1, 0.6) * np.sin(2 * np.pi * s / rng.uniform(120, 250) + rng.uniform(0, 6))

    def _band(self, d0: float, d1: float, z0: float, z1: float, label: int, shine: float) -> None:
        s = np.arange(self.first, self.last + 1.0, 1.0)
        vertices, triangles = strip(self.place(s, d1, z1), self.place(s, d0, z0))
        self.static.add(vertices, triangles, label, shine)

    def _ground(self) -> None:
        self._band(-self.half, self.half, 0, 0, LABELS["road"], 0.22)
        for side in (-1, 1):
            kerb, back = side * self.half, side * (self.half + self.pavement)
            self._band(kerb, kerb, 0, _KERB, LABELS["sidewalk"], 0.35)
            self._band(kerb, back, _KERB, _KERB, LABELS["sidewalk"], 0.35)
            self._band(back, side * 45.0, _KERB, _KERB, LABELS["terrain"], 0.3)
        if self.crossing is not None:
            for side in (-1, 1):  # on the pavement and the ground behind it, not on the road itself
                d = side * np.linspace(self.half, 45.0, 30)
                left, right = (
                    self.place(self.crossing + turn * self._crossing_half, d, _KERB + 0.015)
                    for turn in (-1, 1)
                )
                vertices, triangles = strip(left, right)
                self.static.add(vertices, triangles, LABELS["road"], 0.22)

    def _open(self, s: float, margin: float = 0.0) -> bool:
        """Whether s lies in the mouth of the side street."""
        return self.crossing is not None and abs(s - self.crossing) < self._crossing_half + margin

    def _frame(self, s: float, d: float, side: int) -> Frame:
        """Frame at (s, d) whose x runs along the street such that y points away from its middle."""
        turn = 0.0 if side > 0 else np.pi
        return Frame(self.place(s, d, _KERB), self.yaw(s) + turn)

    def _houses(self, side: int, rng: np.random.Generator) -> None:
        urban = rng.random() < 0.5
        front = self.half + self.pavement
        s = self.first + 2
        while s < self.last - 25:
            length = rng.uniform(9, 20) if urban else rng.uniform(8, 14)
            middle = s + length / 2
            if self._open(middle, length / 2 + 1.5):
                s += 2.0
                continue
            setback = rng.uniform(0.0, 0.4) if urban else rng.uniform(3.0, 6.5)
            frame = self._frame(middle, side * (front + setback + 0.02 * length), side)
            frame = Frame(
                frame.out(np.array([[-length / 2, 0, 0]]))[0], self.yaw(middle) + (side < 0) * np.pi
            )
            add_house(
                self.static,
                frame,
                length=length,
                depth=rng.uniform(8, 12),
                floors=int(rng.integers(2, 6) if urban else rng.integers(1, 3)),
                rng=rng,
                gable=not urban or rng.random() < 0.4,
            )
            if not urban:
                self._garden(s, length, setback, side, rng)
            gap = rng.uniform(3, 9) if rng.random() < (0.3 if urban else 0.9) else 0.0
            if gap > 3.5:
                self._gap(s + length, gap, side, rng)
            s += length + gap

    def _edge(self, s: float, length: float, side: int) -> Frame:
        """Frame whose x runs from s over `length` metres along the back of the pavement."""
        d = side * (self.half + self.pavement + 0.15)
        start, end = (s, s + length) if side > 0 else (s + length, s)
        a, b = self.place(start, d, _KERB), self.place(end, d, _KERB)
        return Frame(a, float(np.arctan2(b[1] - a[1], b[0] - a[0])))

    def _garden(self, s: float, length: float, setback: float, side: int, rng: np.random.Generator) -> None:
        choice = rng.random()
        edge = self._edge(s, length, side)
        add = add_fence if choice < 0.4 else add_hedge if choice < 0.7 else add_wall
        add(self.static, edge, length - 1.5, rng)
        back = side * (self.half + self.pavement)
        for _ in range(int(rng.integers(0, 4))):
            d = back + side * rng.uniform(1.0, max(setback - 0.8, 1.1))
            add_bush(self.static, self._frame(s + rng.uniform(0.5, length - 0.5), d, side), rng)

    def _gap(self, s: float, gap: float, side: int, rng: np.random.Generator) -> None:
        if self._open(s + gap / 2, gap / 2 + 0.5):
            return
        add = add_fence if rng.random() < 0.6 else add_hedge
        add(self.static, self._edge(s + 0.3, gap - 0.6, side), gap - 0.6, rng)
        back = side * (self.half + self.pavement)
        for _ in range(int(rng.integers(1, 3))):
            frame = self._frame(s + rng.uniform(0.3, 0.7) * gap, back + side * rng.uniform(3, 12), side)
            add_tree(self.static, frame, rng)

    def _kerbside(self, side: int, rng: np.random.Generator) -> None:
        """Trees, lamps and signs on the pavement, cars along the kerb, people who stand."""
        line = side * (self.half + 0.5)
        dense = rng.uniform(0.35, 0.8)
        for s in np.arange(self.first + 5, self.last - 5, rng.uniform(8, 11)):
            spot = s + rng.uniform(-1.5, 1.5)
            if rng.random() < dense and not self._open(spot, 3):
                add_tree(self.static, self._frame(spot, line, side), rng)
        for s in np.arange(self.first + rng.uniform(3, 20), self.last - 5, rng.uniform(22, 32)):
            if not self._open(s, 1):
                frame = Frame(self.place(s, line, _KERB), self.yaw(s) - side * np.pi / 2)
                add_lamp(self.static, frame, rng)
        for _ in range(4):
            s = rng.uniform(self.first + 5, self.last - 5)
            if not self._open(s, 1):
                turn = np.pi if side < 0 else 0.0
                add_sign(self.static, Frame(self.place(s, line, _KERB), self.yaw(s) + turn), rng)
        full = rng.uniform(0.3, 0.85)
        for s in np.arange(self.first + 4, self.last - 4, 5.8):
            kind = car_kinds()[int(rng.choice(3, p=[0.4, 0.45, 0.15]))]
            spot, shine, turn = s + rng.uniform(-0.4, 0.4), rng.uniform(0.1, 0.7), rng.normal(0, 0.02)
            if rng.random() < full and not self._open(spot, 4.5):
                frame = Frame(
                    self.place(spot, side * (self.half - 1.05)), self.yaw(spot) + turn + (side > 0) * np.pi
                )
                add_car(self.static, frame, kind, label=LABELS["car"], reflectivity=shine)
        for _ in range((self.config.people + 3) // 4):
            s = rng.uniform(-15, self.last - _REACH + 20)
            frame = Frame(
                self.place(s, side * (self.half + rng.uniform(1.0, self.pavement)), _KERB),
                rng.uniform(0, 6.28),
            )
            add_person(self.static, frame, height=rng.uniform(1.55, 1.9), stride=0.1, label=LABELS["person"])

    def _traffic(self, rng: np.random.Generator, drive: float) -> list[_Mover]:
        movers = []
        for number in range(self.config.moving_cars):
            oncoming = number % 2 == 0
            kind = car_kinds()[int(rng.integers(3))]
            if oncoming:
                start, speed = rng.uniform(8, drive + 45), -rng.uniform(5, 12)
                offset = 0.25 * self.half
            else:
                rank = number // 2 + 1
                start, speed = rank * 13.0 * (1 if rank % 2 else -1) + rng.uniform(-2, 2), _EGO_SPEED
                offset = -0.25 * self.half
            movers.append(_Mover(kind, start, offset, speed, 0.0, rng.random()))
        for _ in range(self.config.people):
            side = rng.choice([-1, 1])
            offset = side * (self.half + rng.uniform(0.9, self.pavement - 0.3))
            speed = rng.choice([-1, 1]) * rng.uniform(1.0, 1.7)
            movers.append(
                _Mover(
                    "person", rng.uniform(-15, drive + 25), offset, speed, rng.uniform(1.5, 1.9), rng.random()
                )
            )
        return movers
