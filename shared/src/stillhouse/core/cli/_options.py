"""Options that verbs share, as annotations: `def verb(out: OutOption = None, json: JsonOption = False)`."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..run import Run

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def _check_device(value: str | None) -> str | None:
    if value is not None and not _DEVICE.fullmatch(value):
        raise typer.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N, mps")
    return value


OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Folder to write to.", show_default="runs/<domain>/<preset>-<time>"
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of everything random.", show_default="the configuration's"),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", callback=_check_device),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on the standard output.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more; show the traceback of an error.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="NAME|FILE",
        help="A shipped preset (see `configs`) or a file: .py, .json, .yaml. Python files are executed.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Set one field, for example train.steps=100; may be repeated."
    ),
]


@contextlib.contextmanager
def speaking(run: Run) -> Iterator[Run]:
    """Keep the standard output for the JSON object where the run prints one.

    Whatever prints inside, also a library's own `print`, goes to the standard error then; `Run.finish` still
    reaches the standard output.
    """
    if run.json:
        with contextlib.redirect_stdout(sys.stderr):
            yield run
    else:
        yield run
