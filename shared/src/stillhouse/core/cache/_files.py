"""Files of a cache: JSON with a digest, safetensors shards, locks; everything appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._folders import sha256, sync
from ..errors import DataError
from ._spec import SCHEMA

try:
    import fcntl
except ImportError:  # Windows has no flock; one writer a rank is then up to the caller
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
_REMEDY = "restore it from a copy, or delete the folder and make the cache again"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the cache as its manifest knows it.

    Attributes:
        name: File name inside the folder.
        bytes: Size.
        sha256: Digest of the content.
        samples: Number of samples, 0 for an index.
        rows: Number of rows, 0 for an index.
    """

    name: str
    bytes: int
    sha256: str
    samples: int = 0
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, path: Path) -> FileRecord:
        """Reads the fields back; DataError where they are not those of a record of a file in this folder."""
        try:
            record = cls(
                str(values["name"]),
                int(values["bytes"]),
                str(values["sha256"]),
                int(values["samples"]),
                int(values["rows"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: a file record is damaged ({error!r}); {_REMEDY}") from error
        if Path(record.name).name != record.name or min(record.bytes, record.samples, record.rows) < 0:
            raise DataError(f"{path}: a file record names {record.name!r}; {_REMEDY}")
        return record


def write_json(path: Path, content: Mapping[str, Any], *, exclusive: bool = False) -> bool:
    """Writes JSON with its digest, flushed to the disk and renamed.

    Args:
        path: Where to.
        content: JSON-able.
        exclusive: Only if there is no such file yet.

    Returns:
        False where `exclusive` found a file.
    """
    body = {"schema": SCHEMA, **content}
    text = json.dumps({**body, "digest": _digest(body)}, indent=1, allow_nan=False)
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with work.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        if exclusive:
            try:
                os.link(work, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if path.exists():
                    return False
                os.replace(work, path)
        else:
            os.replace(work, path)
        sync(path.parent)
    finally:
        work.unlink(missing_ok=True)
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Reads JSON and checks its schema and digest.

    Raises:
        DataError: It is missing, cut, changed or of another version.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; this is no teacher cache, or it was never begun") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: its schema is {found!r}, this version reads {SCHEMA!r}; make the cache again"
        )
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise DataError(f"{path}: it was changed after it was written; {_REMEDY}")
    return content


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, samples: int = 0, rows: int = 0
) -> FileRecord:
    """Writes safetensors, flushed to the disk and renamed, and returns their record."""
    work = path.with_name(f".{path.name}.tmp")
    try:
        save_file(dict(tensors), work, metadata={"schema": SCHEMA})
        sync(work)
        record = FileRecord(path.name, work.stat().st_size, sha256(work), samples, rows)
        os.replace(work, path)
        sync(path.parent)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    return record


def map_tensors(folder: Path, record: FileRecord) -> dict[str, torch.Tensor]:
    """Maps the tensors of a file into memory; pages are read when they are touched.

    Raises:
        DataError: The file is missing, has another size than recorded, or is no safetensors file.
    """
    path = folder / record.name
    check_size(path, record)
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from error


def check_size(path: Path, record: FileRecord) -> None:
    """Raises DataError where a file is missing or has another size than recorded."""
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: missing; {_REMEDY}") from None
    if size != record.bytes:
        raise DataError(f"{path}: has {size} bytes, the manifest says {record.bytes}; {_REMEDY}")


def check_hash(path: Path, record: FileRecord) -> None:
    """Raises DataError where a file is missing, cut or changed."""
    check_size(path, record)
    digest = sha256(path)
    if digest != record.sha256:
        raise DataError(
            f"{path}: its SHA-256 is {digest[:12]}…, the manifest says {record.sha256[:12]}…: "
            f"a byte was changed; {_REMEDY}"
        )


class WriterLock:
    """A lock that ends with its process, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Takes the lock; False where another process has it."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                return False
        self._handle = handle
        return True

    def release(self) -> None:
        """Gives the lock back."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)
            self._handle = None


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
