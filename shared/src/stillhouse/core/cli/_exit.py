"""Run an app and turn what happens into an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

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


def _say(message: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("error: ", style="bold red") + Text(message))
