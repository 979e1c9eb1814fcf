"""Folders that appear whole or not at all: written beside their final place, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # what file browsers drop into every folder


def walk(root: Path) -> Iterator[Path]:
    """Yield everything in a folder that is not a plain directory, links to directories included."""
    for base, folders, names in os.walk(root, onerror=_raise):
        for name in sorted(names):
            if name not in _LITTER:
                yield Path(base, name)
        yield from (Path(base, name) for name in sorted(folders) if Path(base, name).is_symlink())


def _raise(error: OSError) -> None:
    raise error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Push one file or directory to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory to flush it
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush(root: Path) -> None:
    """Push every file, then every directory, to the disk."""
    for base, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(base, name))
        sync(Path(base))


def replace(work: Path, target: Path) -> None:
    """Put `work` where `target` is; at every moment a whole artefact is on disk."""
    if target.exists() and not any(target.iterdir()):
        target.rmdir()
    if not target.exists():
        os.rename(work, target)
        sync(target.parent)
        return
    if _exchange(work, target):
        sync(target.parent)
        shutil.rmtree(work, ignore_errors=True)
        return
    old = target.parent / f".{target.name}.old-{secrets.token_hex(6)}"
    os.rename(target, old)
    try:
        os.rename(work, target)
    except BaseException:
        os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step where the system can (Linux, macOS); return whether it did."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(a), os.fsencode(b)
        if sys.platform == "linux":
            return libc.renameat2(-100, first, -100, second, 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
        if sys.platform == "darwin":
            return libc.renamex_np(first, second, 2) == 0  # RENAME_SWAP
    except (OSError, AttributeError, TypeError):
        pass
    return False


def sweep(target: Path) -> None:
    """Remove what a killed save left beside the target, once it is a day old: nobody still writes it."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)
