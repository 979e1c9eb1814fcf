"""What a simulated drive is made of."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

LABELS = MappingProxyType(
    {
        "car": 10,
        "person": 30,
        "road": 40,
        "sidewalk": 48,
        "building": 50,
        "fence": 51,
        "vegetation": 70,
        "trunk": 71,
        "terrain": 72,
        "pole": 80,
        "traffic-sign": 81,
        "moving-car": 252,
        "moving-person": 254,
    }
)
"""Semantic ids of SemanticKITTI that simulated points have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig:
    """A drive through one street.

    Args:
        seed: which street, traffic and noise; the drive follows from it and the other fields alone.
        scans: number of sweeps.
        spacing: metres that the car drives between two sweeps.
        rings: number of lasers, spread evenly between the two elevations.
        azimuths: rays of one laser in a turn.
        elevation: lowest and highest laser, degrees.
        height: of the sensor above the road, metres.
        max_range: of the sensor, metres.
        range_noise: standard deviation of the range, metres.
        dropout: share of the echoes that are lost.
        moving_cars: number of cars that drive.
        people: number of people that walk; half as many stand.
        map_voxel: the map keeps one point in a voxel of this side, metres.
        map_rays: rays that are cast for the map from each place on the drive, in random directions within the
            sensor's field of view.
        map_step: metres between two such places.
        map_lead: metres before the first and after the last sweep from which the map is seen as well.
        map_range: reach of those rays, metres.

    Raises:
        ValueError: a value out of range.
    """

    seed: int = 0
    scans: int = 6
    spacing: float = 1.5
    rings: int = 64
    azimuths: int = 1024
    elevation: tuple[float, float] = (-24.8, 2.0)
    height: float = 1.73
    max_range: float = 80.0
    range_noise: float = 0.02
    dropout: float = 0.02
    moving_cars: int = 4
    people: int = 6
    map_voxel: float = 0.1
    map_rays: int = 131_072
    map_step: float = 1.0
    map_lead: float = 10.0
    map_range: float = 60.0

    def __post_init__(self) -> None:
        for name in ("seed", "moving_cars", "people"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must not be negative")
        for name, least in (("scans", 1), ("rings", 2), ("azimuths", 8), ("map_rays", 64)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least {least}")
        for name in ("spacing", "height", "max_range", "map_voxel", "map_step", "map_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be > 0")
        if not self.range_noise >= 0:
            raise ValueError(f"range_noise: {self.range_noise} must not be negative")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} must be at least 0 and below 1")
        if not self.map_lead >= 0:
            raise ValueError(f"map_lead: {self.map_lead} must not be negative")
        low, high = self.elevation
        if not -90 < low < high < 90:
            raise ValueError(f"elevation: {self.elevation} must be two ascending angles within ±90 degrees")
