"""Files that appear whole or not at all; checks of configurations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from stillhouse.core.config import check_at_least, check_choice, check_finite, check_share
from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.files import replacing


def test_a_file_appears_with_its_folders_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x.txt"
    with replacing(target) as work:
        work.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["x.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("old")

    def write_and_fail(target: Path) -> None:
        with replacing(target) as work:
            work.write_text("half")
            raise RuntimeError

    for target in (kept, tmp_path / "new" / "deep" / "x.txt"):
        with pytest.raises(RuntimeError):
            write_and_fail(target)
    assert kept.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, word in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(DataError, match=word), replacing(target):
            pass


@dataclass
class Section:
    name: str = "a"
    rate: float = 0.5
    steps: int = 1
    limits: tuple[float, ...] = (0.0, 1.0)


def test_a_sound_section_passes_every_check() -> None:
    good = Section()
    check_finite("train", good)
    check_at_least("train", good, steps=1, rate=0)
    check_share("train", good, "rate")
    check_choice("train", "name", good.name, Literal["a", "b"])


def test_each_check_names_field_value_and_what_is_allowed() -> None:
    nan = float("nan")
    for call, words in (
        (lambda: check_finite("train", Section(rate=nan)), "train.rate is nan"),
        (lambda: check_finite("train", Section(limits=(0.0, float("inf")))), "train.limits"),
        (
            lambda: check_at_least("train", Section(steps=0), steps=1),
            "train.steps is 0; it must be at least 1",
        ),
        (lambda: check_choice("train", "name", "c", Literal["a", "b"]), "allowed: 'a', 'b'"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert words in str(caught.value)


@pytest.mark.parametrize("ends", [(True, False), (False, True), (False, False), (True, True)])
def test_a_share_lies_between_its_ends(ends: tuple[bool, bool]) -> None:
    for value, allowed in ((0.0, ends[0]), (1.0, ends[1]), (0.3, True), (-0.1, False), (1.1, False)):
        if allowed:
            check_share("train", Section(rate=value), "rate", ends=ends)
        else:
            with pytest.raises(ConfigError, match="must lie in"):
                check_share("train", Section(rate=value), "rate", ends=ends)
