"""`python -m stillhouse.core.cli` is `stillhouse`."""

from __future__ import annotations

import sys

from ._root import main

sys.exit(main())
