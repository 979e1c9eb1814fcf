"""mmengine's Runner, or one clear error.

The core depends on `mmengine-lite`, which holds every file of `mmengine`, the Runner's included; what the
Runner needs besides is OpenCV (its visualizer imports it) and Matplotlib, which the core has anyway. Hence
the extra `mmengine` of the core brings OpenCV alone. A full `mmengine` of the same version works as well:
both distributions own the same files, so that installing either over the other changes nothing, and
uninstalling either breaks the other (`pip install --force-reinstall --no-deps mmengine-lite` mends that).
"""

from __future__ import annotations

import importlib
import warnings

from ..._yapf import import_yapf
from ...errors import MissingDependencyError

_INSTALL = 'pip install "stillhouse-core[mmengine]"'


def require_runner() -> None:
    """Import `mmengine.runner`.

    Raises:
        MissingDependencyError: a library it needs is not installed; the message names it and the pip line.
    """
    with warnings.catch_warnings():
        # mmengine 0.10 imports torch.distributed.optim, which uses what torch itself has deprecated
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        try:
            import_yapf()
            importlib.import_module("mmengine.runner")
        except ImportError as error:
            missing = error.name or "mmengine"
            raise MissingDependencyError(
                f"mmengine's Runner needs {missing}, which cannot be imported ({error}); {_INSTALL}"
            ) from error
