"""Headers of `.ply` and `.pcd` files, checked against the size of the file before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillhouse.core.errors import DataError

_LONGEST = 64 * 1024  # bytes of a header
_PLY_SIZES = {
    "char": 1, "int8": 1, "uchar": 1, "uint8": 1,
    "short": 2, "int16": 2, "ushort": 2, "uint16": 2,
    "int": 4, "int32": 4, "uint": 4, "uint32": 4, "float": 4, "float32": 4,
    "double": 8, "float64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What a header declares: number of points, names of their fields, how the body is stored."""

    count: int
    fields: tuple[str, ...]
    encoding: str


def read_ply_header(path: Path) -> Header:
    """Read and check the header of a PLY file.

    Raises:
        DataError: not a PLY file, no vertices with x, y and z, or more of them than the file has bytes for.
    """
    lines, start, size = _header(path, b"end_header")
    if not lines or lines[0] != "ply":
        raise DataError(f"{path}: does not start with the line `ply`; it is no PLY file")
    encoding = ""
    elements: list[tuple[str, int, list[tuple[str, int]]]] = []
    for line in lines[1:]:
        words = line.split()
        try:
            if words[:1] == ["format"]:
                encoding = words[1]
            elif words[:1] == ["element"]:
                elements.append((words[1], _natural(words[2]), []))
            elif words[:2] == ["property", "list"]:
                elements[-1][2].append((words[4], _PLY_SIZES[words[2]]))  # an empty list is its length alone
            elif words[:1] == ["property"]:
                elements[-1][2].append((words[2], _PLY_SIZES[words[1]]))
        except (IndexError, KeyError, ValueError) as error:
            raise DataError(f"{path}: has the header line {line[:60]!r}, which PLY does not know") from error
    if encoding not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise DataError(f"{path}: has no known `format` line; expected ascii or binary, little or big endian")
    vertices = next(((count, fields) for name, count, fields in elements if name == "vertex"), None)
    if vertices is None or not {"x", "y", "z"} <= {name for name, _ in vertices[1]}:
        raise DataError(f"{path}: declares no vertices with x, y and z; it is no point cloud")
    least = 0
    for _, count, fields in elements:
        width = sum(width for _, width in fields) if encoding != "ascii" else 2 * len(fields)
        least += count * width
    _check_size(path, vertices[0], least - (encoding == "ascii"), size - start)
    if encoding == "ascii":
        _check_lines(path, sum(count for _, count, _ in elements), start)
    return Header(vertices[0], tuple(name for name, _ in vertices[1]), encoding)


def read_pcd_header(path: Path) -> Header:
    """Read and check the header of a PCD file.

    Raises:
        DataError: not a PCD file, no x, y and z, or more points than the file has bytes for.
    """
    lines, start, size = _header(path, b"DATA")
    values: dict[str, list[str]] = {}
    for line in lines:
        words = line.split()
        if words and not words[0].startswith("#"):
            values[words[0].upper()] = words[1:]
    try:
        fields = values["FIELDS"]
        sizes = [_natural(word) for word in values["SIZE"]]
        counts = [_natural(word) for word in values.get("COUNT", ["1"] * len(fields))]
        width, height = _natural(values["WIDTH"][0]), _natural(values["HEIGHT"][0])
        count = _natural(values["POINTS"][0]) if "POINTS" in values else width * height
        encoding = values["DATA"][0].lower()
        if len(sizes) != len(fields) or len(counts) != len(fields):
            raise ValueError("FIELDS, SIZE and COUNT differ in length")
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{path}: is no PCD file or has a damaged header; expected FIELDS, SIZE, WIDTH, HEIGHT and DATA"
        ) from error
    if not {"x", "y", "z"} <= set(fields):
        raise DataError(f"{path}: declares no fields x, y and z; it is no point cloud")
    if count != width * height:
        raise DataError(
            f"{path}: declares {count:,} points and {width:,} × {height:,}; the header is damaged"
        )
    row = sum(a * b for a, b in zip(sizes, counts, strict=True))
    if encoding == "ascii":
        least = count * 2 * sum(counts) - 1
    elif encoding == "binary":
        least = count * row
    elif encoding == "binary_compressed":
        least = 8 + count * row // 255  # the LZF code is never shorter than about 1/250
    else:
        raise DataError(f"{path}: has DATA {encoding!r}; known are ascii, binary and binary_compressed")
    _check_size(path, count, least, size - start)
    if encoding == "ascii":
        _check_lines(path, count, start)
    if encoding == "binary_compressed":
        _check_packed(path, count * row, start, size)
    return Header(count, tuple(fields), encoding)


def _header(path: Path, last: bytes) -> tuple[list[str], int, int]:
    """Lines of a header up to the one that starts with `last`, where the body starts, size of the file."""
    try:
        with path.open("rb") as file:
            head = file.read(_LONGEST)
            size = file.seek(0, 2)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    lines: list[str] = []
    place = 0
    while place < len(head):
        end = head.find(b"\n", place)
        if end < 0:
            break
        raw = head[place:end].strip()
        place = end + 1
        lines.append(raw.decode("ascii", "replace"))
        if raw.split(b" ")[0] == last:
            return lines, place, size
    raise DataError(f"{path}: its header has no end; the file is cut off or has another format")


def _natural(word: str) -> int:
    value = int(word)
    if value < 0:
        raise ValueError(word)
    return value


def _check_size(path: Path, count: int, least: int, there: int) -> None:
    if count == 0:
        raise DataError(f"{path}: holds no points; give a sweep with at least one")
    if there < least:
        raise DataError(
            f"{path}: declares {count:,} points, which need {least:,} bytes, and has {there:,}; the file is "
            "cut off or its header is wrong"
        )


def _check_lines(path: Path, count: int, start: int) -> None:
    """Count the lines of a text body: Open3D fills what is missing with zeros."""
    with path.open("rb") as file:
        file.seek(start)
        lines = sum(1 for line in file if line.strip())
    if lines < count:
        raise DataError(f"{path}: declares {count:,} lines and has {lines:,}; the file is cut off")


def _check_packed(path: Path, wanted: int, start: int, size: int) -> None:
    """Compare the two sizes before a compressed body with the file and with the header."""
    with path.open("rb") as file:
        file.seek(start)
        packed, plain = (int.from_bytes(file.read(4), "little") for _ in range(2))
    if packed > size - start - 8 or plain != wanted:
        raise DataError(
            f"{path}: has {size - start - 8:,} compressed bytes of {packed:,}, for {plain:,} bytes of points "
            f"where {wanted:,} are declared; the file is cut off or damaged"
        )
