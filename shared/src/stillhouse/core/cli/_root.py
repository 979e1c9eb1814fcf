"""The root command `stillhouse`: the installed domains, the doctor, the cache."""

from __future__ import annotations

import json as _json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import doctor as _doctor
from ..domain import BrokenDomainError, Installed, discover, load_object
from ._app import build_app, show_doctor
from ._exit import run_app
from ._options import JsonOption, VerboseOption


def build_root() -> typer.Typer:
    """Build the root command; installed domains are its commands, loaded when one is called."""
    app = typer.Typer(
        help="Specialised knowledge distillers: one command per installed domain.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    _add_own(app)
    _delegate(app, "cache", "Look at and clean caches of teacher outputs.", "The core", _cache_app)
    for name, installed in discover().items():
        _delegate(app, name, installed.summary, "Installed domains", _domain_app(installed))
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stillhouse` and return its exit code."""
    return run_app(build_root(), argv, "stillhouse")


def _cache_app() -> typer.Typer:
    app: typer.Typer = load_object("stillhouse.core.cache.cli:app")
    return app


def _domain_app(installed: Installed) -> Callable[[], typer.Typer]:
    return lambda: build_app(installed.load())


def _delegate(
    app: typer.Typer, name: str, summary: str, panel: str, build: Callable[[], typer.Typer]
) -> None:
    """Add a command that hands all its arguments to an app which is built only when it is called."""
    passing = {
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    }

    @app.command(name, help=summary or name, rich_help_panel=panel, context_settings=passing)
    def delegate(context: typer.Context) -> None:
        program = f"{context.find_root().info_name} {name}"
        command = typer.main.get_command(build())
        code: Any = command.main(args=list(context.args), prog_name=program, standalone_mode=False)
        if isinstance(code, int) and code:
            raise typer.Exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"stillhouse {version('stillhouse-core')}")
        raise typer.Exit(0)


def _add_own(app: typer.Typer) -> None:
    @app.callback()
    def root(
        version_: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass

    @app.command(
        help="List the installed domains and whether each can be loaded.", rich_help_panel="The core"
    )
    def domains(json: JsonOption = False, verbose: VerboseOption = False) -> None:
        rows = [_row(installed) for installed in discover().values()]
        if json:
            print(_json.dumps(rows, ensure_ascii=False))
            return
        if not rows:
            print("no domain is installed", file=sys.stderr)
            return
        table = Table(box=None, pad_edge=False)
        for column in ("domain", "version", "state", "what"):
            table.add_column(column, overflow="fold")
        for row in rows:
            state = Text(row["state"], style="green" if row["state"] == "ok" else "red")
            table.add_row(Text(row["name"], style="bold"), Text(row["version"]), state, Text(row["what"]))
        Console().print(table)

    @app.command(
        help="Check the core's libraries, GPU, memory and disk, and say what to install.",
        rich_help_panel="The core",
    )
    def doctor(json: JsonOption = False, verbose: VerboseOption = False) -> None:
        show_doctor((*_doctor.requirements_of("stillhouse-core"), *_doctor.machine()), json=json)


def _row(installed: Installed) -> dict[str, str]:
    row = {"name": installed.name, "distribution": installed.distribution, "version": installed.version}
    try:
        return {**row, "state": "ok", "what": installed.load().title}
    except BrokenDomainError as error:
        return {**row, "state": "broken", "what": str(error)}
