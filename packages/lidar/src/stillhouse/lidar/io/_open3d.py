"""One place where Open3D is imported; a missing system library becomes one line that names its package."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from stillhouse.core.errors import MissingDependencyError

from ..domain import OPEN3D_LIBRARIES

APT_LINE = "apt-get install " + " ".join(package for _, _, package in OPEN3D_LIBRARIES)


def import_open3d(purpose: str) -> Any:
    """Import Open3D.

    Args:
        purpose: what needs it, for the message: "reading .ply files".

    Returns:
        The module `open3d`.

    Raises:
        MissingDependencyError: it is not installed, or a system library that it loads is missing; the message
            holds the pip or the apt line.
    """
    module = sys.modules.get("open3d")
    if module is not None:
        return module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own dependencies deprecate things at import
            import open3d
    except ModuleNotFoundError as error:
        if error.name == "open3d":
            raise MissingDependencyError(
                f'{purpose} needs Open3D, which is not installed: pip install "open3d>=0.19"'
            ) from error
        raise MissingDependencyError(
            f"{purpose} needs Open3D, whose own dependency {error.name} is not installed: "
            f"pip install {error.name}"
        ) from error
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise MissingDependencyError(
            f"{purpose} needs Open3D, which is installed but cannot load ({reason}); on Debian and Ubuntu: "
            f"{APT_LINE}"
        ) from error
    return open3d
