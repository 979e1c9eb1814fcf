"""Writing a cache: one writer a process, whole shards, resumable after a kill at any byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..teacher import TeacherSignal, TeacherSource
from ._codec import Arrays, Encoded, Shapes, encode, select
from ._files import (
    MANIFEST,
    FileRecord,
    WriterLock,
    check_size,
    map_tensors,
    read_json,
    write_json,
    write_tensors,
)
from ._ids import Keys, KeyTable, SampleId, keys_of
from ._spec import CacheSpec

_NO_KEYS: Keys = np.empty((0, 2), np.uint64)


class CacheWriter:
    """Adds samples to a cache; made by `TeacherCache.create`.

    Samples are collected in memory and written as shards of about `shard_bytes`. A shard is written under
    another name, flushed, renamed, and then entered in the writer's own list; a kill at any moment loses at
    most what was in memory and leaves nothing half-written under a final name. Creating the writer again goes
    on where it stopped: `missing` says what is not stored yet.

    With several processes each has its own rank, its own shards and its own list; when all have called
    `close`, one of them calls `TeacherCache.merge`. A single process calls `finish`.
    """

    def __init__(self, path: Path, spec: CacheSpec, *, rank: int, shard_bytes: int) -> None:
        self.path, self.spec, self.rank, self.shard_bytes = path, spec, rank, shard_bytes
        self._lock = WriterLock(path / f"writer-{rank:05d}.lock")
        if not self._lock.acquire():
            raise DataError(f"{path}: another process writes as rank {rank}; give each process its own rank")
        try:
            self._stored, self._elsewhere = KeyTable.of(_NO_KEYS), KeyTable.of(_NO_KEYS)
            self._shapes: Shapes | None = None
            self._shards: list[FileRecord] = []
            self._resume()
        except BaseException:
            self._lock.release()
            raise
        self._pending: list[tuple[Keys, Encoded]] = []
        self._pending_keys: set[tuple[int, int]] = set()
        self._pending_bytes = 0
        self._open = True

    def missing(self, ids: Sequence[SampleId] | Tensor) -> list[int]:
        """Positions of the ids that are not stored yet, by this writer or, when it was made, by any other.

        A resumed run computes the teacher for these alone.
        """
        keys = keys_of(ids)
        stored = (self._stored.find(keys) >= 0) | (self._elsewhere.find(keys) >= 0)
        return [
            row
            for row, key in enumerate(map(tuple, keys.tolist()))
            if not stored[row] and key not in self._pending_keys
        ]

    def add(
        self, ids: Sequence[SampleId] | Tensor, signal: TeacherSignal, *, mask: Tensor | None = None
    ) -> None:
        """Adds a batch.

        Args:
            ids: One id a sample [n]; (id, augmentation seed) where the teacher saw an augmented input.
            signal: What the teacher said; leading dimension n, or [n, L] for a ragged cache. A "topk" cache
                takes dense logits too and keeps the largest.
            mask: [n, L] bool for a ragged cache, True = store the row; None stores all.

        Raises:
            TypeError: A signal of another kind.
            ValueError: An id that this writer has stored already, or a signal that does not fit the
                specification.
        """
        if not self._open:
            raise ValueError("the writer is closed")
        keys = keys_of(ids)
        known = {tuple(key) for key in keys.tolist()}
        again = int((self._stored.find(keys) >= 0).sum()) + len(known & self._pending_keys)
        if again or len(known) != len(keys):
            raise ValueError(
                f"{again} of the {len(keys)} ids are stored already, "
                f"{len(keys) - len(known)} occur twice in the batch; ask writer.missing(ids) first"
            )
        encoded = encode(self.spec, signal, mask)
        if len(encoded.rows) != len(keys):
            raise ValueError(f"{len(keys)} ids for a signal of {len(encoded.rows)} samples")
        self._agree(encoded.shapes)
        self._pending.append((keys, encoded))
        self._pending_keys |= known
        self._pending_bytes += sum(array.nbytes for array in encoded.arrays.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory as a shard."""
        if not self._pending:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        rows = torch.cat([encoded.rows for _, encoded in self._pending])
        arrays: Arrays = {
            name: torch.cat([encoded.arrays[name] for _, encoded in self._pending])
            for name in self._pending[0][1].arrays
        }
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(rows, 0, out=offsets[1:])
        index = 1 + max((int(record.name.split("-")[2].split(".")[0]) for record in self._shards), default=-1)
        tensors = {f"field.{name}": array for name, array in arrays.items()}
        tensors["keys"] = torch.from_numpy(keys.view(np.int64).copy())
        tensors["offsets"] = offsets
        record = write_tensors(
            self.path / f"shard-{self.rank:05d}-{index:06d}.safetensors",
            tensors,
            samples=len(rows),
            rows=int(offsets[-1]),
        )
        self._shards.append(record)
        self._write_list(closed=False)
        stored = np.stack([self._stored.first, self._stored.second], axis=1)
        self._stored = KeyTable.of(np.concatenate([stored, keys]))
        self._pending, self._pending_keys, self._pending_bytes = [], set(), 0

    def close(self) -> None:
        """Writes what is left and marks this writer as done. May be called twice."""
        if self._open:
            self.flush()
            self._write_list(closed=True)
            self.abort()

    def abort(self) -> None:
        """Lets go without writing what is in memory; a later writer of this rank goes on from the last
        shard."""
        self._open = False
        self._lock.release()

    def finish(self) -> None:
        """Closes the only writer and makes the cache readable.

        Raises:
            ValueError: A writer of another rank than 0; close all of them and call `TeacherCache.merge` once.
        """
        if self.rank != 0:
            raise ValueError(
                "finish() is for a single writer; close all writers, then call TeacherCache.merge once"
            )
        from ._cache import TeacherCache

        self.close()
        TeacherCache.merge(self.path, writers=1)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _agree(self, shapes: Shapes) -> None:
        if self._shapes is None:
            self._shapes = shapes
        elif self._shapes != shapes:
            raise ValueError(
                f"samples of shapes {shapes} in a cache of shapes {self._shapes}; use ragged=True for rows"
            )

    def _resume(self) -> None:
        listed = self.path / f"writer-{self.rank:05d}.json"
        if listed.exists():
            self._shards, self._shapes, _ = read_list(listed, self.spec)
            for record in self._shards:
                check_size(self.path / record.name, record)
        sweep(self.path, self.rank, self._shards)
        elsewhere: list[FileRecord] = []
        for other in sorted(self.path.glob("writer-*.json")):
            if other != listed:
                shards, shapes, _ = read_list(other, self.spec)
                elsewhere += shards
                self._shapes = self._shapes or shapes
        self._stored = KeyTable.of(shard_keys(self.path, self._shards))
        self._elsewhere = KeyTable.of(shard_keys(self.path, elsewhere))
        self._write_list(closed=False)

    def _write_list(self, *, closed: bool) -> None:
        content = {
            "spec": self.spec.to_dict(),
            "writer": self.rank,
            "closed": closed,
            "shapes": None
            if self._shapes is None
            else {name: list(shape) for name, shape in self._shapes.items()},
            "shards": [record.to_dict() for record in self._shards],
        }
        write_json(self.path / f"writer-{self.rank:05d}.json", content)


