"""Looking at a cache and checking every byte of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ._cache import TeacherCache
from ._files import MANIFEST, FileRecord, WriterLock, check_hash, read_json
from ._spec import CacheSpec
from ._writer import read_list, shard_keys, sweep


def cache_info(path: str | Path) -> dict[str, Any]:
    """Describes a cache, finished or not, without reading its values.

    Returns:
        JSON-able: path, complete, spec, samples, rows, shards, bytes, bytes_per_row, duplicates, shapes,
        writers.

    Raises:
        DataError: It is no cache, or its manifest is damaged.
    """
    folder = Path(path)
    manifest = read_json(folder / MANIFEST)
    spec = CacheSpec.from_dict(manifest.get("spec", {}), folder / MANIFEST)
    writers = {}
    shards: list[FileRecord] = []
    for listed in sorted(folder.glob("writer-*.json")):
        mine, _, closed = read_list(listed, spec)
        shards += mine
        writers[listed.stem] = {"closed": closed, "samples": sum(record.samples for record in mine)}
    counts = manifest.get("counts") or {}
    if manifest.get("complete"):
        shards = [FileRecord.from_dict(record, folder / MANIFEST) for record in manifest["shards"]]
    rows, size = sum(record.rows for record in shards), sum(record.bytes for record in shards)
    return {
        "path": str(folder),
        "complete": bool(manifest.get("complete")),
        "spec": spec.to_dict(),
        "samples": counts.get("samples", sum(record.samples for record in shards)),
        "rows": rows,
        "shards": len(shards),
        "bytes": size,
        "bytes_per_row": round(size / rows, 2) if rows else None,
        "duplicates": counts.get("duplicates", 0),
        "shapes": manifest.get("shapes"),
        "writers": writers,
    }


def verify_cache(path: str | Path, *, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Reads every byte of a finished cache and compares it with the manifest.

    Args:
        path: Its folder.
        progress: Called with (files done, files in all).

    Returns:
        One line for each thing that is wrong; empty when all is well.
    """
    try:
        cache = TeacherCache.open(path)
    except DataError as error:
        return [str(error)]
    problems = []
    records = [*cache.shards, cache.index]
    for number, record in enumerate(records):
        try:
            check_hash(cache.path / record.name, record)
        except DataError as error:
            problems.append(str(error))
        if progress is not None:
            progress(number + 1, len(records))
    if problems:
        return problems
    keys = shard_keys(cache.path, cache.shards)
    if len(keys) != sum(record.samples for record in cache.shards):
        problems.append(f"{cache.path}: the shards hold {len(keys)} samples, the manifest says otherwise")
    unindexed = int((cache._keys.find(keys) < 0).sum())
    if unindexed or np.any(cache._keys.first[1:] < cache._keys.first[:-1]):
        problems.append(f"{cache.path / cache.index.name}: {unindexed} samples are not in the index")
    return problems


def clean(path: str | Path) -> list[str]:
    """Removes what killed writers left in a cache; writers that are at work are left alone.

    Returns:
        Names of the removed files.

    Raises:
        DataError: It is no cache.
    """
    folder = Path(path)
    spec = CacheSpec.from_dict(read_json(folder / MANIFEST).get("spec", {}), folder / MANIFEST)
    removed = []
    for listed in sorted(folder.glob("writer-*.json")):
        rank = int(listed.stem.split("-")[1])
        lock = WriterLock(folder / f"writer-{rank:05d}.lock")
        if lock.acquire():
            try:
                removed += sweep(folder, rank, read_list(listed, spec)[0])
            finally:
                lock.release()
    return removed
