"""What the documents say is so: commands exist, code runs, rows of PAPERS.md point at code and tests."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("shared/src/**/*.py"), *ROOT.glob("packages/*/src/**/*.py")])
PATTERNS = ("*.md", "docs/**/*.md", "shared/*.md", "packages/*/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
FENCE = re.compile(
    r"^(?P<mark><!-- not run: .+ -->\n+)?```(?P<kind>\w*)[^\n]*\n(?P<body>.*?)^```", re.M | re.S
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.parts[path.parts.index("src") + 1 :]
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


def blocks(path: Path, *kinds: str) -> Iterator[str]:
    for match in FENCE.finditer(path.read_text(encoding="utf-8")):
        if match["kind"] in kinds and not match["mark"]:
            yield match["body"]


DOCTESTED = [path for path in SOURCES if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", DOCTESTED, ids=name_of)
def test_the_examples_of_the_source_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module_of(path))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if list(blocks(p, "python"))], ids=name_of)
def test_the_python_code_of_a_document_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    for number, body in enumerate(blocks(path, "python"), start=1):
        exec(compile(body, f"{name_of(path)} block {number}", "exec", dont_inherit=True), scope)


def commands() -> Iterator[tuple[Path, str]]:
    for path in DOCUMENTS:
        for body in blocks(path, "bash", "sh", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ").split("  #")[0].strip()
                for part in re.split(r"&&|;", line):
                    if part.strip() and not part.strip().startswith("#"):
                        yield path, part.strip()


def sessions() -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(text.startswith("nox.session") for text in decorators):
                names.add(node.name)
    return names


def test_the_sessions_that_documents_name_exist() -> None:
    known, seen = sessions(), 0
    for path, command in commands():
        words = shlex.split(command)
        if words[0] == "nox" and "-s" in words:
            named = words[words.index("-s") + 1 :]
            named = named[: named.index("--")] if "--" in named else named
            for name in named:
                seen += 1
                assert name.split("(")[0] in known, f"{name_of(path)}: no session {name}"
                if "(" in name:
                    assert (ROOT / "packages" / name.split("(")[1].rstrip(")")).is_dir(), command
    assert seen >= 2, "the README names the demo and the tests"


def test_the_first_commands_of_the_readme_are_the_promised_ones() -> None:
    lines = [command for path, command in commands() if path == ROOT / "README.md"]
    assert lines[:2] == ["python -m pip install nox", "nox -s demo"]
    assert "nox -s tests" in lines
    assert "nox -s tests" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def called(command: str, domains: Collection[str]) -> tuple[str, list[str]] | None:
    """Return the domain and the arguments of a command that calls one, however it is started."""
    words = shlex.split(command)
    for position, word in enumerate(words):
        if word in {f"stillhouse-{name}" for name in domains} and position == 0:
            return word.removeprefix("stillhouse-"), words[1:]
        if word == "-m" and words[position + 1].removeprefix("stillhouse.") in domains:
            return words[position + 1].removeprefix("stillhouse."), words[position + 2 :]
        if word == "stillhouse" and words[position + 1 :][:1] and words[position + 1] in domains:
            return words[position + 1], words[position + 2 :]
    return None


def test_the_verbs_and_presets_that_documents_name_exist() -> None:
    import typer

    from stillhouse.core.cli import build_app
    from stillhouse.core.config import list_presets
    from stillhouse.core.domain import discover

    domains = {name: installed.load() for name, installed in discover().items()}
    seen = 0
    for path, command in commands():
        call = called(command, domains)
        if call is None:
            continue
        name, rest = call
        seen += 1
        place = f"{name_of(path)}: {command}"
        verbs = typer.main.get_command(build_app(domains[name])).commands  # type: ignore[attr-defined]
        if rest and not rest[0].startswith("-"):
            assert rest[0] in verbs, f"{place}: no verb {rest[0]}"
        wanted = [rest[rest.index("--config") + 1]] if "--config" in rest else []
        wanted += rest[2:3] if rest[:2] == ["configs", "show"] else []
        for preset in wanted:
            known = list_presets(domains[name].configs)
            assert preset in known or preset.endswith((".py", ".json", ".yaml")), f"{place}: no such preset"
    assert seen > 0


def test_local_links_of_documents_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{name_of(path)}: {target} leads nowhere"


def resolve(dotted: str) -> object:
    """Import the longest module of a dotted name and follow the rest as attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module {dotted}")


def test_rows_of_papers_point_at_code_and_tests() -> None:
    rows = [
        line
        for line in (ROOT / "PAPERS.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ][1:]
    assert rows
    for row in rows:
        if set(row) <= set("|- :"):
            continue
        names = re.findall(r"`(stillhouse\.[\w.]+)`", row)
        tests = re.findall(r"`([\w/]+/test_\w+\.py)`", row)
        assert names, f"no code in the row: {row}"
        assert tests, f"no test in the row: {row}"
        for name in names:
            resolve(name)
        for test in tests:
            assert (ROOT / test).is_file(), f"{test} does not exist"


def test_every_module_of_losses_has_a_page_and_says_when_to_use_it() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/losses/*.md"))
    rows = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
    folder = ROOT / "shared" / "src" / "stillhouse" / "core" / "losses"
    modules = sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
    assert len(modules) > 10
    for path in modules:
        assert re.search(rf"^::: {module_of(path)}$", pages, re.M), f"no page for {path.stem}"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert "When to use:" in text, f"{path.stem} does not say when to use it"
        if path.stem not in ("term", "vocabulary"):
            exported = re.findall(
                rf"^from \.{path.stem} import (\w+)", (folder / "__init__.py").read_text("utf-8"), re.M
            )
            assert any(f"`stillhouse.core.losses.{name}`" in rows for name in exported), path.stem


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in ROOT.glob("docs/**/*.md"):
        assert f": {path.relative_to(ROOT / 'docs')}\n" in navigation, path.name
