"""Strict JSON for everything the project writes: no NaN, no silent conversion of keys, stable bytes."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np


def jsonable(value: Any, *, where: str = "value", nonfinite: str = "error", keys: str = "error") -> Any:
    """Turn a value into plain JSON types.

    Understands mappings with string keys, sequences, sets (sorted), dataclasses, enums, paths, NumPy scalars
    and arrays, and tensors of any shape on any device.

    Args:
        value: The value.
        where: How error messages name the value; keys and indices are appended to it.
        nonfinite: What a NaN or an infinite number becomes: "error" raises, "null" writes JSON null.
        keys: What a key that is not a string becomes: "error" raises, "text" writes `str(key)`.

    Returns:
        Nested dicts, lists, strings, ints, floats, booleans and None.

    Raises:
        TypeError: For a type that JSON does not have; the message names its place.
        ValueError: For a non-finite number under "error".

    Example:
        >>> jsonable({"lr": np.float32(0.5), "betas": (0.9, 0.999)})
        {'lr': 0.5, 'betas': [0.9, 0.999]}
    """
    if value is None or (isinstance(value, str | bool) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return jsonable(value.value, where=where, nonfinite=nonfinite, keys=keys)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if nonfinite == "null":
            return None
        raise ValueError(f"{where} is {value}, which JSON cannot hold; leave it out or give None")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return jsonable(fields, where=where, nonfinite=nonfinite, keys=keys)
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            if not isinstance(key, str) and keys == "error":
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}; keys must be str")
            result[str(key)] = jsonable(item, where=f"{where}.{key}", nonfinite=nonfinite, keys=keys)
        return result
    if isinstance(value, set | frozenset):
        return jsonable(sorted(value), where=where, nonfinite=nonfinite, keys=keys)
    if isinstance(value, list | tuple):
        return [
            jsonable(v, where=f"{where}[{i}]", nonfinite=nonfinite, keys=keys) for i, v in enumerate(value)
        ]
    if isinstance(value, np.generic | np.ndarray):
        return jsonable(value.tolist(), where=where, nonfinite=nonfinite, keys=keys)
    if hasattr(value, "detach") and hasattr(value, "tolist"):  # a torch tensor, without importing torch here
        return jsonable(value.detach().cpu().tolist(), where=where, nonfinite=nonfinite, keys=keys)
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which JSON cannot hold; "
        "give numbers, strings, lists or mappings"
    )


def dumps(value: Any) -> str:
    """Serialise plain JSON types with two spaces of indent, readable Unicode and a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
