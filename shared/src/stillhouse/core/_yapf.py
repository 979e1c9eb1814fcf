"""A guard around mmengine's import of yapf, for processes that start together."""

from __future__ import annotations

import importlib
import pickle
import time

_TRIES, _PAUSE = 50, 0.1


def import_yapf() -> None:
    """Import yapf, which mmengine needs, and wait while another process writes yapf's grammar cache.

    At its first import yapf writes that cache straight to its place: ranks or test processes that start
    together may read half a file. A failed import leaves no module behind, so it can be tried again.

    Raises:
        EOFError: the cache stays unreadable; delete yapf's cache folder.
    """
    for attempt in range(_TRIES):
        try:
            importlib.import_module("yapf.yapflib.yapf_api")
            return
        except (EOFError, pickle.UnpicklingError):
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE)
