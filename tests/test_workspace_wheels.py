"""What the wheels and sdists hold: those of a release under `nox -s build`, fresh ones otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def dist(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("STILLHOUSE_DIST")
    if given:
        return Path(given)
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    target = tmp_path_factory.mktemp("dist")
    for folder in folders.values():
        command = [sys.executable, "-m", "hatchling", "build", "--directory", str(target)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return target


def test_each_package_has_one_wheel_and_one_sdist(dist: Path, folders: Folders) -> None:
    assert len(list(dist.glob("*.whl"))) == len(folders)
    assert len(list(dist.glob("*.tar.gz"))) == len(folders)


def test_a_wheel_holds_its_package_and_nothing_else(dist: Path, folders: Folders) -> None:
    for name, folder in folders.items():
        (wheel,) = dist.glob(f"stillhouse_{name}-*.whl")
        held = set(zipfile.ZipFile(wheel).namelist())
        inside = f"stillhouse/{name}/"
        info = wheel.name.rsplit("-py3", 1)[0] + ".dist-info/"
        assert {path for path in held if not path.startswith((inside, info))} == set()
        assert f"{inside}py.typed" in held
        assert "stillhouse/__init__.py" not in held
        assert any(path.startswith(info) and path.endswith("LICENSE") for path in held)
        assert not [path for path in held if "/tests/" in path or "__pycache__" in path]
        source = folder / "src" / "stillhouse" / name
        relative = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
        shipped = [
            path for path in relative if not any(part.startswith((".", "__")) for part in path.parts[:-1])
        ]
        assert {f"{inside}{path.as_posix()}" for path in shipped} <= held


def test_wheels_stay_small(dist: Path) -> None:
    assert {path.name for path in dist.glob("*.whl") if path.stat().st_size > 5 * 1024**2} == set()


def test_an_sdist_holds_the_source_the_tests_and_the_licence(dist: Path, folders: Folders) -> None:
    for name in folders:
        (archive,) = dist.glob(f"stillhouse_{name}-*.tar.gz")
        with tarfile.open(archive) as opened:
            held = opened.getnames()
        top = archive.name.removesuffix(".tar.gz")
        for needed in ("pyproject.toml", "README.md", "LICENSE", f"src/stillhouse/{name}/__init__.py"):
            assert f"{top}/{needed}" in held
        assert any(path.startswith(f"{top}/tests/test_") for path in held)
