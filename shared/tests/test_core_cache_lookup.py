"""Looking rows up: in any order, over many shards, from several processes; filling what is missing."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stillhouse.core.cache import CacheSpec, TeacherCache
from stillhouse.core.errors import DataError
from stillhouse.core.teacher import (
    EmbeddingSignal,
    TeacherSignal,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec(kind: str, **changes: object) -> CacheSpec:
    return CacheSpec(**{"kind": kind, "teacher": "t", "teacher_hash": "abc", **changes})  # type: ignore[arg-type]


def store(path: Path, spec: CacheSpec, signal: TeacherSignal, count: int, **options: object) -> TeacherCache:
    mask = options.pop("mask", None)
    with TeacherCache.create(path, spec, **options) as writer:  # type: ignore[arg-type]
        writer.add(list(range(count)), signal, mask=mask)  # type: ignore[arg-type]
        writer.finish()
    return TeacherCache.open(path, expect=spec, verify=True)


def test_shuffled_and_repeated_lookups_over_many_shards(tmp_path: Path):
    values = normal(0, 500, 8)
    names = [f"sample/{row}" for row in range(500)]
    made = spec("embedding", dtype="float32")
    with TeacherCache.create(tmp_path, made, shard_bytes=700) as writer:
        for start in range(0, 500, 7):
            writer.add(names[start : start + 7], EmbeddingSignal(values[start : start + 7]))
        writer.finish()
    cache = TeacherCache.open(tmp_path, verify=True)
    assert len(cache) == 500
    assert len(cache.shards) == 18  # four batches of 224 bytes each reach 700
    order = torch.randint(0, 500, (300,), generator=torch.Generator().manual_seed(1))
    signal = cache.lookup([names[row] for row in order]).signal
    assert isinstance(signal, EmbeddingSignal)
    assert torch.equal(signal.values, values[order])
    assert "sample/3" in cache
    assert "sample/500" not in cache
    assert cache.missing(["x", "sample/1", "y"]) == [0, 2]
    with pytest.raises(DataError, match=r"2 of 3 ids are not in the cache, such as \['x', 'y'\]"):
        cache.lookup(["x", "sample/1", "y"])
    with pytest.raises(ValueError, match="at least one"):
        cache.lookup([])
    with pytest.raises(ValueError, match="layout"):
        cache.lookup(["sample/1"], layout="ragged")  # type: ignore[arg-type]


def test_another_augmentation_seed_is_another_sample(tmp_path: Path):
    with TeacherCache.create(tmp_path, spec("embedding", dtype="float32")) as writer:
        writer.add([("a.png", 1), ("a.png", 2)], EmbeddingSignal(torch.tensor([[1.0], [2.0]])))
        writer.finish()
    cache = TeacherCache.open(tmp_path)
    assert cache.lookup([("a.png", 2)]).signal.values.item() == 2.0  # type: ignore[union-attr]
    for other in ("a.png", ("a.png", 3), ("b.png", 1)):
        with pytest.raises(DataError, match="augmentation seed"):
            cache.lookup([other])


class _Rows(Dataset[Tensor]):
    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Tensor:
        return self.cache.lookup([index]).signal.values[0]  # type: ignore[union-attr]


def test_readers_in_other_processes_and_after_pickling(tmp_path: Path):
    values = normal(0, 24, 3)
    cache = store(tmp_path, spec("embedding", dtype="float32"), EmbeddingSignal(values), 24, shard_bytes=50)
    twin = pickle.loads(pickle.dumps(cache))
    assert torch.equal(twin.lookup(torch.arange(24)).signal.values, values)
    loaded = torch.cat(list(DataLoader(_Rows(cache), batch_size=4, num_workers=2)))
    assert torch.equal(loaded, values)
