"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from stillhouse.core.errors import DataError


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside the target to write to; it takes the target's place if nothing goes wrong.

    Folders that were made for it are taken away again where something does.

    Raises:
        DataError: the target is a folder, or nothing can be written there.
    """
    path = Path(target)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file")
    made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    work = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(work, "xb"):
            pass
    except OSError as error:
        _unmake(made)
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another place") from error
    try:
        yield work
        with open(work, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(work, path)
    except BaseException:
        work.unlink(missing_ok=True)
        _unmake(made)
        raise


def _unmake(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        with contextlib.suppress(OSError):
            folder.rmdir()
