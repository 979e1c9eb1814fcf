"""The packages' metadata agree with each other and with what they ship."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import entry_points, version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

Folders = dict[str, Path]


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def projects(folders: Folders) -> dict[str, dict[str, Any]]:
    return {name: read(folder / "pyproject.toml") for name, folder in folders.items()}


def test_all_packages_have_one_version(projects: dict[str, dict[str, Any]]) -> None:
    numbers = {name: project["project"]["version"] for name, project in projects.items()}
    assert len(set(numbers.values())) == 1, numbers
    for name, number in numbers.items():
        assert version(f"stillhouse-{name}") == number


def test_domains_depend_on_the_core_of_their_own_minor_version(projects: dict[str, dict[str, Any]]) -> None:
    own = Version(projects["core"]["project"]["version"])
    for name, project in projects.items():
        requirements = [Requirement(line) for line in project["project"]["dependencies"]]
        ours = [r for r in requirements if r.name.startswith("stillhouse")]
        if name == "core":
            assert ours == []
            continue
        assert [r.name for r in ours] == ["stillhouse-core"], "a domain depends on the core alone"
        assert ours[0].url is None
        assert ours[0].specifier == SpecifierSet(f">={own.major}.{own.minor},<{own.major}.{own.minor + 1}")


@pytest.mark.parametrize("key", ["requires-python", "license", "authors"])
def test_shared_fields_are_the_same_everywhere(projects: dict[str, dict[str, Any]], key: str) -> None:
    values = [project["project"][key] for project in projects.values()]
    assert all(value == values[0] for value in values)


def test_every_requirement_has_a_lower_bound_and_a_reason(folders: Folders) -> None:
    for name, folder in folders.items():
        text = (folder / "pyproject.toml").read_text(encoding="utf-8")
        block = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
        for line in block.strip().splitlines():
            assert ">=" in line, f"{name}: {line.strip()}"
            assert "#" in line or "stillhouse-core" in line, f"{name}: no reason given: {line.strip()}"


def test_no_package_asks_for_torchvision(projects: dict[str, dict[str, Any]]) -> None:
    for project in projects.values():
        table = project["project"]
        lines = [*table["dependencies"], *chain(*table.get("optional-dependencies", {}).values())]
        assert not [line for line in lines if canonicalize_name(Requirement(line).name) == "torchvision"]


def test_the_tested_set_satisfies_every_declared_range(
    root: Path, projects: dict[str, dict[str, Any]]
) -> None:
    pins = {}
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, number = line.split("==")
            pins[canonicalize_name(name)] = number
    for project in projects.values():
        table = project["project"]
        for line in [*table["dependencies"], *chain(*table.get("optional-dependencies", {}).values())]:
            requirement = Requirement(line)
            if requirement.name.startswith("stillhouse"):
                continue
            name = canonicalize_name(requirement.name)
            assert name in pins, f"constraints.txt does not pin {name}"
            assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is outside {requirement}"


def test_every_domain_has_its_entry_point_and_its_command(projects: dict[str, dict[str, Any]]) -> None:
    declared = {point.name: point.value for point in entry_points(group="stillhouse.domains")}
    for name, project in projects.items():
        if name == "core":
            assert project["project"]["scripts"] == {"stillhouse": "stillhouse.core.cli:main"}
            continue
        expected = f"stillhouse.{name}.domain:DOMAIN"
        assert project["project"]["entry-points"]["stillhouse.domains"] == {name: expected}
        assert declared[name] == expected
        assert project["project"]["scripts"] == {f"stillhouse-{name}": f"stillhouse.{name}.cli:main"}


def test_every_package_has_the_rooms_of_a_package(folders: Folders) -> None:
    for name, folder in folders.items():
        source = folder / "src" / "stillhouse" / name
        for needed in ("README.md", "LICENSE", "tests", "benchmarks"):
            assert (folder / needed).exists(), f"{name}: no {needed}"
        assert (source / "py.typed").is_file()
        assert (source / "__init__.py").is_file()
        assert [path.name for path in source.parent.iterdir() if path.name != "__pycache__"] == [name]


def test_the_licence_is_the_same_file_everywhere(root: Path, folders: Folders) -> None:
    text = (root / "LICENSE").read_bytes()
    assert all((folder / "LICENSE").read_bytes() == text for folder in folders.values())


def test_the_namespace_has_no_init(folders: Folders) -> None:
    stray = [folder / "src" / "stillhouse" / "__init__.py" for folder in folders.values()]
    assert [path for path in stray if path.exists()] == []


def test_the_root_is_a_workspace_and_no_project(root: Path, folders: Folders) -> None:
    workspace = read(root / "pyproject.toml")
    assert "project" not in workspace
    assert workspace["tool"]["uv"]["workspace"]["members"] == ["shared", "packages/*"]
    assert workspace["tool"]["uv"]["sources"] == {"stillhouse-core": {"workspace": True}}
    for folder in folders.values():  # a member that says so itself could not be built outside the workspace
        assert "uv" not in read(folder / "pyproject.toml")["tool"]
    linted = workspace["tool"]["importlinter"]["root_packages"]
    assert sorted(linted) == sorted(f"stillhouse.{name}" for name in folders)
    layers = workspace["tool"]["importlinter"]["contracts"][0]["layers"]
    above = [name for name in folders if name != "core"]
    assert sorted(re.findall(r"stillhouse\.(\w+)", layers[0])) == above
    assert layers[1] == "stillhouse.core"
