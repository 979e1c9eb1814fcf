"""Domains: the object, its references, discovery that no broken package stops."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from stillhouse.core.domain import BrokenDomainError, Domain, Installed, discover, load_object

PARTS = {
    "name": "toy",
    "title": "A toy",
    "config": "toy_domain.config:Config",
    "configs": "toy_domain.configs",
    "train": "toy_domain.work:train",
    "evaluate": "toy_domain.work:evaluate",
    "report": "toy_domain.work:report",
    "export": "toy_domain.work:export",
}


def test_parts_load_on_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toy_domain"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text("def train(config, run):\n    return {'seen': config}\n")
    (package / "broken.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    domain = Domain(**PARTS, verbs="toy_domain.broken:add")
    assert domain.load("train")(3, None) == {"seen": 3}
    with pytest.raises(BrokenDomainError, match=r"toy: toy_domain\.work:evaluate is missing"):
        domain.load("evaluate")
    with pytest.raises(BrokenDomainError, match=r"toy: toy_domain\.config:Config is missing"):
        domain.load("config")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        domain.load("verbs")
    with pytest.raises(ValueError, match="must name a reference"):
        domain.load("title")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("name", "Two Words", "one lower-case word"),
        ("train", "toy_domain.work.train", "module:attribute"),
        ("verbs", "toy:", "module:attribute"),
        ("configs", "toy_domain/configs", "dotted name"),
        ("formats", (), "at least one format"),
    ],
)
def test_a_malformed_domain_is_refused(part: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Domain(**{**PARTS, part: value})


def test_load_object_follows_dots_and_refuses_other_forms() -> None:
    assert load_object("os:path.join")("a", "b") == str(Path("a") / "b")
    with pytest.raises(ValueError, match='form "module:attribute"'):
        load_object("os.path")


def installed(tmp_path: Path, name: str, module: str, text: str) -> Installed:
    (tmp_path / f"{module}.py").write_text(text)
    point = EntryPoint(name=name, value=f"{module}:DOMAIN", group="stillhouse.domains")
    return Installed(name=name, distribution="dist", version="1", summary="", entry_point=point)


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("broken_raises", "raise RuntimeError('two\\nlines')", r"cannot be loaded: RuntimeError: two lines"),
        ("broken_syntax", "def (:", r"cannot be loaded: SyntaxError"),
        (
            "broken_import",
            "import nowhere_at_all",
            r"cannot be loaded: ModuleNotFoundError: .*nowhere_at_all",
        ),
        ("broken_missing", "", r"cannot be loaded: AttributeError"),
        ("broken_kind", "DOMAIN = 3", r"is a int, no Domain"),
    ],
)
def test_a_broken_domain_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str, message: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BrokenDomainError, match=message) as caught:
        installed(tmp_path, "toy", module, text).load()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("toy (dist 1): ")


def test_a_domain_must_have_the_name_of_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = f"from stillhouse.core.domain import Domain\nDOMAIN = Domain(**{PARTS!r})\n"
    assert installed(tmp_path, "toy", "named_right", text).load().title == "A toy"
    with pytest.raises(BrokenDomainError, match="calls itself 'toy'"):
        installed(tmp_path, "other", "named_wrong", text).load()


def distribution(folder: Path, name: str, points: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: About {name}\n"
    )
    info.joinpath("entry_points.txt").write_text(f"[stillhouse.domains]\n{points}\n")


def test_discovery_reads_metadata_and_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path / "a", "dist-one", "aaa = module_that_does_not_exist:DOMAIN")
    distribution(tmp_path / "b", "dist-two", "aaa = another_missing:DOMAIN\nzzz = also_missing:DOMAIN")
    monkeypatch.syspath_prepend(str(tmp_path / "b"))
    monkeypatch.syspath_prepend(str(tmp_path / "a"))
    found = discover()
    assert list(found) == sorted(found)
    assert found["aaa"].distribution == "dist-one"
    assert found["zzz"].summary == "About dist-two"
    assert found["zzz"].version == "1.0"
    with pytest.raises(BrokenDomainError, match="also_missing"):
        found["zzz"].load()
