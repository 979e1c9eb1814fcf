"""Imports point down, stay light, and one domain alone works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

Folders = dict[str, Path]


def test_the_import_contracts_hold(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    code = "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())"
    command = [sys.executable, "-c", code, "--config", str(root / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def loaded_by(code: str, names: tuple[str, ...], cwd: Path) -> list[str]:
    """Run code in a fresh interpreter; return which of the modules it has loaded."""
    tail = f"\nimport sys, json\nprint(json.dumps([n for n in {names!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


HEAVY = (
    "lightning",
    "lightning.fabric",
    "lightning_fabric",
    "matplotlib",
    "monai",
    "mmengine",
    "tensorboard",
)


@pytest.mark.parametrize("part", ["", ".losses", ".schedules", ".config", ".run", ".domain", ".errors"])
def test_the_core_loads_no_heavy_library(tmp_path: Path, part: str) -> None:
    assert loaded_by(f"import stillhouse.core{part}", (*HEAVY, "typer"), tmp_path) == []


def test_the_bare_packages_do_not_even_load_torch(tmp_path: Path, folders: Folders) -> None:
    for name in folders:
        assert loaded_by(f"import stillhouse.{name}", ("torch", *HEAVY), tmp_path) == []


def test_the_help_of_every_domain_loads_no_torch(tmp_path: Path, folders: Folders) -> None:
    for name in folders:
        if name != "core":
            code = f"from stillhouse.{name}.cli import main\nassert main(['--help']) == 0"
            assert loaded_by(code, ("torch", "numpy", *HEAVY), tmp_path) == []


def test_a_domain_says_itself_and_its_rooms_resolve(folders: Folders) -> None:
    from stillhouse.core.config import check_class, list_presets, load_config
    from stillhouse.core.domain import discover

    found = discover()
    for name in folders:
        if name == "core":
            continue
        domain = found[name].load()
        assert domain.name == name
        for part in ("config", "train", "evaluate", "report", "export"):
            assert callable(domain.load(part))
        check_class(domain.load("config"))
        presets = list_presets(domain.configs)
        assert domain.demo in presets
        for preset in presets:
            load_config(domain.load("config"), preset, presets=domain.configs)


def test_the_module_and_the_root_command_reach_every_domain(tmp_path: Path, folders: Folders) -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    for name in folders:
        if name == "core":
            continue
        for command in (("-m", f"stillhouse.{name}"), ("-m", "stillhouse.core.cli", name)):
            done = subprocess.run(
                [sys.executable, *command, "--help"],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env=environment,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            for verb in ("demo", "train", "evaluate", "report", "export", "configs", "doctor"):
                assert verb in done.stdout


def test_a_domain_works_where_its_siblings_cannot_be_imported(tmp_path: Path, folders: Folders) -> None:
    domains = [name for name in folders if name != "core"]
    for name in domains:
        siblings = tuple(f"stillhouse.{other}" for other in domains if other != name)
        code = (
            "import sys\n"
            "class Block:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name in {siblings!r}:\n"
            "            raise ImportError(name + ' is blocked')\n"
            "sys.meta_path.insert(0, Block())\n"
            "from stillhouse.core.domain import discover\n"
            f"domain = discover()[{name!r}].load()\n"
            "parts = [domain.load(part) for part in ('config', 'train', 'evaluate', 'report', 'export')]\n"
        )
        assert loaded_by(code, siblings, tmp_path) == []
