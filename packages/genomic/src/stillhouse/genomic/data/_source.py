"""Opening what users have: plain text, gzip and bgzf, told apart by their first bytes, never by the name."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from stillhouse.core.errors import DataError

Compression = Literal["plain", "gzip", "bgzf"]

BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends a whole bgzf file."""

_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}


def compression(path: Path) -> Compression:
    """How a file is compressed.

    Raises:
        DataError: no such file, a folder, an empty file, or a compression that is not read here.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(18)
    except OSError as error:
        raise DataError(_cannot_open(path, error)) from None
    if not head:
        raise DataError(f"{path}: the file is empty; give one with at least one record")
    if head[:2] == b"\x1f\x8b":
        is_bgzf = len(head) == 18 and head[3] & 4 and head[12:14] == b"BC"
        return "bgzf" if is_bgzf else "gzip"
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise DataError(f"{path}: compressed with {name}; decompress it, or use gzip or bgzip")
    return "plain"


def _cannot_open(path: Path, error: OSError) -> str:
    if path.is_dir():
        return f"{path}: is a folder; name a file in it"
    if not path.exists():
        return f"{path}: no such file"
    return f"{path}: cannot be opened ({error.strerror}); check its permissions"


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open for reading, decompressed; damage found while reading becomes a DataError.

    Raises:
        DataError: see `compression`; a truncated or damaged compressed file.
    """
    kind = compression(path)
    if kind == "bgzf":
        check_bgzf_end(path)
    try:
        if kind == "plain":
            with open(path, "rb") as file:
                yield file
        else:
            with gzip.open(path, "rb") as unzipped:
                yield unzipped  # type: ignore[misc]
    except EOFError:
        raise DataError(
            f"{path}: the compressed file ends too early; it was truncated, copy or download it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip data ({error}); copy or download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def check_bgzf_end(path: Path) -> None:
    """Refuse a bgzf file that lacks its end marker: it was cut, perhaps between two blocks.

    Raises:
        DataError: the marker is missing.
    """
    with open(path, "rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - len(BGZF_END)))
        if file.read() != BGZF_END:
            raise DataError(
                f"{path}: the bgzf file lacks its end marker; it was truncated, copy or download it again"
            )


def text_lines(path: Path, *, limit: int = 1 << 24) -> Iterator[tuple[int, str]]:
    """Lines of a text table as (number from one, text without the line end).

    UTF-8 with or without a byte order mark; LF or CRLF.

    Args:
        path: plain, gzip or bgzf.
        limit: longest line in bytes.

    Raises:
        DataError: see `open_binary`; not text, or a line over the limit.
    """
    with open_binary(path) as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise DataError(f"{path}, line {number}: longer than {limit:,} bytes; is this a text table?")
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if 0 in line:
                raise DataError(f"{path}, line {number}: holds a zero byte; this is no text file")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}, line {number}: is not UTF-8 text; save the file as UTF-8") from None
            yield number, text.rstrip("\r\n")
