"""Load a configuration, show it as plain values, save it."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ._convert import convert_section, fields_of, unbuilt
from ._override import apply_override
from ._source import read_source, resolve

C = TypeVar("C")


def load_config(
    cls: type[C],
    source: str | Path | Mapping[str, Any] | C | None,
    *,
    overrides: Sequence[str] = (),
    presets: str | None = None,
) -> C:
    """Build a configuration of class `cls`.

    Args:
        cls: a keyword-only, slotted, frozen dataclass (see `check_class`).
        source: a preset's name, a path (.py, .json, .yaml, .yml), a nested mapping, an instance of `cls`,
            or None for the defaults. Python files are executed.
        overrides: `"section.field=value"`, applied in order after the source, typed by the annotation.
        presets: dotted name of the package with the shipped presets, for names.

    Returns:
        A validated instance of `cls`.

    Raises:
        ConfigError: names the file, the field, the value and what is allowed.
        TypeError: `cls` is no dataclass.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(kw_only=True, slots=True, frozen=True)
        ... class Config:
        ...     lr: float = 0.1
        ...     steps: int = 100
        >>> load_config(Config, {"lr": 1}, overrides=["steps=20"])
        Config(lr=1.0, steps=20)
    """
    fields_of(cls)
    origin = ""
    values: dict[str, Any]
    if source is None:
        values = {}
    elif isinstance(source, cls | Mapping):
        values = unbuilt(source)
    elif isinstance(source, str | Path):
        path = resolve(source, presets)
        values = unbuilt(read_source(path))
        origin = f"{path}: "
    else:
        raise TypeError(
            f"source must be a name, a path, a mapping or a {cls.__name__}, got {type(source).__name__}"
        )
    for override in overrides:
        apply_override(cls, values, override)
    try:
        return convert_section(cls, values, "")
    except ConfigError as error:
        if not origin:
            raise
        raise ConfigError(f"{origin}{error}") from error.__cause__


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain JSON values, in the order of the fields.

    Paths become strings, tuples lists, enum members their values, and non-finite floats the words "inf",
    "-inf", "nan", so that `load_config(type(config), to_dict(config))` gives an equal configuration.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, float) and not math.isfinite(value):
            return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return value

    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config must be an instance of a configuration dataclass, got {config!r}")
    return plain(unbuilt(config))


def save_config(config: Any, path: str | Path) -> Path:
    """Write a configuration as JSON that `load_config` reads back; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(config), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path
