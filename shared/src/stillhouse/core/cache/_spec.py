"""What a cache holds and what it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import DataError

SCHEMA = "stillhouse-teacher-cache/1"
Kind = Literal["dense", "topk", "embedding", "hidden", "relation"]
DType = Literal["float16", "bfloat16", "float32", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Everything that must agree between the run that made a cache and the run that reads it.

    Args:
        kind: "dense" logits, "topk" logits with the logsumexp over all V at each temperature, "embedding",
            "hidden" states or feature maps by name, "relation" maps.
        teacher: Name of the teacher, for people.
        teacher_hash: Hash of its weights (`stillhouse.core.teacher.weight_hash`).
        vocabulary_hash: Hash of the token → id map or the class names (`vocabulary_hash`); None without a
            vocabulary.
        preprocessing_hash: Hash of what decides the teacher's input, augmentation seed included
            (`settings_hash`).
        vocab: V, for "dense" and "topk".
        k: Kept tokens a row, for "topk".
        temperatures: Temperatures whose logsumexp is stored, for "topk". A "dense" cache serves every
            temperature.
        dtype: Of the stored values. Logits are stored relative to their row's maximum, so that float16 is
            precise where the mass is; dense ones get the maximum back, top-k ones come back relative to it.
            "int8", with a float32 scale a row, for all but logits.
        ragged: Samples have different numbers of rows (tokens).
        log_values: The teacher gives log-probabilities only. With k < V they fix the distribution at T = 1
            alone.

    Raises:
        ValueError: A value, or a combination, that makes no sense.
    """

    kind: Kind
    teacher: str
    teacher_hash: str
    vocabulary_hash: str | None = None
    preprocessing_hash: str = ""
    vocab: int | None = None
    k: int | None = None
    temperatures: tuple[float, ...] = (1.0,)
    dtype: DType = "float16"
    ragged: bool = False
    log_values: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        for name, allowed in (("kind", get_args(Kind)), ("dtype", get_args(DType))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        if not self.teacher or not self.teacher_hash:
            raise ValueError("teacher and teacher_hash must not be empty")
        logits = self.kind in ("dense", "topk")
        if logits and (self.vocab is None or not 1 <= self.vocab < 2**31):
            raise ValueError(f"kind={self.kind!r} needs vocab in [1, 2³¹), got {self.vocab!r}")
        if not logits and self.vocab is not None:
            raise ValueError(f"vocab means nothing with kind={self.kind!r}")
        if self.kind == "topk" and (self.k is None or not 1 <= self.k <= (self.vocab or 0)):
            raise ValueError(f"k must lie in [1, vocab={self.vocab}], got {self.k!r}")
        if self.kind != "topk" and self.k is not None:
            raise ValueError(f"k means nothing with kind={self.kind!r}")
        if self.log_values and self.kind not in ("dense", "topk", "relation"):
            raise ValueError(f"log_values means nothing with kind={self.kind!r}")
        if logits and self.dtype == "int8":
            raise ValueError("logits are stored as float16, bfloat16 or float32, not int8")
        if self.ragged and self.kind in ("embedding", "relation"):
            raise ValueError(f"kind={self.kind!r} has one entry a sample and cannot be ragged")
        if not self.temperatures or any(not (math.isfinite(t) and t > 0) for t in self.temperatures):
            raise ValueError(f"temperatures must be finite numbers > 0, got {self.temperatures}")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures must be different, got {self.temperatures}")
        if self.kind != "topk" and self.temperatures != (1.0,):
            raise ValueError(
                f"temperatures belong to kind='topk', got {self.temperatures} with {self.kind!r}"
            )
        if self.kind == "topk" and self.log_values and self.k != self.vocab and self.temperatures != (1.0,):
            raise ValueError(
                f"{self.k} of {self.vocab} log-probabilities fix the distribution at T=1 only, got "
                f"temperatures={self.temperatures}; store raw logits, or k=vocab"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: Path) -> CacheSpec:
        """Reads the fields back.

        Raises:
            DataError: Fields that are missing, unknown or wrong; the message names `path`.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise DataError(
                f"{path}: the specification has the fields {sorted(values)}, expected {sorted(names)}"
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: the specification is damaged: {error}") from error

    def check(self, expected: CacheSpec | Mapping[str, Any], path: Path) -> None:
        """Compares with what a run expects.

        Args:
            expected: A whole specification, or some of its fields.
            path: For the message.

        Raises:
            DataError: They differ; the message names each field with both values.
            ValueError: A field that does not exist.
        """
        wanted = expected.to_dict() if isinstance(expected, CacheSpec) else dict(expected)
        mine = self.to_dict()
        unknown = sorted(set(wanted) - set(mine))
        if unknown:
            raise ValueError(f"a cache specification has no {unknown}; its fields are {sorted(mine)}")
        if "temperatures" in wanted:
            wanted["temperatures"] = [float(t) for t in wanted["temperatures"]]
        differences = [
            f"{name} is {mine[name]!r} in the cache and {wanted[name]!r} in this run"
            for name in mine
            if name in wanted and mine[name] != wanted[name]
        ]
        if differences:
            raise DataError(f"{path}: the cache does not fit: {'; '.join(differences)}. Make another cache")

    @property
    def id_bytes(self) -> int:
        """Bytes of a stored token id: 2, 3 or 4, by the size of the vocabulary."""
        vocab = self.vocab or 1
        return 2 if vocab <= 2**16 else 3 if vocab <= 2**24 else 4
