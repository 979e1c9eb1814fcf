"""LiDAR scene completion by distilled point diffusion."""

from __future__ import annotations

from importlib.metadata import version as _version

__version__ = _version("stillhouse-lidar")
