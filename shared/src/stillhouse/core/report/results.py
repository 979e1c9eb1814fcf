"""`results.json`: a run's results as a dataclass, written atomically and read strictly.

A domain's results are one dataclass of plain data; the page is built from what is read here, so that a report
can be made again without the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from stillhouse.core.errors import DataError
from stillhouse.core.files import replacing
from stillhouse.core.run import jsonable

RESULTS = "results.json"

T = TypeVar("T")


def write_results(results: Any, folder: str | os.PathLike[str], *, domain: str, schema: int = 1) -> Path:
    """Write `results.json` into a run's folder, atomically; the folder is made where it is not there.

    Args:
        results: an instance of a dataclass of plain data.
        folder: the run's folder.
        domain: name of the domain, kept in the file.
        schema: number of the dataclass's form; raise it when old files no longer fit.

    Returns:
        The path of the file.

    Raises:
        TypeError: something in the results is no plain data.
    """
    target = Path(folder) / RESULTS
    table = {"format": f"stillhouse-{domain}-results", "schema": schema, **jsonable(asdict(results))}
    text = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(target) as work:
        work.write_text(text + "\n", encoding="utf-8")
    return target


def read_results(
    kind: type[T],
    folder: str | os.PathLike[str],
    *,
    domain: str,
    schema: int = 1,
    convert: Callable[[dict[str, Any]], None] | None = None,
) -> T:
    """Read what `write_results` wrote.

    Args:
        kind: the dataclass.
        folder: the run's folder.
        domain: as it was written.
        schema: as it was written.
        convert: changes the table in place before `kind(**table)`: rows to dataclasses of their own.

    Raises:
        DataError: the file is missing, is of another domain or schema, or does not fit the dataclass.

    Example:
        >>> import dataclasses, tempfile
        >>> @dataclasses.dataclass
        ... class Results:
        ...     accuracy: float
        >>> folder = tempfile.mkdtemp()
        >>> write_results(Results(0.9), folder, domain="example").name
        'results.json'
        >>> read_results(Results, folder, domain="example").accuracy
        0.9
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise DataError(f"{path}: is missing; give the folder of a finished run")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or table.pop("format", None) != f"stillhouse-{domain}-results":
            raise ValueError(f"it is not the results of a {domain} run")
        found = table.pop("schema", None)
        if found != schema:
            raise ValueError(
                f"it has schema {found!r}, this version reads {schema}; upgrade stillhouse-{domain}"
            )
        strange = sorted(set(table) - {spec.name for spec in fields(kind)})  # type: ignore[arg-type]
        if strange:
            raise ValueError(f"it has the unknown entry {strange[0]!r}")
        if convert is not None:
            convert(table)
        return kind(**table)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `evaluate` again") from error
