from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.errors import DataError
from stillhouse.core.testing import run_script
from stillhouse.core.train import latest_checkpoint, load_checkpoint, save_checkpoint


def parts(step: int) -> dict:
    return {
        "weights.student": {"w": torch.full((3, 5), float(step)), "b": torch.ones(2)},
        "run": {"step": step},
    }


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.builds(
        lambda n, dtype: torch.arange(n).to(dtype),
        st.integers(0, 4),
        st.sampled_from([torch.bfloat16, torch.int64]),
    ),
)
KEYS = st.one_of(st.integers(), st.text(max_size=4), st.sampled_from(["$tensor", "a.b", "a"]))
NESTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(nest=NESTS)
def test_any_nest_comes_back_as_it_was(nest: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save_checkpoint(tmp_path_factory.mktemp("nest"), 1, {"part": nest})
    assert equal(load_checkpoint(path).parts["part"], nest)


def test_views_tied_tensors_and_strange_layouts(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "tied": base,
        "again": base,
        "column": base[:, 1],
        "transposed": base.t(),
        "scalar": torch.tensor(3.0),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    path = save_checkpoint(tmp_path, 1, {"part": state})
    read = load_checkpoint(path).parts["part"]
    assert equal({k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in state.items()}, read)
    assert read["tied"] is read["again"]  # stored once


def test_what_a_checkpoint_cannot_hold_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"run\.deep\.0 is a set"):
        save_checkpoint(tmp_path, 1, {"run": {"deep": [{1, 2}]}})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="must be named"):
        save_checkpoint(tmp_path, 1, {"../run": {}})


def test_keep_removes_the_oldest_and_counts_good_ones_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, parts(step), keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "weights.student.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 4, parts(4), keep=2)
    assert (tmp_path / "step-00000002").is_dir()  # 3 is broken: 2 is one of the two good ones


def test_same_step_is_replaced_and_leftovers_are_swept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, parts(5))
    (tmp_path / ".partial-dead").mkdir()
    (tmp_path / ".removed-dead").mkdir()
    path = save_checkpoint(tmp_path, 5, parts(7))
    assert load_checkpoint(path).parts["run"] == {"step": 7}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


FILES = ["manifest.json", "state.json", "weights.student.safetensors"]


def damage_cut(file: Path, at: int) -> None:
    file.write_bytes(file.read_bytes()[:at])


def damage_flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_cut_at_any_byte_is_refused_and_resume_falls_back(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = save_checkpoint(tmp_path, 1, parts(1))
    broken = save_checkpoint(tmp_path, 2, parts(2))
    whole = (broken / name).read_bytes()
    offsets = sorted({*range(0, len(whole), max(len(whole) // 40, 1)), 1, 7, 8, 9, len(whole) - 1})
    for at in offsets:
        (broken / name).write_bytes(whole[:at])
        with pytest.raises(DataError, match=name) as error:
            load_checkpoint(broken)
        assert "remove this folder" in str(error.value)
        assert "\n" not in str(error.value)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert latest_checkpoint(tmp_path) == good
        assert [r.getMessage().startswith("skipping a broken checkpoint") for r in caplog.records] == [True]
        assert load_checkpoint(good).parts["run"] == {"step": 1}
    (broken / name).write_bytes(whole)
    assert latest_checkpoint(tmp_path) == broken


@pytest.mark.parametrize("name", FILES[1:])
def test_one_changed_bit_is_noticed(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, parts(1))
    size = (path / name).stat().st_size
    for at in range(0, size, max(size // 20, 1)):
        damage_flip(path / name, at)
        with pytest.raises(DataError, match="SHA-256"):
            load_checkpoint(path)
        damage_flip(path / name, at)
    load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.update(format="other"),
        lambda m: m.update(files=[]),
        lambda m: m.update(step="x"),
        lambda m: m["files"].pop("state.json"),
        lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0"}}),
    ],
)
def test_a_manifest_that_lies_is_refused(change: Callable[[dict], object], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, parts(1))
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        load_checkpoint(path)


def test_missing_file_and_missing_folder(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, parts(1))
    (path / "weights.student.safetensors").unlink()
    with pytest.raises(DataError, match="missing from the checkpoint"):
        load_checkpoint(path)
    shutil.rmtree(path)
    with pytest.raises(DataError, match="no checkpoint here"):
        load_checkpoint(path)
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


WRITER = """
import sys, torch
from pathlib import Path
from stillhouse.core.train import save_checkpoint
folder = Path(sys.argv[1])
for step in range(1, 10_000):
    weights = {"w": torch.full((64, 1024), float(step))}
    save_checkpoint(folder, step, {"weights": weights, "run": {"step": step}})
"""


@pytest.mark.parametrize("target", [3, 8])
def test_a_kill_while_writing_leaves_a_good_checkpoint(target: int, tmp_path: Path) -> None:
    def writing() -> bool:
        # any later step will do: the one aimed at may be cleared away between two looks
        far = any(int(path.name.removeprefix("step-")) >= target for path in tmp_path.glob("step-*"))
        return far and any(tmp_path.glob(".partial-*/*.safetensors"))

    result = run_script(["-c", WRITER, tmp_path], kill_when=writing)
    assert result.returncode == -9, result.stderr
    path = latest_checkpoint(tmp_path)
    assert path is not None
    read = load_checkpoint(path)
    assert read.step >= target
    assert torch.equal(read.parts["weights"]["w"], torch.full((64, 1024), float(read.step)))
