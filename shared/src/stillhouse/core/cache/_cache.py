"""Reading a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..teacher import TeacherSignal
from ._codec import Arrays, Shapes, assemble, decode
from ._files import (
    MANIFEST,
    FileRecord,
    WriterLock,
    check_hash,
    check_size,
    map_tensors,
    read_json,
    write_json,
)
from ._files import write_tensors as _write_tensors
from ._ids import KeyTable, SampleId, keys_of, order_of
from ._spec import CacheSpec
from ._writer import CacheWriter, begin, read_list, shard_keys

Layout = Literal["padded", "flat"]


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a cache has for some ids.

    Attributes:
        signal: In the order of the ids. Padded: [n, ...], ragged ones [n, L, ...] with the stored rows first.
            Flat: all stored rows one after another [sum of rows, ...], which lines up with
            ``student_logits[mask]``.
        mask: [n, L] bool for ragged samples in padded layout, True = a stored row; otherwise None.
        rows: Number of stored rows of each sample [n].
    """

    signal: TeacherSignal
    mask: Tensor | None
    rows: Tensor


class TeacherCache:
    """A finished cache, memory-mapped. Any number of processes may read one at the same time.

    Attributes:
        path: Its folder.
        spec: What it holds and was made from.
        shards: Records of its shards.

    Example:
        >>> import tempfile
        >>> from stillhouse.core.teacher import DenseSignal
        >>> spec = CacheSpec(kind="dense", teacher="t", teacher_hash="00", vocab=3)
        >>> folder = tempfile.mkdtemp()
        >>> with TeacherCache.create(folder, spec) as writer:
        ...     writer.add(["a", "b"], DenseSignal(torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 0.0]])))
        ...     writer.finish()
        >>> TeacherCache.open(folder, expect=spec).lookup(["b"]).signal.logits
        tensor([[4., 4., 0.]])
    """

    def __init__(self, path: Path, spec: CacheSpec, manifest: Mapping[str, Any]) -> None:
        self.path, self.spec = path, spec
        where = path / MANIFEST
        try:
            self.shards = [FileRecord.from_dict(record, where) for record in manifest["shards"]]
            self.shapes: Shapes = {name: tuple(shape) for name, shape in (manifest["shapes"] or {}).items()}
            index = FileRecord.from_dict(manifest["index"], where)
            self.counts: dict[str, int] = {name: int(count) for name, count in manifest["counts"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: damaged ({error!r}); delete the cache and make it again") from error
        for record in self.shards:
            check_size(path / record.name, record)
        self.index = index
        tables = map_tensors(path, index)
        words = (tables[name].numpy().view(np.uint64) for name in ("first", "second"))
        self._keys = KeyTable(*words)
        self._shard_of: NDArray[np.int32] = tables["shard"].numpy()
        self._sample_of: NDArray[np.int64] = tables["sample"].numpy()
        self._mapped: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def create(
        cls, path: str | Path, spec: CacheSpec, *, rank: int = 0, shard_bytes: int = 256 * 2**20
    ) -> CacheWriter:
        """Begins a cache, or goes on with one that was interrupted.

        Args:
            path: Its folder; new, empty, or that of a cache with the same specification.
            spec: What it will hold.
            rank: Of this writer; several processes may write at once under different ranks.
            shard_bytes: Size at which a shard is written, ≥ 1. What a kill can lose.

        Raises:
            DataError: The folder holds something else, a cache with another specification, or one that this
                rank is writing already.
            ValueError: A negative rank or a shard size < 1.
        """
        if rank < 0 or shard_bytes < 1:
            raise ValueError(f"rank must be ≥ 0 and shard_bytes ≥ 1, got {rank!r} and {shard_bytes!r}")
        begin(Path(path), spec)
        return CacheWriter(Path(path), spec, rank=rank, shard_bytes=shard_bytes)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        expect: CacheSpec | Mapping[str, Any] | None = None,
        verify: bool = False,
    ) -> TeacherCache:
        """Opens a finished cache.

        Args:
            path: Its folder.
            expect: What the run needs: a whole specification, or some fields such as
                ``{"teacher_hash": …, "vocabulary_hash": …}``.
            verify: Also read every byte and compare the digests.

        Raises:
            DataError: It is missing, unfinished, damaged, or was made from something else; the message names
                both sides.
        """
        folder = Path(path)
        manifest = read_json(folder / MANIFEST)
        spec = CacheSpec.from_dict(manifest.get("spec", {}), folder / MANIFEST)
        if expect is not None:
            spec.check(expect, folder)
        if not manifest.get("complete"):
            raise DataError(
                f"{folder}: the cache is not finished; go on writing it (TeacherCache.create with the same "
                "specification) and call finish() or TeacherCache.merge"
            )
        cache = cls(folder, spec, manifest)
        if verify:
            for record in (*cache.shards, cache.index):
                check_hash(folder / record.name, record)
        return cache

    @classmethod
    def merge(cls, path: str | Path, *, writers: int | None = None) -> TeacherCache:
        """Makes the shards of all closed writers one readable cache; call it once, after all have closed.

        A sample that two writers stored (a distributed sampler that pads its last batch) counts once; the
        writer of the lower rank wins.

        Args:
            path: The folder.
            writers: Number of ranks of this run, 0 … writers − 1: all must have closed. Lists of other ranks,
                left by an earlier run of more processes, are taken as they are.

        Raises:
            DataError: A writer is missing, still writing, or stored samples of other shapes.
        """
        folder = Path(path)
        spec = CacheSpec.from_dict(read_json(folder / MANIFEST).get("spec", {}), folder / MANIFEST)
        shards, shapes = _collect(folder, spec, writers)
        keys = shard_keys(folder, shards)
        order = order_of(keys)
        ordered = keys[order]
        first = np.ones(len(ordered), bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(1)
        order, ordered = order[first], ordered[first]
        samples = np.array([record.samples for record in shards], np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(samples)])
        shard = np.searchsorted(starts, order, side="right") - 1
        digest = hashlib.sha256("".join(record.sha256 for record in shards).encode()).hexdigest()
        index = _write_tensors(
            folder / f"index-{digest[:16]}.safetensors",
            {
                "first": torch.from_numpy(ordered[:, 0].copy().view(np.int64)),
                "second": torch.from_numpy(ordered[:, 1].copy().view(np.int64)),
                "shard": torch.from_numpy(shard.astype(np.int32)),
                "sample": torch.from_numpy(order - starts[shard]),
            },
        )
        counts = {
            "samples": len(ordered),
            "rows": sum(record.rows for record in shards),
            "duplicates": len(keys) - len(ordered),
            "shards": len(shards),
        }
        write_json(
            folder / MANIFEST,
            {
                "spec": spec.to_dict(),
                "complete": True,
                "shards": [record.to_dict() for record in shards],
                "index": index.to_dict(),
                "counts": counts,
                "shapes": {name: list(shape) for name, shape in shapes.items()},
            },
        )
        for pattern in (
            "index-*.safetensors",
            ".index-*.tmp",
            f".{MANIFEST}.*.tmp",
        ):  # older, or of a killed merge
            for old in folder.glob(pattern):
                if old.name != index.name:
                    old.unlink(missing_ok=True)
        return cls.open(folder)

    def lookup(self, ids: Sequence[SampleId] | Tensor, *, layout: Layout = "padded") -> Lookup:
        """Finds the signals of samples.

        Args:
            ids: As they were stored, in any order, repeated or not.
            layout: "padded" or "flat", see `Lookup`.

        Raises:
            DataError: Ids that are not in the cache. An augmented input is stored under (id, augmentation
                seed).
            ValueError: No ids, or an unknown layout.
        """
        if layout not in ("padded", "flat"):
            raise ValueError(f'layout must be "padded" or "flat", got {layout!r}')
        if len(ids) == 0:
            raise ValueError("ids must hold at least one id")
        position = self._keys.find(keys_of(ids))
        absent = np.flatnonzero(position < 0)
        if len(absent):
            shown = [ids[int(row)] for row in absent[:3]]
            raise DataError(
                f"{self.path}: {len(absent)} of {len(ids)} ids are not in the cache, such as {shown}; "
                "other data or another augmentation seed than the teacher saw?"
            )
        fields, rows = self._gather(self._shard_of[position], self._sample_of[position])
        if layout == "flat":
            return Lookup(assemble(self.spec, self._shaped(fields, (-1,))), None, rows)
        if not self.spec.ragged:
            return Lookup(assemble(self.spec, self._shaped(fields, (len(ids), *self.shapes[""]))), None, rows)
        mask = torch.arange(int(rows.max())) < rows[:, None]
        padded = {}
        for name, value in self._shaped(fields, (-1,)).items():
            padded[name] = value.new_zeros(*mask.shape, *value.shape[1:])
            if name == "ids" and self.spec.kind == "topk":  # ids of padding must be distinct like any row's
                padded[name][:] = torch.arange(value.shape[-1])
            padded[name][mask] = value
        return Lookup(assemble(self.spec, padded), mask, rows)

    def missing(self, ids: Sequence[SampleId] | Tensor) -> list[int]:
        """Positions of the ids that are not in the cache."""
        return np.flatnonzero(self._keys.find(keys_of(ids)) < 0).tolist()

    def __contains__(self, sample: SampleId) -> bool:
        return not self.missing([sample])

    def __len__(self) -> int:
        return len(self._keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.spec)

    @property
    def bytes(self) -> int:
        """Bytes of shards and index on the disk."""
        return sum(record.bytes for record in (*self.shards, self.index))

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._mapped:
            self._mapped[number] = map_tensors(self.path, self.shards[number])
        return self._mapped[number]

    def _gather(self, shard: NDArray[np.int32], sample: NDArray[np.int64]) -> tuple[Arrays, Tensor]:
        """Decoded rows of samples, one after another, and how many each sample has."""
        numbers = np.unique(shard)
        starts, counts = np.empty(len(shard), np.int64), np.empty(len(shard), np.int64)
        for number in numbers:
            here = shard == number
            offsets = self._shard(int(number))["offsets"].numpy()
            starts[here] = offsets[sample[here]]
            counts[here] = offsets[sample[here] + 1] - starts[here]
        ends = np.cumsum(counts)
        source = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        names = [name for name in self._shard(int(numbers[0])) if name.startswith("field.")]
        if len(numbers) == 1:
            index = torch.from_numpy(source)
            tensors = self._shard(int(numbers[0]))
            gathered = {name[6:]: tensors[name].index_select(0, index) for name in names}
        else:
            shard_of_row = np.repeat(shard, counts)
            gathered = {}
            for number in numbers:
                rows = np.flatnonzero(shard_of_row == number)
                index, target = torch.from_numpy(source[rows]), torch.from_numpy(rows)
                for name in names:
                    part = self._shard(int(number))[name]
                    if name[6:] not in gathered:
                        gathered[name[6:]] = part.new_empty(len(source), *part.shape[1:])
                    gathered[name[6:]][target] = part.index_select(0, index)
        return decode(self.spec, gathered), torch.from_numpy(counts)

    def _shaped(self, fields: Arrays, lead: tuple[int, ...]) -> Arrays:
        return {name: value.reshape(*lead, *value.shape[1:]) for name, value in fields.items()}


def _collect(folder: Path, spec: CacheSpec, writers: int | None) -> tuple[list[FileRecord], Shapes]:
    lists = sorted(folder.glob("writer-*.json"))
    if not lists:
        raise DataError(f"{folder}: no writer has begun; nothing to merge")
    found = {int(path.stem.split("-")[1]): path for path in lists}
    absent = [] if writers is None else sorted(set(range(writers)) - set(found))
    if absent:
        raise DataError(f"{folder}: the writers of ranks {absent} are missing of {writers}; run them first")
    shards: list[FileRecord] = []
    shapes: Shapes | None = None
    for rank, path in found.items():
        lock = WriterLock(folder / f"writer-{rank:05d}.lock")
        if not lock.acquire():
            raise DataError(f"{folder}: the writer of rank {rank} is still writing; close it first")
        lock.release()
        mine, shape, closed = read_list(path, spec)
        if not closed and (writers is None or rank < writers):
            raise DataError(
                f"{folder}: the writer of rank {rank} was interrupted; go on with it and close it"
            )
        for record in mine:
            check_size(folder / record.name, record)
        if mine and shapes is not None and shape != shapes:
            raise DataError(f"{folder}: rank {rank} stored samples of shapes {shape}, others {shapes}")
        shapes = shape if mine else shapes
        shards += mine
    if not shards or shapes is None:
        raise DataError(f"{folder}: the writers stored no samples")
    return shards, shapes


def _reopen(path: Path, spec: CacheSpec) -> TeacherCache:
    return TeacherCache.open(path, expect=spec)
