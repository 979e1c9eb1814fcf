"""What this package tells `stillhouse` about itself. Light: nothing of it is imported before it is used."""

from __future__ import annotations

from stillhouse.core.doctor import system_library
from stillhouse.core.domain import Domain

OPEN3D_LIBRARIES = (
    ("usb-1.0", "libusb-1.0.so.0", "libusb-1.0-0"),
    ("GL", "libGL.so.1", "libgl1"),
    ("EGL", "libEGL.so.1", "libegl1"),
    ("gomp", "libgomp.so.1", "libgomp1"),
)
"""What Open3D loads from the system: name, file, Debian package; the last one with older wheels only."""

DOMAIN = Domain(
    name="lidar",
    title="LiDAR scene completion: one sweep to a dense scene in a few steps.",
    config="stillhouse.lidar.config:LidarConfig",
    configs="stillhouse.lidar.configs",
    train="stillhouse.lidar.run:train",
    evaluate="stillhouse.lidar.run:evaluate",
    report="stillhouse.lidar.run:report",
    export="stillhouse.lidar.run:export",
    formats=("artifact",),
    distribution="stillhouse-lidar",
    doctor=tuple(
        system_library(name, soname=soname, apt=package, required=package != "libgomp1")
        for name, soname, package in OPEN3D_LIBRARIES
    ),
    verbs="stillhouse.lidar.verbs:add_verbs",
)
