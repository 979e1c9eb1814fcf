"""Configuration: strict conversion, inheritance, overrides, presets, round trips."""

from __future__ import annotations

import enum
import gc
import json
import subprocess
import sys
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.config import (
    check_class,
    describe,
    describe_preset,
    list_presets,
    load_config,
    resolve,
    save_config,
    to_dict,
)
from stillhouse.core.errors import ConfigError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(kw_only=True, slots=True, frozen=True)
class Optim:
    name: Literal["adam", "sgd"] = "adam"
    lr: float = 0.1
    milestones: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(kw_only=True, slots=True, frozen=True)
class Train:
    steps: int = 10
    devices: int | Literal["auto"] = 1
    clip: float | None = None
    nesterov: bool = False


@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    roles: Mapping[str, Optim] = field(default_factory=dict)
    root: Path | None = None
    title: str = "x"
    colour: Colour = Colour.RED
    grid: tuple[tuple[int, int], ...] = ()
    names: Sequence[str] = ()


def test_none_gives_the_defaults() -> None:
    assert load_config(Config, None) == Config()


def test_an_integer_becomes_a_float_and_only_there() -> None:
    config = load_config(Config, {"optim": {"lr": 1}})
    assert config.optim.lr == 1.0
    assert type(config.optim.lr) is float
    with pytest.raises(ConfigError, match=r"train\.steps: expected int, got 5\.0 \(float\); write 5"):
        load_config(Config, {"train": {"steps": 5.0}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lr": True}}, r"optim\.lr: expected float, got True \(bool\)"),
        ({"train": {"steps": True}}, r"train\.steps: expected int, got True"),
        ({"train": {"nesterov": 1}}, r"train\.nesterov: expected bool, got 1"),
        ({"train": {"nesterov": "true"}}, r"train\.nesterov: expected bool, got 'true' \(str\)"),
        ({"optim": {"lr": "0.1"}}, r"optim\.lr: expected float, got '0\.1'"),
        ({"title": 3}, r"title: expected str, got 3"),
        ({"optim": {"milestones": "123"}}, r"optim\.milestones: expected a list of int, got '123'"),
        ({"optim": {"milestones": [1, "2"]}}, r"optim\.milestones\[1\]: expected int, got '2'"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas: expected a list of 2 items \(float, float\)"),
        ({"grid": [[1, 2], [3]]}, r"grid\[1\]: expected a list of 2 items"),
        ({"train": {"devices": 1.5}}, r"train\.devices: expected int or 'auto', got 1\.5"),
        ({"train": {"devices": True}}, r"train\.devices: expected int or 'auto', got True"),
        ({"train": {"clip": "none"}}, r"train\.clip: expected float or none, got 'none'"),
        ({"optim": {"name": "adm"}}, r"one of 'adam', 'sgd', got 'adm' \(str\) \(did you mean 'adam'\?\)"),
        ({"optim": 3}, r"optim: expected a section with the fields name, lr, milestones, betas, got 3"),
        ({"optim": None}, r"optim: expected a section"),
        ({"colour": "green"}, r"colour: expected one of 'red', 'blue', got 'green'"),
        ({"roles": {"student": {"lr": "fast"}}}, r"roles\.student\.lr: expected float, got 'fast'"),
        ({"roles": {3: {}}}, r"roles: the names of a mapping must be strings, got 3"),
        ({"train": {"stpes": 3}}, r"train\.stpes: no such field \(did you mean 'steps'\?\); allowed: steps,"),
        ({"trian": {}}, r"trian: no such field \(did you mean 'train'\?\)"),
        ({"optim": {"lr": -1.0}}, r"optim: lr must be positive, got -1\.0"),
    ],
)
def test_a_wrong_value_names_field_value_and_what_is_allowed(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Config, values)


def test_a_required_field_is_asked_for_by_its_path() -> None:
    @dataclass(kw_only=True, slots=True, frozen=True)
    class Data:
        root: str

    Outer = dataclass(kw_only=True, slots=True, frozen=True)(
        type("Outer", (), {"__annotations__": {"data": Data}, "__module__": __name__})
    )
    with pytest.raises(ConfigError, match=r"^data\.root: required, expected str$"):
        load_config(Outer, None)
    assert load_config(Outer, {"data": {"root": "a"}}).data.root == "a"


def test_the_source_is_not_changed() -> None:
    source = {"optim": {"milestones": [1]}, "roles": {"a": {"lr": 2.0}}}
    before = json.dumps(source)
    load_config(Config, source, overrides=["optim.lr=3", "roles.a.lr=4"])
    assert json.dumps(source) == before


# --- files
# ------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_python_file_inherits_from_its_base(tmp_path: Path) -> None:
    write(
        tmp_path / "_base.py",
        "import math\n_half = 0.5\noptim = dict(lr=_half, milestones=(3, 5))\ntitle = 'b'\n",
    )
    child = write(
        tmp_path / "child.py",
        '"""One line."""\nfrom __future__ import annotations\n_base_ = ["./_base.py"]\n'
        'optim = dict(name="sgd")\n',
    )
    config = load_config(Config, child)
    assert config.optim == Optim(name="sgd", lr=0.5, milestones=(3, 5))
    assert config.title == "b"
    assert describe_preset(child) == "One line."


def test_delete_replaces_a_section_instead_of_merging(tmp_path: Path) -> None:
    write(tmp_path / "_base.py", "optim = dict(lr=0.5, name='sgd')\n")
    child = write(tmp_path / "child.py", "_base_ = './_base.py'\noptim = dict(_delete_=True, lr=0.25)\n")
    assert load_config(Config, child).optim == Optim(lr=0.25)


def test_read_base_style_inherits_too(tmp_path: Path) -> None:
    write(tmp_path / "base.py", "optim = dict(lr=0.5)\n")
    text = (
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
        "optim.update(name='sgd')\n"
    )
    assert load_config(Config, write(tmp_path / "child.py", text)).optim == Optim(name="sgd", lr=0.5)


def test_reading_a_python_file_raises_no_warning(tmp_path: Path) -> None:
    write(tmp_path / "_base.py", "title = 'b'\n")
    child = write(tmp_path / "child.py", "_base_ = ['./_base.py']\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_config(Config, child)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "title = (\n", r"a\.py:1: cannot be read: SyntaxError"),
        ("a.py", "x = 1\ny = 1 / 0\n", r"a\.py:2: cannot be read: ZeroDivisionError"),
        ("a.py", "_base_ = ['./nowhere.py']\n", r"a\.py: cannot be read: FileNotFoundError.*nowhere"),
        ("a.py", "titel = 'b'\n", r"a\.py: titel: no such field \(did you mean 'title'\?\)"),
        ("a.py", "optim = dict(lr='b')\n", r"a\.py: optim\.lr: expected float"),
        ("a.json", '{"title": "a", "title": "b"}', r"a\.json: no valid JSON: the key 'title' occurs twice"),
        ("a.json", '{"title": ', r"a\.json: no valid JSON"),
        ("a.json", "[1]", r"a\.json: expected a mapping at the top, got list"),
        ("a.json", '{"_base_": "b.json"}', r"_base_ works in Python"),
        ("a.yaml", "title: [1", r"a\.yaml: no valid YAML"),
        ("a.yaml", "title: a\ntitle: b\n", r"a\.yaml: no valid YAML: the key 'title' occurs twice"),
        ("a.yaml", "title: !!python/object/apply:os.getcwd []\n", r"a\.yaml: no valid YAML"),
        ("a.toml", "", r"a configuration file ends in \.py, \.json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Config, write(tmp_path / name, text))


def test_a_file_of_bytes_is_named(tmp_path: Path) -> None:
    for name in ("a.py", "a.json", "a.yaml"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(ConfigError, match=name):
            load_config(Config, tmp_path / name)


def test_objects_inside_a_mapping_are_taken_apart() -> None:
    config = load_config(Config, {"optim": Optim(lr=2.0)}, overrides=["optim.name=sgd"])
    assert config.optim == Optim(name="sgd", lr=2.0)
    twice = load_config(Config, None, overrides=['roles={"a": {"lr": 5}}', "roles.a.name=sgd"])
    assert twice.roles == {"a": Optim(name="sgd", lr=5.0)}


def test_a_deeply_nested_file_is_an_error_and_no_crash(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.json"):
        load_config(Config, write(tmp_path / "a.json", '{"title":' + "[" * 100_000 + "]" * 100_000 + "}"))


def test_yaml_reads_exponents_as_numbers_and_json_agrees(tmp_path: Path) -> None:
    from_yaml = load_config(
        Config, write(tmp_path / "a.yml", "optim:\n  lr: 1e-3\n  milestones: [1, 2]\nroot: data\n")
    )
    text = '{"optim": {"lr": 1e-3, "milestones": [1, 2]}, "root": "data"}'
    assert from_yaml == load_config(Config, write(tmp_path / "a.json", text))
    assert from_yaml.optim.lr == 1e-3
    assert from_yaml.root == Path("data")
    assert load_config(Config, write(tmp_path / "empty.yaml", "")) == Config()


# --- overrides
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "get"),
    [
        ("optim.lr=3e-4", lambda c: c.optim.lr == 3e-4),
        ("optim.lr=inf", lambda c: c.optim.lr == float("inf")),
        ("train.steps=1_000", lambda c: c.train.steps == 1000),
        ("train.nesterov=true", lambda c: c.train.nesterov is True),
        ("train.nesterov=off", lambda c: c.train.nesterov is False),
        ("train.devices=auto", lambda c: c.train.devices == "auto"),
        ("train.devices=4", lambda c: c.train.devices == 4),
        ("train.clip=none", lambda c: c.train.clip is None),
        ("train.clip=1", lambda c: c.train.clip == 1.0),
        ("optim.milestones=3,5", lambda c: c.optim.milestones == (3, 5)),
        ("optim.milestones=[3, 5]", lambda c: c.optim.milestones == (3, 5)),
        ("optim.milestones=", lambda c: c.optim.milestones == ()),
        ("optim.betas=(0.8, 0.9)", lambda c: c.optim.betas == (0.8, 0.9)),
        ("grid=[(1,2),(3,4)]", lambda c: c.grid == ((1, 2), (3, 4))),
        ("names=['a','b']", lambda c: c.names == ("a", "b")),
        ("roles.critic.lr=2", lambda c: c.roles["critic"] == Optim(lr=2.0)),
        ('roles={"a": {"lr": 5}}', lambda c: c.roles == {"a": Optim(lr=5.0)}),
        ("root=/tmp/a=b", lambda c: c.root == Path("/tmp/a=b")),
        ("title=1,2", lambda c: c.title == "1,2"),
        ("title=none", lambda c: c.title == "none"),
        ("colour=blue", lambda c: c.colour is Colour.BLUE),
    ],
)
def test_an_override_is_typed_by_the_annotation(override: str, get: typing.Callable[[Config], bool]) -> None:
    assert get(load_config(Config, None, overrides=[override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", r"--set optim\.lr: expected FIELD=VALUE"),
        ("=3", r"expected FIELD=VALUE"),
        ("optim=3", r"optim is a section; set one of optim\.name, optim\.lr"),
        ("optim.rl=3", r"no field optim\.rl \(did you mean 'lr'\?\)"),
        ("title.x=3", r"title is a single value and has no field 'x'"),
        ("train.steps=1e3", r"--set train\.steps=1e3: train\.steps: expected int, got '1e3'"),
        ("train.nesterov=1", r"train\.nesterov: expected bool"),
        ("optim.betas=1,2,3", r"optim\.betas: expected a list of 2 items"),
        ("optim.milestones=1,x", r"optim\.milestones\[1\]: expected int, got 'x'"),
        ("optim.lr=-2", r"optim: lr must be positive, got -2\.0"),
    ],
)
def test_a_wrong_override_is_shown_as_it_was_given(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Config, None, overrides=[override])


def test_the_last_override_wins_over_earlier_ones_and_the_file() -> None:
    config = load_config(Config, {"optim": {"lr": 1.0}}, overrides=["optim.lr=2", "optim.lr=3"])
    assert config.optim.lr == 3.0


def test_a_value_that_the_file_has_wrong_can_be_overridden() -> None:
    assert load_config(Config, {"optim": {"lr": -1.0}}, overrides=["optim.lr=2"]).optim.lr == 2.0


# --- presets
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "preset_package" / "configs"
    package.mkdir(parents=True)
    write(package / "__init__.py", "")
    write(package / "_base.py", "title = 'base'\n")
    write(package / "demo.py", '"""A demo."""\n_base_ = ["./_base.py"]\n')
    write(package / "paper.json", '{"title": "paper"}')
    monkeypatch.syspath_prepend(str(tmp_path))
    return "preset_package.configs"


def test_presets_are_listed_and_loaded_by_name(presets: str) -> None:
    assert list(list_presets(presets)) == ["demo", "paper"]
    assert load_config(Config, "demo", presets=presets).title == "base"
    assert load_config(Config, "paper", presets=presets).title == "paper"


def test_an_unknown_preset_names_the_nearest(presets: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no preset 'dmeo' \(did you mean 'demo'\?\); shipped: demo, paper"
    ):
        load_config(Config, "dmeo", presets=presets)
    with pytest.raises(ConfigError, match=r"none are shipped here"):
        resolve("demo")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        list_presets("no_such_package")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py: no such configuration file"):
        resolve("nowhere.py")


# --- saving
# -----------------------------------------------------------------------------------------------------------

FLOATS = st.floats(min_value=1e-9, allow_infinity=True)
OPTIMS = st.builds(
    Optim,
    name=st.sampled_from(["adam", "sgd"]),
    lr=FLOATS,
    milestones=st.lists(st.integers()).map(tuple),
    betas=st.tuples(FLOATS, FLOATS),
)
CONFIGS = st.builds(
    Config,
    optim=OPTIMS,
    train=st.builds(
        Train,
        steps=st.integers(),
        devices=st.integers() | st.just("auto"),
        clip=st.none() | st.floats(allow_nan=False),
        nesterov=st.booleans(),
    ),
    roles=st.dictionaries(st.text(min_size=1), OPTIMS, max_size=3),
    root=st.none() | st.just(Path("some/where")),
    title=st.text(),
    colour=st.sampled_from(Colour),
    grid=st.lists(st.tuples(st.integers(), st.integers()), max_size=3).map(tuple),
    names=st.lists(st.text(), max_size=3).map(tuple),
)


@given(CONFIGS)
@settings(max_examples=60, deadline=None)
def test_a_configuration_survives_json(config: Config) -> None:
    text = json.dumps(to_dict(config), allow_nan=False)
    assert load_config(Config, json.loads(text)) == config
    assert load_config(Config, config) == config


def test_a_saved_configuration_loads_again(tmp_path: Path) -> None:
    config = Config(optim=Optim(lr=float("inf")), root=Path("ä"), grid=((1, 2),))
    path = save_config(config, tmp_path / "deep" / "config.json")
    assert load_config(Config, path) == config


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(max_examples=80, deadline=None)
def test_any_value_for_any_field_converts_or_is_a_config_error(value: object) -> None:
    for name in ("optim", "train", "roles", "root", "title", "colour", "grid", "names"):
        try:
            loaded = load_config(Config, {name: value})
        except ConfigError:
            continue
        else:
            assert load_config(Config, to_dict(loaded)) == loaded or "nan" in str(to_dict(loaded))


# --- the classes
# ------------------------------------------------------------------------------------------------------


def test_check_class_accepts_a_good_class() -> None:
    check_class(Config)


def test_check_class_refuses_what_breaks_the_rules() -> None:
    @dataclass
    class Loose:
        a: int = 1

    @dataclass(frozen=True, slots=True)
    class Positional:
        a: int = 1

    @dataclass(frozen=True, kw_only=True)
    class Dict:
        a: int = 1

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Odd:
        a: complex = 1j

    for cls, message in (
        (Loose, "frozen=True"),
        (Positional, "kw_only"),
        (Dict, "slots=True"),
        (Odd, "complex"),
    ):
        with pytest.raises(TypeError, match=message):
            check_class(cls)
    with pytest.raises(TypeError, match="must be a dataclass"):
        load_config(int, None)
    with pytest.raises(TypeError, match="source must be a name, a path, a mapping or a Config, got int"):
        load_config(Config, 3)  # type: ignore[arg-type]


@dataclass(kw_only=True, slots=True, frozen=True)
class Deep:
    config: Config = field(default_factory=Config)


def test_check_class_refuses_a_third_level() -> None:
    with pytest.raises(TypeError, match="the limit is two levels"):
        check_class(Deep)


def test_annotations_read_as_words() -> None:
    assert describe(int | Literal["auto"] | None) == "int or 'auto' or none"
    assert describe(Mapping[str, float]) == "a mapping from names to float"
    assert describe(Path) == "a path"


def test_introspection_imports_no_torch() -> None:
    code = (
        "import sys\nfrom dataclasses import dataclass\nfrom stillhouse.core.config import *\n"
        "@dataclass(kw_only=True, slots=True, frozen=True)\nclass C:\n    a: int = 1\n"
        "load_config(C, {'a': 2}, overrides=['a=3'])\n"
        "print([name for name in ('torch', 'mmengine', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
