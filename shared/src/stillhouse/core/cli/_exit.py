"""Run an app and turn what happens into an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import StillhouseError


def run_app(app: typer.Typer, argv: Sequence[str] | None, prog: str) -> int:
    """Run a command line and return its exit code; nothing but `KeyboardInterrupt` in this function escapes.

    Args:
        app: the commands.
        argv: the arguments after the program's name; those of this process where None.
        prog: name that the help shows.

    Returns:
        0 done; 1 failed, with one line on the standard error (and the traceback before it with `-v`); 2 wrong
        usage or configuration; 3 a gate that cannot decide; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = _is_verbose(arguments)
    try:
        with _plain_warnings(verbose=verbose):
            typer.main.get_command(app).main(args=arguments, prog_name=prog, standalone_mode=True)
    except SystemExit as end:
        return _code(end.code)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except StillhouseError as error:
        return _fail(error, str(error), error.exit_code, verbose=verbose)
    except Exception as error:  # the last line of defence: one line for people, all of it on request
        hint = "" if verbose else " (-v shows the traceback)"
        return _fail(error, f"{type(error).__name__}: {error}{hint}", 1, verbose=verbose)
    return 0


def _is_verbose(arguments: Sequence[str]) -> bool:
    """Say whether the verb was asked to say more; read before parsing, so that its errors obey it too."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "-v" in before or "--verbose" in before


def _code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    _say(str(code))
    return 1


def _fail(error: BaseException, message: str, code: int, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    _say(" ".join(message.split()))
    return code


@contextlib.contextmanager
def _plain_warnings(*, verbose: bool) -> Iterator[None]:
    """Show a warning as one line for people, each text once; as Python does, with its place, when verbose.

    Which warnings are shown, and which are errors, stays as it was: only their form changes. Of several
    processes only the first speaks.
    """
    before, told = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in told and not (os.environ.get("RANK") or "0").strip("0"):
            _say(text, "warning: ", "bold yellow")
        told.add(text)

    if not verbose:
        warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = before


def _say(message: str, head: str = "error: ", style: str = "bold red") -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text(head, style=style) + Text(message))
