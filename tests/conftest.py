"""Paths that the cross-package tests read."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the workspace."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def folders(root: Path) -> dict[str, Path]:
    """Name of each package, `core` first, → its folder."""
    domains = sorted(path.parent for path in (root / "packages").glob("*/pyproject.toml"))
    return {"core": root / "shared", **{folder.name: folder for folder in domains}}
