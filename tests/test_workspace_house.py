"""The house's rules that a machine can check: size, names, words, one basename a test file."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

Folders = dict[str, Path]
LIMIT = 600
# written in two halves so that this file does not find itself
PLACES = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/op" + "t/pypi", "C:\\" + "Users")
PENDING = ("TO" + "DO", "FIX" + "ME", "XX" + "X ", "NotImpl" + "ementedError")


def python_files(root: Path, folders: Folders) -> list[Path]:
    found = [path for folder in folders.values() for path in folder.rglob("*.py")]
    found += [*(root / "tests").rglob("*.py"), *(root / "apps").rglob("*.py"), *root.glob("*.py")]
    return [path for path in found if not {"build", "dist", ".nox"} & set(path.parts)]


def text_files(root: Path, folders: Folders) -> list[Path]:
    texts = [*root.glob("*.md"), *root.glob("*.toml"), *(root / "docs").rglob("*.md")]
    texts += [path for folder in folders.values() for path in (*folder.glob("*.md"), *folder.glob("*.toml"))]
    return [*python_files(root, folders), *texts]


def test_no_file_is_too_long(root: Path, folders: Folders) -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(root, folders)
    }
    assert lengths
    assert {str(path): count for path, count in lengths.items() if count > LIMIT} == {}


@pytest.mark.parametrize("word", [*PLACES, *PENDING])
def test_no_file_names_a_machine_or_promises_work(root: Path, folders: Folders, word: str) -> None:
    assert [str(path) for path in text_files(root, folders) if word in path.read_text(encoding="utf-8")] == []


def test_test_files_have_names_of_their_own(root: Path, folders: Folders) -> None:
    names = Counter(path.name for path in python_files(root, folders) if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_there_is_no_drawer_for_odds_and_ends(root: Path, folders: Folders) -> None:
    assert [path for path in python_files(root, folders) if path.stem in ("utils", "helpers", "misc")] == []


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Parse a file once for all the tests here."""
    return ast.parse(path.read_text(encoding="utf-8"))


def sources(folders: Folders) -> list[Path]:
    return [path for folder in folders.values() for path in (folder / "src").rglob("*.py")]


def test_every_module_says_what_it_is_and_defers_its_annotations(folders: Folders) -> None:
    for path in sources(folders):
        tree = tree_of(path)
        if not tree.body or "configs" in path.parts:
            continue
        assert ast.get_docstring(tree), f"{path}: no docstring"
        deferred = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        assert deferred, f"{path}: no `from __future__ import annotations`"


def test_no_source_asserts_or_reads_pickles(folders: Folders) -> None:
    for path in sources(folders):
        if "testing" in path.parts:
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Assert):  # `assert x is not None` tells the type checker what is known
                text = ast.unparse(node.test)
                narrowing = re.fullmatch(r"[\w.]+ is not None", text)
                assert narrowing, f"{path}:{node.lineno}: `assert {text}` instead of an error"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                place = f"{path}:{node.lineno}: {called}"
                assert not re.fullmatch(r"(c?[pP]ickle|dill|joblib|torch\.jit)\.loads?", called), place
                if called == "torch.load":
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("weights_only") == "True", f"{place} without weights_only=True"


def test_init_files_re_export_explicitly(folders: Folders) -> None:
    for path in sources(folders):
        if path.name == "__init__.py":
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.ImportFrom):
                    assert "*" not in [alias.name for alias in node.names], f"{path}: a star import"
