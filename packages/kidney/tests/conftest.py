"""A finished student that the tests of its use share: random weights, a gallery of simulated stones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stillhouse.core.artifact import Artifact
from stillhouse.kidney.data import Collection, PatchDataset, SimulateConfig, simulate
from stillhouse.kidney.gallery import Gallery
from stillhouse.kidney.predict import embed, thumbnails
from stillhouse.kidney.store import save_student


@pytest.fixture(scope="session")
def stones() -> Collection:
    """Three classes of three simulated stones, both views."""
    return simulate(SimulateConfig(stones_per_class=3, classes=("WW", "UA", "CYS"), patches_per_fragment=2))


@pytest.fixture(scope="session")
def student_original(tmp_path_factory: pytest.TempPathFactory, stones: Collection) -> Path:
    """An artefact that no test may change."""
    from stillhouse.kidney.student import StudentConfig, build_student

    torch.manual_seed(0)
    network = build_student(StudentConfig(width=8, dim=16, image_size=32))
    dataset = PatchDataset(stones, stones.classes, size=32)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    with torch.no_grad():
        for _ in range(30):  # normalisation layers meet the data, else random weights see every image alike
            network(images)
    network.eval()
    gallery = Gallery.build(
        embed(network, stones, size=32),
        [stones.classes.index(item.label) for item in stones.items],
        classes=stones.classes,
        stones=[item.stone for item in stones.items],
        views=[item.view for item in stones.items],
        names=[item.title for item in stones.items],
        thumbnails=thumbnails(stones, side=32),
    )
    artifact: Artifact = save_student(
        tmp_path_factory.mktemp("model") / "student",
        network,
        gallery,
        config={"data": "simulated"},
        metrics={"accuracy": None},
        card="# A student of nobody\n\nRandom weights.",
        provenance={
            "licences": [{"what": "training data", "name": "simulated stones", "licence": "Apache-2.0"}]
        },
    )
    return artifact.folder


@pytest.fixture
def student_folder(student_original: Path, tmp_path: Path) -> Path:
    """A copy of the artefact, to be changed at will."""
    return Path(shutil.copytree(student_original, tmp_path / "model" / "student"))


@pytest.fixture
def image_folder(stones: Collection, tmp_path: Path) -> Path:
    """The simulated stones as files, `<view>/<class>/<stone>_….png`."""
    from PIL import Image

    root = tmp_path / "images"
    for item in stones.items:
        path = root / item.view / item.label / f"{item.title}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item.load()).save(path)
    return root
