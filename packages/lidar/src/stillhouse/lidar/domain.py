"""What this package tells `stillhouse` about itself. Light: nothing of it is imported before it is used."""

from __future__ import annotations

from stillhouse.core.doctor import python_library
from stillhouse.core.domain import Domain

DOMAIN = Domain(
    name="lidar",
    title="LiDAR scene completion: one sweep to a dense scene in a few steps.",
    config="stillhouse.lidar.config:LidarConfig",
    configs="stillhouse.lidar.configs",
    train="stillhouse.lidar.run:train",
    evaluate="stillhouse.lidar.run:evaluate",
    report="stillhouse.lidar.run:report",
    export="stillhouse.lidar.run:export",
    formats=("torch",),
    distribution="stillhouse-lidar",
    doctor=(),
    verbs="stillhouse.lidar.verbs:add_verbs",
)
