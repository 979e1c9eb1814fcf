"""Errors that a command turns into one line and an exit code.

Library code raises `ValueError`/`TypeError` for wrong arguments. The classes here are for what a *user* can
mend: a file, a configuration, a missing library. Each message names the thing, what is wrong with it, and
what to do.
"""

from __future__ import annotations


class StillhouseError(Exception):
    """Something the user can mend; commands print its one line and exit with `exit_code`."""

    exit_code = 1


class DataError(StillhouseError, ValueError):
    """A data file or folder cannot be used; the message names the file and the remedy."""


class ConfigError(StillhouseError, ValueError):
    """A configuration is wrong: unknown key, wrong type, impossible value. A usage error."""

    exit_code = 2


class MissingDependencyError(StillhouseError, ImportError):
    """An optional library is not installed; the message holds the pip or apt line that installs it."""


class UndecidedError(StillhouseError):
    """A gate cannot decide, for example an audit whose interval straddles its limit."""

    exit_code = 3
