"""Processes that start together survive a half-written grammar cache."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from stillhouse.core import _yapf


def test_a_half_written_cache_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | None] = [EOFError("Ran out of input"), EOFError("Ran out of input"), None]

    def load(name: str) -> ModuleType:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return ModuleType(name)

    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(_yapf, "_PAUSE", 0.0)
    _yapf.import_yapf()
    assert answers == []


def test_a_cache_that_stays_broken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        raise EOFError("Ran out of input")

    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(_yapf, "_PAUSE", 0.0)
    with pytest.raises(EOFError):
        _yapf.import_yapf()