def fill(
    writer: CacheWriter,
    teacher: TeacherSource,
    batches: Iterable[tuple[Sequence[SampleId] | Tensor, Any]],
) -> int:
    """Asks the teacher for every batch that is not stored completely and stores what is missing.

    Args:
        writer: An open writer of a cache that is not ragged.
        teacher: Any source.
        batches: Pairs of ids and teacher inputs.

    Returns:
        Number of samples added.
    """
    added = 0
    for ids, inputs in batches:
        rows = writer.missing(ids)
        if not rows:
            continue
        chosen = ids[torch.tensor(rows)] if isinstance(ids, Tensor) else [ids[row] for row in rows]
        writer.add(chosen, select(teacher.signal(inputs, ids), torch.tensor(rows)))
        added += len(rows)
    return added


def read_list(path: Path, spec: CacheSpec) -> tuple[list[FileRecord], Shapes | None, bool]:
    """Reads a writer's list: its shards, their shapes and whether it was closed.

    Raises:
        DataError: It is damaged or belongs to another specification.
    """
    content = read_json(path)
    try:
        CacheSpec.from_dict(content["spec"], path).check(spec, path)
        shapes = content["shapes"]
        shards = [FileRecord.from_dict(record, path) for record in content["shards"]]
        closed = bool(content["closed"])
        parsed = (
            None if shapes is None else {str(name): tuple(map(int, shape)) for name, shape in shapes.items()}
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); delete the cache and make it again") from error
    return shards, parsed, closed


def shard_keys(folder: Path, shards: Sequence[FileRecord]) -> Keys:
    """Keys of all samples of some shards, in order."""
    parts = [_NO_KEYS]
    parts += [map_tensors(folder, record)["keys"].numpy().view(np.uint64) for record in shards]
    return np.concatenate(parts)


def sweep(folder: Path, rank: int, shards: Sequence[FileRecord]) -> list[str]:
    """Removes what a killed writer of this rank left: files under temporary names, shards that no list
    has."""
    kept = {record.name for record in shards}
    removed = []
    for pattern in (
        f".shard-{rank:05d}-*.tmp",
        f".writer-{rank:05d}.json.*.tmp",
        f"shard-{rank:05d}-*.safetensors",
    ):
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink(missing_ok=True)
                removed.append(path.name)
    return sorted(removed)


def begin(path: Path, spec: CacheSpec) -> None:
    """Makes the folder and its manifest, or checks that the one that is there has the same specification."""
    path.mkdir(parents=True, exist_ok=True)
    manifest = path / MANIFEST
    strange = not manifest.exists() and any(not p.name.startswith(".") for p in path.iterdir())
    if strange and not manifest.exists():  # another rank may have written it in between
        raise DataError(f"{path}: not empty and no teacher cache; choose another folder")
    fresh = {
        "spec": spec.to_dict(),
        "complete": False,
        "shards": [],
        "index": None,
        "counts": {},
        "shapes": None,
    }
    if not write_json(manifest, fresh, exclusive=True):
        content = read_json(manifest)
        CacheSpec.from_dict(content.get("spec", {}), manifest).check(spec, path)
