"""`python -m stillhouse.lidar`, the same as `stillhouse-lidar`; under `torchrun … -m` as well."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
