"""A student with random weights and a simulated drive as files, which the tests of their use share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stillhouse.lidar.networks import NetworkConfig
from stillhouse.lidar.simulate import SimulateConfig, SimulatedSequence, simulate_sequence, write_kitti
from stillhouse.lidar.store import CompleterSettings, save_completer

SMALL = NetworkConfig(channels=(8, 8, 8, 8, 8), voxel=0.5, blocks=1, time_channels=8, point_offsets=True)


@pytest.fixture(scope="session")
def small_drive() -> SimulatedSequence:
    """Three sparse sweeps of one street."""
    return simulate_sequence(
        SimulateConfig(seed=2, scans=3, rings=16, azimuths=180, map_step=10.0, map_rays=4096)
    )


@pytest.fixture(scope="session")
def drive_original(tmp_path_factory: pytest.TempPathFactory, small_drive: SimulatedSequence) -> Path:
    """That drive as a sequence folder that no test may change."""
    return write_kitti(small_drive, tmp_path_factory.mktemp("drive") / "sequences" / "00")


@pytest.fixture
def drive_folder(drive_original: Path, tmp_path: Path) -> Path:
    """A copy of the sequence folder, to be changed at will."""
    return Path(shutil.copytree(drive_original, tmp_path / "drive" / "00"))


@pytest.fixture(scope="session")
def student_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of random weights that no test may change: a diffusion student with a refinement net."""
    torch.manual_seed(0)
    settings = CompleterSettings(
        pairs={"points": 60, "factor": 4, "max_range": 20.0}, steps=2, network=SMALL, refine=SMALL
    )
    return save_completer(
        tmp_path_factory.mktemp("model") / "student",
        settings.build(),
        settings,
        config={"data": "simulated"},
        metrics={"chamfer": None},
        card="# A student of nobody\n\nRandom weights.",
    ).folder


@pytest.fixture
def student_folder(student_original: Path, tmp_path: Path) -> Path:
    """A copy of the artefact, to be changed at will."""
    return Path(shutil.copytree(student_original, tmp_path / "model" / "student"))
