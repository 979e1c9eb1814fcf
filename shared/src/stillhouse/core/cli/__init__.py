"""The command line: the verbs that every domain has, and the root command `stillhouse`.

A domain's `cli` module is short:

    app = build_app(DOMAIN)

    def main(argv: Sequence[str] | None = None) -> int:
        return run_app(app, argv, "stillhouse-kidney")
"""

from __future__ import annotations

from ._app import build_app as build_app
from ._app import load_for as load_for
from ._exit import run_app as run_app
from ._options import ConfigOption as ConfigOption
from ._options import DeviceOption as DeviceOption
from ._options import JsonOption as JsonOption
from ._options import OutOption as OutOption
from ._options import SeedOption as SeedOption
from ._options import SetOption as SetOption
from ._options import VerboseOption as VerboseOption
from ._options import speaking as speaking
from ._root import build_root as build_root
from ._root import main as main
