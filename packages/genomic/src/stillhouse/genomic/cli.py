"""The command `stillhouse-genomic`, also `python -m stillhouse.genomic` and `stillhouse genomic`."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.core.cli import build_app, run_app

from .domain import DOMAIN


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments after the program's name; those of this process where None.

    Returns:
        0 done, 1 failed, 2 wrong usage or configuration.
    """
    return run_app(build_app(DOMAIN), argv, "stillhouse-genomic")
